"""What the events of a profile say: seconds of each part of an update on host and device."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch.profiler import profile

PREFIX, WHOLE, FUSED = "selfnpo_fast: ", "update", "selfnpo::"
PARTS = ("reference", "kernels", "student forward", "backward", "optimiser", "EMA", "waiting")
READ_BACKS = (
    *("aten::_local_scalar_dense", "aten::item"),
    *("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
)
"""Profiler events in which the host waits for a value of a tensor, or for the device."""
ADAMW = "aten::_fused_adamw_"
LAUNCHES, ON_DEVICE = ("cuda_runtime", "cuda_driver"), ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of a trace: calls of CUDA, and what the device does for them."""


class Event(NamedTuple):
    """Something that takes time; times are in microseconds."""

    name: str
    start: float
    end: float
    thread: object
    """Its thread on the host; on the device, its stream."""


def recorded(result: profile) -> list[Event]:
    """The events on the host of a profile, from its raw records.

    torch would need minutes and gigabytes to make its own event objects of them.
    """
    wanted = (PREFIX, FUSED, ADAMW, *READ_BACKS)
    events = result.profiler.kineto_results.events()
    return [
        Event(event.name(), event.start_ns() / 1e3, event.end_ns() / 1e3, event.start_thread_id())
        for event in events
        if event.name().startswith(wanted)
    ]


class Parts:
    """The parts of an update that are open on one thread, as a function of time."""

    def __init__(self, events: Iterable[Event]) -> None:
        """`events` of one thread. They are nested; those that are no parts are left out."""
        spans = sorted(
            ((event.start, event.end, _part(event.name)) for event in events if _part(event.name)),
            key=lambda span: (span[0], -span[1]),
        )
        # From each time on, the innermost open part is the one of this name; None outside of all.
        self.times: list[float] = []
        self.names: list[str | None] = []
        open_spans: list[tuple[float, str]] = []
        for start, end, name in spans:
            self._close(open_spans, start)
            self._change(start, name)
            open_spans.append((end, name))
        self._close(open_spans, float("inf"))

    def _close(self, open_spans: list[tuple[float, str]], until: float) -> None:
        while open_spans and open_spans[-1][0] <= until:
            end, _ = open_spans.pop()
            self._change(end, open_spans[-1][1] if open_spans else None)

    def _change(self, time: float, name: str | None) -> None:
        self.times.append(time)
        self.names.append(name)

    def at(self, time: float) -> str | None:
        """The innermost part at a time, or None outside of all."""
        place = bisect_right(self.times, time)
        return self.names[place - 1] if place else None

    def seconds(self) -> dict[str, float]:
        """Microseconds of each part, each without the parts inside it."""
        out: dict[str, float] = defaultdict(float)
        for name, start, end in zip(self.names, self.times, self.times[1:], strict=False):
            if name is not None:
                out[name] += end - start
        return out


def _part(name: str) -> str | None:
    """The part of an update that an event's name stands for; None where it stands for none."""
    if name.startswith(PREFIX):
        return name.removeprefix(PREFIX)
    return "kernels" if name.startswith(FUSED) else None


def by_thread(events: Iterable[Event]) -> dict[object, Parts]:
    """The parts of each thread that has some."""
    threads: dict[object, list[Event]] = defaultdict(list)
    for event in events:
        if _part(event.name):
            threads[event.thread].append(event)
    return {thread: Parts(found) for thread, found in threads.items()}


def seconds_of(events: Sequence[Event], updates: int) -> dict[str, float]:
    """Host seconds per update of each part, each without the parts inside it.

    "everything else" is the time of an update outside of all parts, "update" its whole time.
    """
    exclusive: Counter[str] = Counter()
    for parts in by_thread(events).values():
        exclusive.update(parts.seconds())
    return _table(exclusive, sum(event.end - event.start for event in _whole(events)), updates)


def _table(exclusive: dict[str, float], whole: float, updates: int) -> dict[str, float]:
    """Seconds per update of all parts in their order, from microseconds of all updates."""
    parts = {name: exclusive.get(name, 0.0) for name in PARTS}
    parts |= {"everything else": exclusive.get(WHOLE, 0.0), WHOLE: whole}
    return {name: microseconds / 1e6 / updates for name, microseconds in parts.items()}


def _whole(events: Iterable[Event]) -> list[Event]:
    return [event for event in events if event.name == PREFIX + WHOLE]


def read_backs(events: Sequence[Event]) -> dict[str, int]:
    """Number of READ_BACKS events within updates, by name.

    Those inside torch's fused AdamW are left out: its CPU kernel reads the step count of every
    parameter. So are those between updates, where the profiler itself waits for the device.
    """
    updates, adamw = _whole(events), [event for event in events if event.name == ADAMW]
    counts = Counter(
        event.name
        for event in events
        if event.name in READ_BACKS
        and any(whole.start <= event.start <= whole.end for whole in updates)
        and not any(step.thread == event.thread and step.start <= event.start <= step.end for step in adamw)
    )
    return dict(counts)


class DeviceTimes:
    """What the device did in the updates of a Chrome trace.

    A kernel belongs to the part of the update in which it was launched. Where the launching thread
    is in no part, as autograd's is, that is the part of the thread of the updates at that time:
    this thread waits in the backward pass.
    """

    def __init__(self, trace: Sequence[dict], updates: int) -> None:
        """`trace` are the `traceEvents` of a trace as torch.profiler writes it."""
        host = [event for event in host_events(trace) if _part(event.name)]
        threads, whole = by_thread(host), _whole(host)
        main = threads[whole[0].thread]
        launched = {
            correlation: (event["ts"], event.get("tid"))
            for event in trace
            if event.get("cat") in LAUNCHES and (correlation := _correlation(event)) is not None
        }
        parts: Counter[str] = Counter()
        orphans = 0.0
        names: dict[str, list[float]] = defaultdict(list)
        spans = []
        for event in trace:
            if event.get("cat") not in ON_DEVICE:
                continue
            time, thread = launched.get(_correlation(event), (None, None))
            if time is None:
                orphans += event["dur"]
                continue
            own = threads.get(thread)
            name = (own and own.at(time)) or main.at(time)
            if not name:  # launched outside of the updates
                continue
            parts[name] += event["dur"]
            names[event["name"]].append(event["dur"])
            spans.append((event["ts"], event["ts"] + event["dur"]))
        self.updates, self._names = updates, names
        self.seconds = _table(parts, sum(parts.values()), updates)
        """Seconds per update of each part's kernels and copies; those of two streams are added."""
        self.orphans = orphans / 1e6 / updates
        """Seconds per update of what has no launch in the trace; it is in no part."""
        self.busy = _union(spans) / 1e6 / updates
        """Seconds per update in which the device did anything."""

    def longest(self, count: int = 20) -> list[dict]:
        """The kernels that take longest in all: name, milliseconds and launches per update."""
        order = sorted(self._names, key=lambda name: -sum(self._names[name]))
        return [
            {
                "name": name[:160],
                "ms": sum(self._names[name]) / 1e3 / self.updates,
                "launches": len(self._names[name]) / self.updates,
            }
            for name in order[:count]
        ]


def _correlation(event: dict) -> int | None:
    """The number that a call of CUDA shares with what the device does for it."""
    return event.get("args", {}).get("correlation")


def host_events(trace: Sequence[dict]) -> list[Event]:
    """The events on the host of a Chrome trace."""
    on_host = ("cpu_op", "user_annotation", *LAUNCHES)
    return [
        Event(event["name"], event["ts"], event["ts"] + event["dur"], event["tid"])
        for event in trace
        if event.get("ph") == "X" and event.get("cat") in on_host
    ]


def _union(spans: list[tuple[float, float]]) -> float:
    """The length of the union of some intervals."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total

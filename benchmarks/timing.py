"""How benchmarks time a function that takes microseconds: on a GPU by replays of a CUDA graph.

A GPU has finished a small operation long before Python has launched the next one. Calls in a row
are therefore captured in one CUDA graph, whose replays are timed between two events: that is the
device's time. What the host takes to issue a call is timed apart. On a CPU the host's clock times
plain calls.

The outputs of a captured call are freed before the next call, as in plain calls, and the memory
pool of the graph gives the next call the same addresses. All calls of a sample thus touch the same
memory, captured or not. Where that fits into the GPU's L2 cache, the figure is that of the cache
(`cached_bytes`).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from selfnpo_fast.runtime.errors import one_line

Call = Callable[[], object]

WARM_UP = 3
"""Calls before a capture. In them kernels compile and libraries allocate their workspaces."""
GRAPH_CALLS = 100
"""Calls in a graph: with so many, the gaps between replays do not count."""
CAPTURE_SECONDS = 0.05
"""A graph has fewer calls where the host would take longer than this to issue them."""
HOST_CALLS = 8
"""Calls by which the host is timed: too few for a GPU's queue, of 1,024 launches, to be full."""
SPARE = 1.3
"""Factor on the number of calls that took long enough during calibration."""


@dataclass(kw_only=True)
class Timed:
    """A function that is ready to be timed; `close` frees its graph."""

    seconds: Callable[[int], float]
    """Makes so many calls, a multiple of `unit`, and returns their seconds."""
    unit: int
    way: str = "clock"
    """"clock" on a CPU; on a GPU "graph", or "launches" where there is no graph."""
    why_launches: str | None = None
    """Why a function on a GPU is not captured."""
    launches: float | None = None
    """Kernels, copies and fills of a call; None where there is no graph to count them in."""
    host_seconds: Callable[[], float] | None = None
    """Seconds in which the host of a GPU issues one call, without waiting for the GPU."""
    close: Callable[[], None] = lambda: None
    calls: int = 0
    """Calls in a sample."""


def ready(
    make: Callable[[], Call], device: torch.device, least: float, cycle: int = 1, *, capture: bool = True
) -> Timed:
    """Prepares a function to be timed on the device; a GPU has to be the current one.

    `make` returns the function. A function with a state has to begin it anew at each `make`, must
    not free the tensors that it begins with, and repeats its work after `cycle` calls. With
    `capture` false, as for a function that waits for values of the GPU, plain launches are timed.
    They are also what is timed where the capture fails; `way` and `why_launches` say so. The
    calibration, in which the function runs for `least` seconds, is the warm-up.
    """
    run = make()
    timed = Timed(seconds=functools.partial(_by_clock, run), unit=cycle)
    if device.type == "cuda":
        for _ in range(WARM_UP):
            run()
        timed.seconds = functools.partial(_by_events, run, device)
        timed.host_seconds = functools.partial(_issuing, run, device)
        timed.way, timed.why_launches = "launches", "it waits for values of the GPU"
        if capture:
            _capture(timed, make(), device)
    try:
        timed.calls = calibrate(timed.seconds, least, timed.unit)
    except BaseException:
        timed.close()
        raise
    return timed


def _capture(timed: Timed, run: Call, device: torch.device) -> None:
    """Has replays timed instead of launches, if the function can be captured.

    `run` is another function than the one that is launched: the state of a captured one has to stay
    as it is.
    """
    calls = _graph_calls(timed.host_seconds(), timed.unit)
    try:
        graph = _captured(run, calls, device)
    except Exception as error:  # whatever the function raises there
        timed.why_launches = one_line(f"{type(error).__name__}: {error}")
        return
    timed.seconds, timed.unit = _Replays(graph, calls, run, device).seconds, calls
    timed.way, timed.why_launches, timed.close = "graph", None, graph.reset
    nodes = _nodes(graph)
    timed.launches = nodes and nodes / calls


@dataclass(frozen=True)
class _Replays:
    """A graph of some calls, and the function that owns what the graph reads and writes."""

    graph: torch.cuda.CUDAGraph
    calls: int
    run: Call
    device: torch.device

    def seconds(self, number: int) -> float:
        """Seconds of so many calls, a multiple of `calls`."""
        return _by_events(self.graph.replay, self.device, number // self.calls)


def _graph_calls(host_seconds: float, cycle: int) -> int:
    """Number of calls in a graph: an even number of whole cycles.

    A function that swaps two buffers ends an even number of calls with those it began with.
    """
    asked = min(GRAPH_CALLS, CAPTURE_SECONDS / max(host_seconds, 1e-9))
    return max(1, round(asked / (2 * cycle))) * 2 * cycle


def _captured(run: Call, calls: int, device: torch.device) -> torch.cuda.CUDAGraph:
    """The graph of so many calls, in a memory pool of its own. Raises what the capture raises."""
    graph, pool = torch.cuda.CUDAGraph(keep_graph=True), torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream(device)
    try:
        with (
            warnings.catch_warnings(),
            # A capture that fails leaves its own stream as the current one.
            torch.cuda.stream(torch.cuda.current_stream(device)),
        ):
            warnings.filterwarnings("error", "The CUDA Graph is empty")
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                for _ in range(calls):
                    run()
        graph.instantiate()
        graph.replay()  # the first one uploads the graph
        torch.cuda.synchronize(device)
    except BaseException:
        _clean_up(device, pool)
        raise
    return graph


def _nodes(graph: torch.cuda.CUDAGraph) -> int | None:
    """The number of nodes of a graph, by the driver; None where the driver does not say."""
    number = ctypes.c_size_t(0)
    try:
        driver, address = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(graph.raw_cuda_graph())
        status = driver.cuGraphGetNodes(address, None, ctypes.byref(number))
    except (AttributeError, OSError, RuntimeError):
        return None
    return number.value if status == 0 else None


def _clean_up(device: torch.device, pool: tuple[int, int]) -> None:
    """Undoes what torch leaves undone where a capture fails.

    Allocations would go on to count as the capture's, and the default generator would refuse to
    draw.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    with contextlib.suppress(Exception):  # it raises where torch has done so
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)
    torch.cuda.default_generators[index].graphsafe_set_state(torch.Generator(device))


def cached_bytes(device: torch.device) -> int | None:
    """Size of a GPU's L2 cache; None for a CPU."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else None


def _by_clock(run: Call, calls: int) -> float:
    """Seconds of so many calls by the host's clock."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return time.perf_counter() - start


def _by_events(run: Call, device: torch.device, calls: int) -> float:
    """Seconds between an event before so many calls and one after them."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3


def _issuing(run: Call, device: torch.device) -> float:
    """Seconds in which the host issues one call, by `HOST_CALLS` of them on an idle GPU."""
    torch.cuda.synchronize(device)
    run()  # the first one wakes the GPU
    seconds = _by_clock(run, HOST_CALLS) / HOST_CALLS
    torch.cuda.synchronize(device)
    return seconds


def calibrate(time_calls: Callable[[int], float], least: float, cycle: int = 1) -> int:
    """A number of calls, in whole cycles, that takes at least `least` seconds.

    `time_calls` makes the given number of calls and returns their seconds.
    """
    calls = cycle
    while (seconds := time_calls(calls)) < least:
        # A tenth more than the last timing asks for, so that noise seldom needs another round; at
        # most ten times as many.
        needed = calls * min(10.0, 1.1 * least / max(seconds, 1e-9))
        calls = max(calls + cycle, -(-int(needed) // cycle) * cycle)
    # The first calls are slower than later ones, which have to take `least` seconds as well.
    return -(-int(calls * SPARE) // cycle) * cycle


def measure(arms: Sequence[Timed], rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Times every function once per round.

    Returns the seconds of a call and those in which the host issued one, each (rounds, functions);
    the latter are NaN on a CPU. Each round starts with another function, so that none always runs
    after the same one.
    """
    seconds, host = (np.full((rounds, len(arms)), np.nan) for _ in range(2))
    for number in range(rounds):
        for turn in range(len(arms)):
            column = (number + turn) % len(arms)
            arm = arms[column]
            seconds[number, column] = arm.seconds(arm.calls) / arm.calls
            if arm.host_seconds is not None:
                host[number, column] = arm.host_seconds()
    return seconds, host

"""Figures and problems from the JSON files of `gpu_check.py`'s parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured value."""

    name: str
    """The case or arm, and after its last dot the quantity."""
    value: float
    """The median where there are rounds."""
    low: float | None = None
    """Smallest of the rounds; None for a value without rounds."""
    high: float | None = None
    unit: str = ""
    share: float | None = None
    """Share of the card's measured peak."""

    def text(self) -> str:
        """Value, unit and spread."""
        text = f"{digits(self.value)} {self.unit}".rstrip()
        return text if self.low is None else f"{text} [{digits(self.low)}, {digits(self.high)}]"


def digits(value: float) -> str:
    """Three significant digits; larger values as whole numbers."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def figures_of(result: Mapping, peaks: Mapping[str, Mapping[str, float]]) -> list[Figure]:
    """The figures of one part's JSON, in its order.

    `peaks` are those of `peaks.py`, to which shares are taken; it may be empty.
    """
    maker = _FIGURES.get(result.get("benchmark", ""))
    return list(maker(result, peaks)) if maker else []


def problems_of(result: Mapping) -> list[str]:
    """What failed in a part, and what was slower than the plain way; a line each."""
    maker = _PROBLEMS.get(result.get("benchmark", ""))
    return list(maker(result)) if maker else []


def figure(
    name: str, value: float | Mapping[str, float], unit: str = "", *, scale: float = 1.0, peak: float | None = None
) -> Figure:
    """A figure from a value or a `spread`, times `scale`; its share is the value's of `peak`."""
    low = high = None
    if isinstance(value, Mapping):
        low, high, value = scale * value["low"], scale * value["high"], value["median"]
    return Figure(
        name=name, value=scale * value, low=low, high=high, unit=unit, share=None if peak is None else value / peak
    )


def _peaks(result: Mapping, _: Mapping) -> Iterator[Figure]:
    found = result["peaks"]
    yield figure("copy.rate", found["copy_bytes_per_second"], "TB/s", scale=1e-12)
    yield figure("bf16.rate", found["bf16_flops_per_second"], "TFLOP/s", scale=1e-12)


def _ops(result: Mapping, peaks: Mapping) -> Iterator[Figure]:
    copy = _median(peaks, "copy_bytes_per_second")
    yield figure("checked", len(result.get("cases", [])), "cases")
    for dtype, error in result.get("largest_error", {}).items():
        yield figure(f"largest_error.{dtype}", error)
    for case in result.get("cases", []):
        name = _case(case)
        for arm, seconds in case.get("seconds", {}).items():
            yield figure(f"{name}.{arm}", seconds, "us", scale=1e6)
        if "ours" in case.get("host_seconds", {}):
            yield figure(f"{name}.ours.host", case["host_seconds"]["ours"], "us", scale=1e6)
        if "ours" in case.get("gigabytes_per_second", {}):
            rate = case["gigabytes_per_second"]["ours"]
            yield figure(f"{name}.ours.rate", rate, "GB/s", peak=None if copy is None else copy / 1e9)
        if case.get("fraction_of_floor"):
            yield figure(f"{name}.share_of_copy", case["fraction_of_floor"])


def _update(result: Mapping, peaks: Mapping) -> Iterator[Figure]:
    peak = _median(peaks, "bf16_flops_per_second")
    for name, arm in result.get("arms", {}).items():
        if "seconds_per_update" in arm:
            yield figure(f"{name}.seconds", arm["seconds_per_update"], "s")
            yield figure(f"{name}.hours_per_1000", arm["hours_per_1000_updates"], "h")
        if arm.get("tflops"):
            yield figure(f"{name}.rate", arm["tflops"], "TFLOP/s", peak=None if peak is None else peak / 1e12)
        for key, label in (("peak", "peak"), ("reserved", "reserved"), ("computed_peak", "doctor")):
            if arm.get(f"{key}_bytes") is not None:
                yield figure(f"{name}.{label}", arm[f"{key}_bytes"], "GiB", scale=2**-30)
    for name, share in result.get("hidden_share", {}).items():
        yield figure(f"{name}.hidden", share, "of the reference's forward")


def _step(result: Mapping, _: Mapping) -> Iterator[Figure]:
    for net in result.get("nets", {}).values():
        for arm in net.get("arms", []):
            if "seconds_per_pair" in arm:
                yield figure(f"{arm['name']}.seconds_per_pair", arm["seconds_per_pair"], "s")
                yield figure(f"{arm['name']}.forwards_per_pair", arm["forwards_per_pair"])
        for name, seconds in net.get("seconds_per_update", {}).items():
            yield figure(f"{name}.seconds_per_update", seconds, "s")


def _sampler(result: Mapping, _: Mapping) -> Iterator[Figure]:
    for net in result.get("nets", {}).values():
        for arm in net.get("arms", []):
            name = f"batch_{net['batch']}.{arm['name']}"
            if "seconds_per_image" in arm:
                yield figure(f"{name}.seconds_per_image", arm["seconds_per_image"], "s")
                yield figure(f"{name}.peak", arm["peak_bytes"], "GiB", scale=2**-30)
            ratio = arm.get("ratio_to_stock")
            if ratio:
                faster = {"median": 1 / ratio["median"], "low": 1 / ratio["high"], "high": 1 / ratio["low"]}
                yield figure(f"{name}.speed", faster, "x stock")


def _profile(result: Mapping, _: Mapping) -> Iterator[Figure]:
    for where, key in (("host", "seconds_per_update"), ("device", "device_seconds_per_update")):
        for name, seconds in result.get(key, {}).items():
            yield figure(f"{name}.{where}", seconds, "ms", scale=1e3)
    # What the fused operations take of the time in which the device computes.
    device, busy = result.get("device_seconds_per_update", {}), result.get("device_busy_seconds_per_update")
    if busy and "kernels" in device:
        yield figure("kernels.share", device["kernels"] / busy, "of the device's time")
    for name, count in result.get("read_backs", {}).items():
        yield figure(f"{name}.read_backs", count)


def _tests(result: Mapping, _: Mapping) -> Iterator[Figure]:
    for name in ("passed", "skipped"):
        yield figure(name, result[name], "tests")
    yield figure("failed", len(result["failed"]), "tests")


def _problems_of_ops(result: Mapping) -> Iterator[str]:
    for case in result.get("cases", []):
        yield from (f"{_case(case)}: {failure}" for failure in case.get("failures", []))
        yield from (f"{_case(case)}.{arm}: {error}" for arm, error in case.get("errors", {}).items())
        eager = case.get("ratio_to", {}).get("eager")
        if eager and eager["median"] < 1:
            yield f"{_case(case)}: {digits(1 / eager['median'])} times eager PyTorch's time"


def _problems_of_update(result: Mapping) -> Iterator[str]:
    gate = result.get("gate", {}).get("arms", {})
    yield from (f"{name}, the gate: {arm['error']}" for name, arm in gate.items() if "error" in arm)
    arms = result.get("arms", {})
    yield from (f"{name}: {arm['error']}" for name, arm in arms.items() if "error" in arm)
    seconds = {name: arm["seconds_per_update"]["median"] for name, arm in arms.items() if "seconds_per_update" in arm}
    for name, value in seconds.items():
        if name != "plain" and value > seconds.get("plain", value):
            yield f"{name}: {digits(value / seconds['plain'])} times the time of plain"


def _problems_of_nets(result: Mapping) -> Iterator[str]:
    for net, record in result.get("nets", {}).items():
        if "error" in record:
            yield f"{net}: {record['error']}"
        for arm in record.get("arms", []):
            if "error" in arm:
                yield f"{net}, {arm['name']}: {arm['error']}"
            ratio = arm.get("ratio_to_stock")
            if ratio and ratio["median"] > 1:
                yield f"{net}, {arm['name']}: {digits(ratio['median'])} times stock diffusers' time"


def _problems_of_tests(result: Mapping) -> Iterator[str]:
    for name, reason in result["failed"].items():
        yield f"{name}: {reason}" if reason else name


def _case(case: Mapping) -> str:
    """The name of a case of bench_ops."""
    return f"{case['op']}.{case['shape']}.{case['dtype']}"


def _median(peaks: Mapping, name: str) -> float | None:
    """A measured peak, or None."""
    return peaks.get(name, {}).get("median")


_FIGURES: dict[str, Callable[[Mapping, Mapping], Iterator[Figure]]] = {
    "peaks": _peaks,
    "bench_ops": _ops,
    "bench_update": _update,
    "bench_step": _step,
    "bench_sampler": _sampler,
    "profile_step": _profile,
    "tests": _tests,
}
_PROBLEMS: dict[str, Callable[[Mapping], Iterator[str]]] = {
    "bench_ops": _problems_of_ops,
    "bench_update": _problems_of_update,
    "bench_step": _problems_of_nets,
    "bench_sampler": _problems_of_nets,
    "tests": _problems_of_tests,
}

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
    copy = peaks.get("copy_bytes_per_second", {}).get("median")
    for case in result.get("cases", []):
        name = f"{case['op']}.{case['shape']}.{case['dtype']}"
        for arm, seconds in case.get("seconds", {}).items():
            yield figure(f"{name}.{arm}.device", seconds, "us", scale=1e6)
        if "ours" in case.get("host_seconds", {}):
            yield figure(f"{name}.ours.host", case["host_seconds"]["ours"], "us", scale=1e6)
        if "ours" in case.get("gigabytes_per_second", {}):
            rate = case["gigabytes_per_second"]["ours"]
            peak = None if copy is None else copy / 1e9
            yield figure(f"{name}.ours.rate", rate, "GB/s", peak=peak)
        if case.get("fraction_of_floor"):
            yield figure(f"{name}.share_of_copy", case["fraction_of_floor"])


def _update(result: Mapping, peaks: Mapping) -> Iterator[Figure]:
    peak = peaks.get("bf16_flops_per_second", {}).get("median")
    for arm in result.get("arms", []):
        name = arm["name"]
        if "seconds_per_update" in arm:
            yield figure(f"{name}.seconds", arm["seconds_per_update"], "s")
        if arm.get("flops_per_second"):
            yield figure(f"{name}.rate", arm["flops_per_second"], "TFLOP/s", scale=1e-12, peak=peak)
        for key, unit, scale in (
            ("hours_per_1000", "h", 1.0),
            ("hidden", "of the reference's forwards", 1.0),
            ("peak_bytes", "GiB", 2**-30),
            ("reserved_bytes", "GiB", 2**-30),
            ("doctor_bytes", "GiB", 2**-30),
        ):
            if arm.get(key) is not None:
                yield figure(f"{name}.{key.removesuffix('_bytes')}", arm[key], unit, scale=scale)


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
            if "seconds_per_image" in arm:
                ratio = arm["ratio_to_stock"]
                faster = {"median": 1 / ratio["median"], "low": 1 / ratio["high"], "high": 1 / ratio["low"]}
                yield figure(f"{arm['name']}.seconds_per_image", arm["seconds_per_image"], "s")
                yield figure(f"{arm['name']}.speed", faster, "x stock")
                yield figure(f"{arm['name']}.peak", arm["peak_bytes"], "GiB", scale=2**-30)


def _profile(result: Mapping, _: Mapping) -> Iterator[Figure]:
    for name, seconds in result.get("seconds_per_update", {}).items():
        yield figure(f"{name}.milliseconds", seconds, "ms", scale=1e3)
    for name, count in result.get("read_backs", {}).items():
        yield figure(f"{name}.read_backs", count)


def _tests(result: Mapping, _: Mapping) -> Iterator[Figure]:
    for name in ("passed", "skipped"):
        yield figure(name, result[name], "tests")
    yield figure("failed", len(result["failed"]), "tests")


def _failed_tests(result: Mapping) -> Iterator[str]:
    for name, reason in result["failed"].items():
        yield f"{name}: {reason}" if reason else name


_FIGURES: dict[str, Callable[[Mapping, Mapping], Iterator[Figure]]] = {
    "peaks": _peaks,
    "bench_ops": _ops,
    "bench_update": _update,
    "bench_step": _step,
    "bench_sampler": _sampler,
    "profile_step": _profile,
    "tests": _tests,
}
_PROBLEMS: dict[str, Callable[[Mapping], Iterator[str]]] = {"tests": _failed_tests}

"""What `bench_step.py` writes and prints: a record per arm, the table and the chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.arms.step import CONTINUOUS, FLOOR, FORWARD, Arm
from benchmarks.environment import bar_chart, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMPARED = {CONTINUOUS: "x continuous w=-1", FORWARD: "x one forward", FLOOR: "x student"}
"""Arms that every arm is compared to, with the heads of their columns."""


@dataclass
class Timing:
    """What has been measured of an arm so far."""

    arm: Arm
    seconds: list[float] = field(default_factory=list)
    """Seconds per minibatch, a value a round."""
    forwards: list[int] = field(default_factory=list)
    """Reference forwards per minibatch, a value a round."""
    finite: bool = True
    """Whether all losses were finite."""
    error: str | None = None
    """Why the arm is not timed."""

    def add(self, seconds: float, forwards: int, finite: bool) -> None:
        """Adds one round."""
        self.seconds.append(seconds)
        self.forwards.append(forwards)
        self.finite &= finite


def summarise(timings: Sequence[Timing], batch: int) -> list[dict[str, object]]:
    """One record per arm. Ratios are taken within each round, and have their median and spread.

    An arm with an error has no values, and nobody is compared to it.
    """
    per_pair = {t.arm.name: np.array(t.seconds) / batch for t in timings if t.error is None}
    records = []
    for timing in timings:
        arm, config = timing.arm, timing.arm.config
        # A continuous rollout has no K, because each of its steps gives a pair.
        k = None if config is None or config.mode == "continuous" else config.max_steps
        record = {"name": arm.name, "label": arm.label, "start": config and config.start, "k": k}
        record |= {"w": config and config.omega}
        if timing.error is not None:
            record["error"] = timing.error
        elif timing.seconds:
            seconds = per_pair[arm.name]
            record |= {"forwards_per_pair": float(np.mean(timing.forwards)) / batch, "forwards_counted": not arm.graphs}
            record |= {"seconds_per_pair": spread(seconds), "rounds_seconds_per_pair": seconds.tolist()}
            record |= {f"ratio_to_{name}": spread(seconds / per_pair[name]) for name in COMPARED if name in per_pair}
            record["losses_finite"] = timing.finite
        records.append(record)
    return records


def title(name: str, result: Mapping, environment: Mapping) -> str:
    """Network, settings and machine in one line."""
    size = f"{result['parameters'] / 1e6:.1f} M parameters, batch {result['batch']}, {result['precision']}"
    machine = f"{environment['device']}, {environment['threads']} CPU threads"
    if result.get("clock") == "cpu":
        machine += ", in CPU time"
    return f"{name} ({size}), {result['rounds']} rounds on {machine}"


def cell(value: Mapping[str, float] | None, digits: str) -> str:
    """The median, in brackets the smallest and the largest round."""
    if value is None:
        return "-"
    return f"{value['median']:{digits}} [{value['low']:{digits}}, {value['high']:{digits}}]"


def table(name: str, result: Mapping, environment: Mapping) -> str:
    """The printed table of one network, with a line for each arm that failed."""
    lines = [["arm", "start", "K", "w", "forwards/pair", "seconds/pair [least, most]", *COMPARED.values()]]
    timed = [arm for arm in result["arms"] if "seconds_per_pair" in arm]
    for arm in timed:
        setting = ["-" if arm[key] is None else f"{arm[key]:g}" for key in ("k", "w")]
        values = [f"{arm['forwards_per_pair']:.4g}", cell(arm["seconds_per_pair"], ".3g")]
        values += [cell(arm.get(f"ratio_to_{other}"), ".2f") for other in COMPARED]
        lines.append([arm["label"], arm["start"] or "-", *setting, *values])
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    rows = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    rows += [f"{name}: {cell(value, '.3g')} s an update" for name, value in result["seconds_per_update"].items()]
    if result["memory_gib"]:
        rows.append("peak memory: " + ", ".join(f"{value:.2f} GiB {k}" for k, value in result["memory_gib"].items()))
    rows += [f"{arm['label']}: losses that are not finite" for arm in timed if not arm["losses_finite"]]
    gate = f"equal pairs to {result['gate']['largest_error']:.1e} (tolerance {result['gate']['tolerance']:.0e})"
    return "\n".join([f"{title(name, result, environment)}; {gate}", *rows, ""])


def chart(result: Mapping) -> Figure | None:
    """Seconds per pair relative to the floor, one panel per network; None where no floor was timed."""
    panels = {}
    for name, net in result["nets"].items():
        bars = {}
        for arm in net.get("arms", ()):
            symbols = (("k", "K"), ("w", "w"))
            setting = [f"{symbol} = {arm[key]:g}" for key, symbol in symbols if arm[key] is not None]
            if f"ratio_to_{FLOOR}" in arm:
                bars[", ".join([arm["label"], *setting])] = arm[f"ratio_to_{FLOOR}"]
        if bars:
            panels[title(name, net, result["environment"]).replace(" on ", "\non ")] = bars
    return bar_chart(panels, "seconds per training pair, floor = 1") if panels else None

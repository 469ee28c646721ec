"""What `bench_sampler.py` makes of its timings: records, tables and a chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.arms.sampler import STOCK, Arm
from benchmarks.environment import bar_chart, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_record(arm: Arm) -> dict:
    """An arm's record before anything is known of it."""
    return {"name": arm.name, "label": arm.label, "networks": arm.networks, "graphs": arm.graphs}


def summarise(records: Mapping[str, dict]) -> None:
    """Writes medians and ratios to stock into the records, by arm, that have timings.

    Ratios are taken within a round. They are None where stock was not timed.
    """
    stock = records.get(STOCK, {})
    base = stock.get("rounds_seconds_per_image", [])
    for record in records.values():
        rounds = record.get("rounds_seconds_per_image")
        if not rounds:
            continue
        shared = min(len(rounds), len(base))
        record["seconds_per_image"] = spread(rounds)
        ratios = np.array(rounds[:shared]) / np.array(base[:shared])
        record["ratio_to_stock"] = spread(ratios) if shared else None
        record["memory_to_stock"] = record["peak_bytes"] / stock["peak_bytes"] if "peak_bytes" in stock else None


def title(name: str, result: Mapping, environment: Mapping) -> str:
    """Network, settings and machine in one line."""
    size = f"{result['parameters'] / 1e6:.1f} M parameters, {result['steps']} steps, batch {result['batch']}"
    return f"{name} ({size}, {result['precision']}), {environment['device']}, {environment['threads']} CPU threads"


def table(name: str, result: Mapping, environment: Mapping) -> str:
    """The printed table of one network: medians, in brackets the smallest and the largest round."""
    lines = [["arm", "networks", "seconds/image", "x stock", "peak MiB", "reserved", "x stock", "beyond networks"]]
    lines += [_cells(arm) for arm in result["arms"] if "seconds_per_image" in arm]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    rows = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    rows += [f"{arm['label']}: {arm['error']}" for arm in result["arms"] if "error" in arm]
    gate = result["gate"]
    error = max(gate["errors"].values(), default=float("nan"))
    passed = f"equal latents in {gate['precision']} to {error:.1e} (tolerance {gate['tolerance']:.0e})"
    return "\n".join([f"{title(name, result, environment)}; {passed}", *rows, ""])


def _cells(arm: Mapping) -> list[str]:
    """The cells of an arm's row."""

    def cell(value: Mapping | None, digits: str) -> str:
        if value is None:
            return "-"
        return f"{value['median']:{digits}} [{value['low']:{digits}}, {value['high']:{digits}}]"

    def size(value: int | None) -> str:
        return "-" if value is None else f"{value / 2**20:.1f}"

    values = [arm["label"], str(arm["networks"]), cell(arm["seconds_per_image"], ".3g")]
    values += [cell(arm["ratio_to_stock"], ".3f"), size(arm["peak_bytes"]), size(arm["reserved_bytes"])]
    more = arm["memory_to_stock"]
    return [*values, "-" if more is None else f"{more:.3f}", cell(arm.get("beyond"), ".2%")]


def chart(result: Mapping) -> Figure | None:
    """Time per picture relative to the stock pipeline, one panel per network; None without any."""
    panels = {}
    for name, net in result["nets"].items():
        bars = {arm["label"]: arm["ratio_to_stock"] for arm in _timed(net.get("arms", ()))}
        if bars:
            panels[title(name, net, result["environment"])] = bars
    return bar_chart(panels, "time per picture, stock pipeline = 1") if panels else None


def _timed(arms: Sequence[Mapping]) -> list[Mapping]:
    """The arms that have a ratio to stock."""
    return [arm for arm in arms if arm.get("ratio_to_stock") is not None]

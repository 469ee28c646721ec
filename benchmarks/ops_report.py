"""The printed table, the chart and the bars of `bench_ops.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.arms.ops import DTYPES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADER = ("op", "shape", "dtype", "ms ours [least, most]", "GB/s", "eager/ours", "compiled/ours", "of the floor")
HOST = "us of the host"
"""A further column of a GPU's table."""


def bars(records: Sequence[dict]) -> list[dict]:
    """Compares the medians of float32 cases with the speed-ups that the project asks for on a CPU.

    A bar is the least ratio to another arm, or the least fraction of the floor.
    """
    found = []
    for record in records:
        if record["dtype"] != "fp32" or "seconds" not in record:
            continue
        asked = {
            "tdft_step": [("eager", 10.0), ("eager_by_rows", 10.0), ("compiled", 2.0)],
            "normal": [("eager", 2.0)],
            "guided_step": [("floor", 0.8)] if record["shape"] == "uncached" else [],
        }.get(record["op"], [])
        for against, least in asked:
            value = record["fraction_of_floor"] if against == "floor" else record["ratio_to"].get(against)
            if value:
                bar = {"op": record["op"], "shape": record["shape"], "against": against, "least": least}
                found.append(bar | {"value": value, "met": value["median"] >= least})
    return found


def cell(value: dict | None, digits: str = ".2f") -> str:
    """A `spread` as text: median [smallest, largest]."""
    return "-" if not value else f"{value['median']:{digits}} [{value['low']:{digits}}, {value['high']:{digits}}]"


def row_of(record: dict) -> list[str]:
    """The cells of one case's row; a star is at an arm that was not captured."""
    star = {name: "*" for name in record["not_captured"]}
    ours, rate = record["seconds"].get("ours"), record["gigabytes_per_second"].get("ours")
    milliseconds = cell(ours and {key: 1e3 * value for key, value in ours.items()}, ".3g") + star.get("ours", "")
    ratios = [cell(record["ratio_to"].get(name)) + star.get(name, "") for name in ("eager", "compiled")]
    bandwidth = f"{rate['median']:.1f}" if rate else "-"
    row = [*(record[key] for key in ("op", "shape", "dtype")), milliseconds, bandwidth, *ratios]
    row.append(cell(record["fraction_of_floor"]) + star.get("floor", ""))
    if record["host_seconds"]:
        host = record["host_seconds"].get("ours")
        row.append(cell(host and {key: 1e6 * value for key, value in host.items()}, ".3g"))
    return row


def table(records: Sequence[dict], judged: Sequence[dict]) -> str:
    """The printed table, with smallest and largest round in brackets, and the bars below it.

    `records` are those of the cases that were timed, `judged` the result of `bars`.
    """
    header = (*HEADER, HOST) if any(record["host_seconds"] for record in records) else HEADER
    rows = [header, *map(row_of, records)]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = ["  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    # The further arms of `tdft_step`.
    for record in records:
        if by_rows := record["ratio_to"].get("eager_by_rows"):
            case = f"{record['op']} {record['shape']} {record['dtype']}"
            lines.append(f"{case}: eager_by_rows/ours {cell(by_rows)}")
            parts = (f"{name} {cell(value)}" for name, value in record["ratio_to"].items() if name[:5] == "ours_")
            lines.append(f"{case}: of our time {', '.join(parts)}")
    # Arms of a GPU that are timed as plain launches, and so with the host's time.
    not_captured = {}
    for record in records:
        for name, why in record["not_captured"].items():
            not_captured.setdefault((record["op"], name, why), []).append(f"{record['shape']} {record['dtype']}")
    for (op, name, why), where in not_captured.items():
        lines.append(f"* {op}, {name}: timed by launches, not captured: {why} ({', '.join(where)})")
    for bar in judged:
        asked = f"{bar['op']} {bar['shape']}: {bar['least']:g} x {bar['against']}"
        lines.append(f"{'met   ' if bar['met'] else 'MISSED'}  {asked}: {cell(bar['value'])}")
    return "\n".join(lines)


def chart(result: dict) -> Figure:
    """One row of panels per op: eager over ours, compiled over ours, and the fraction of the floor.

    `result` is the content of the JSON file, with the cases that were timed.
    """
    # A Figure without pyplot has no global state and never looks for a display.
    from matplotlib.figure import Figure

    records = result["cases"]
    ops = list(dict.fromkeys(record["op"] for record in records))
    heights = [len({record["shape"] for record in records if record["op"] == op}) + 1.4 for op in ops]
    figure = Figure(figsize=(11, 0.36 * sum(heights) + 1), dpi=140, layout="constrained")
    grid = figure.subplots(len(ops), 3, squeeze=False, height_ratios=heights)
    columns = ("eager / ours", "torch.compile / ours", "fraction of the copy floor")
    for op, row in zip(ops, grid, strict=True):
        for axes, title in zip(row, columns, strict=True):
            panel(axes, [record for record in records if record["op"] == op], title)
            if op == ops[0]:
                axes.set_title(title, fontsize=10)
        row[0].set_title(op, fontsize=9, fontweight="bold", loc="left")
        for axes in row[1:]:
            axes.set_yticklabels([])
    figure.legend(*grid[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    machine = f"{result['environment']['device']}, {result['environment']['threads']} CPU threads"
    figure.suptitle(f"backend {result['backend']} ({result['serves']}) on {machine}", fontsize=10)
    return figure


def panel(axes, records: Sequence[dict], title: str) -> None:
    """Horizontal bars of one ratio of one op: a group per shape, a bar per mixture, a line at 1."""
    shapes = list(dict.fromkeys(record["shape"] for record in records))
    for offset, (dtype, colour) in enumerate(zip(DTYPES, ("#1f5a92", "#8fb8de"), strict=True)):
        for record in records:
            ratios = record["ratio_to"]
            by_title = {"eager / ours": ratios.get("eager"), "torch.compile / ours": ratios.get("compiled")}
            value = by_title.get(title, record["fraction_of_floor"])
            if record["dtype"] != dtype or value is None:
                continue
            position = shapes.index(record["shape"]) + 0.38 * offset
            ends = [[value["median"] - value["low"]], [value["high"] - value["median"]]]
            axes.barh(position, value["median"], height=0.36, color=colour, xerr=ends, error_kw={"lw": 0.8})
            label_style = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 7}
            axes.annotate(f"{value['median']:.2g}", (value["high"], position), **label_style)
        axes.barh(0, 0, color=colour, label=dtype)  # an empty bar, for the legend
    axes.set_yticks([n + 0.19 for n in range(len(shapes))], shapes, fontsize=8)
    axes.set_ylim(len(shapes) - 0.3, -0.5)
    axes.axvline(1, color="#888888", lw=0.8, ls=":")
    axes.margins(x=0.14)
    axes.set_xlim(left=0)
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)

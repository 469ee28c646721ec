"""The printed table and the chart of `bench_ops.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.arms.ops import DTYPES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADER = ("op", "shape", "dtype", "ms ours [least, most]", "GB/s", "eager/ours", "compiled/ours", "of the floor")


def cell(value: dict | None, digits: str = ".2f") -> str:
    """A `spread` as text: median [smallest, largest]."""
    return "-" if not value else f"{value['median']:{digits}} [{value['low']:{digits}}, {value['high']:{digits}}]"


def row_of(record: dict) -> list[str]:
    """The cells of one case's row."""
    milliseconds = {key: 1e3 * value for key, value in record["seconds"]["ours"].items()}
    ratios = [cell(record["ratio_to"].get(name)) for name in ("eager", "compiled")]
    bandwidth = f"{record['gigabytes_per_second']['ours']['median']:.1f}"
    case = [record[key] for key in ("op", "shape", "dtype")]
    return [*case, cell(milliseconds, ".3g"), bandwidth, *ratios, cell(record["fraction_of_floor"])]


def table(records: Sequence[dict], judged: Sequence[dict]) -> str:
    """The printed table, with smallest and largest round in brackets, and the bars below it.

    `records` are the cases' records, `judged` the result of `bench_ops.bars`.
    """
    rows = [HEADER, *map(row_of, records)]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = ["  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    # The further arms of `tdft_step`.
    for record in records:
        if by_rows := record["ratio_to"].get("eager_by_rows"):
            case = f"{record['op']} {record['shape']} {record['dtype']}"
            lines.append(f"{case}: eager_by_rows/ours {cell(by_rows)}")
            parts = (f"{name} {cell(value)}" for name, value in record["ratio_to"].items() if name[:5] == "ours_")
            lines.append(f"{case}: of our time {', '.join(parts)}")
    for bar in judged:
        asked = f"{bar['op']} {bar['shape']}: {bar['least']:g} x {bar['against']}"
        lines.append(f"{'met   ' if bar['met'] else 'MISSED'}  {asked}: {cell(bar['value'])}")
    return "\n".join(lines)


def chart(result: dict) -> Figure:
    """One row of panels per op: eager over ours, compiled over ours, and the fraction of the floor.

    `result` is the content of the JSON file.
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

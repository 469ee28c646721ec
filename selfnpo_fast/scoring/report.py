"""Tables, plots and grids of a sweep, in words that claim no more than the intervals show."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from selfnpo_fast.runtime.images import MARGIN, image_grid, to_pil
from selfnpo_fast.scoring.intervals import Interval
from selfnpo_fast.scoring.sweep import ACCURATE, Comparison, Results, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCALE_NOTE = "guidance_scale is diffusers' and equals omega + 1."
INTERVAL_NOTE = (
    "Brackets are 95% bootstrap intervals over prompts (recall and coverage: over real pictures), each for itself: "
    "among many comparisons some exclude zero by chance."
)
GAP = 3  # pixels between the arms' pictures of one prompt
PAGE_WIDTH = 1000  # pixels, about
BRIEF_ROWS = 6


def write_report(results: Results, folder: Path, config: Mapping[str, Any]) -> dict[str, Path]:
    """Write report.json, report.md, frontier.png, accuracy.png and grid.png; returns their paths by name.

    `config` is stored as given and must fit into JSON.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = ("report.json", "report.md", "frontier.png", "accuracy.png", "grid.png")
    paths = {name: folder / name for name in names}
    paths["report.json"].write_text(json.dumps(as_json(results, config), indent=1, allow_nan=False) + "\n")
    paths["report.md"].write_text(markdown(results, config))
    plot_frontier(results).savefig(paths["frontier.png"])
    plot_accuracy(results).savefig(paths["accuracy.png"])
    comparison_grid(results).save(paths["grid.png"])
    return paths


def as_json(results: Results, config: Mapping[str, Any]) -> dict[str, Any]:
    """Everything but the pictures."""
    return {
        "config": dict(config),
        "note": SCALE_NOTE,
        "baseline": results.baseline,
        "accuracy": results.accuracy,
        "rows": [dataclasses.asdict(row) for row in results.rows],
        "comparisons": [dataclasses.asdict(comparison) for comparison in results.comparisons],
        "recall_gains": [dataclasses.asdict(gain) for gain in results.recall_gains],
        "frontier": {
            arm: [dataclasses.asdict(point) for point in results.frontier(arm)] for arm in results.challengers
        },
        "verdicts": {
            arm: {
                **dataclasses.asdict(results.verdict(arm)),
                "gain": results.verdict(arm).gain,
                "statements": statements(results, arm),
            }
            for arm in results.challengers
        },
    }


def markdown(results: Results, config: Mapping[str, Any]) -> str:
    """The report as GitHub-flavoured Markdown."""
    images = results.rows[0].images
    others = " and ".join(f"`{arm}`" for arm in results.challengers) or "nothing"
    parts = [
        "# Evaluation",
        f"`{results.baseline}` (plain guidance) against {others}: {images} pictures per row, the same prompts and "
        f"seeds in every row. {SCALE_NOTE} {INTERVAL_NOTE}",
    ]
    for arm in results.challengers:
        parts += [f"## Verdict on `{arm}`", "\n".join(f"- {line}" for line in statements(results, arm))]
    parts += ["## All points", _table(*_rows_table(results))]
    for arm in results.challengers:
        parts += [
            f"## `{arm}` against `{results.baseline}`, pair by pair",
            "Wins are the share of pairs in which the arm scores higher, ties counted half; differences are arm minus "
            f"`{results.baseline}`. A negative changes the effective guidance, so equal scales are no fair comparison "
            "by themselves; every scale is held against every scale.",
            _table(*_comparison_table(results, arm)),
            "### Frontier",
            "A point is dominated by one that has no less precision and recall, and more of one (estimates, without "
            f"intervals). The gain is recall over `{results.baseline}` of at least equal precision, its scales joined "
            "by straight lines: sliding along these is what more guidance does anyway. Above the highest precision of "
            f"`{results.baseline}` it is taken over that point. A gain is claimed where its interval is above zero and "
            f"the point dominates one of `{results.baseline}`'s frontier.",
            _table(*_frontier_table(results, arm)),
        ]
    parts += ["![Precision against recall](frontier.png)", "![Accuracy against guidance_scale](accuracy.png)"]
    parts += ["![The first prompts, every arm at its best scale](grid.png)"]
    parts += ["## Configuration", "```json\n" + json.dumps(dict(config), indent=1) + "\n```"]
    return "\n\n".join(parts) + "\n"


def statements(results: Results, arm: str) -> list[str]:
    """What the sweep shows of an arm, the bottom line first. Says "no gain" where it shows none."""
    verdict, base = results.verdict(arm), results.baseline
    points = [point for point in results.frontier(arm) if point.arm == arm]
    dominated = sum(bool(point.dominated_by) for point in points)
    lines = [
        f"{arm}: {'a gain' if verdict.gain else 'no gain'} in precision and recall over plain "
        "guidance at all scales tried."
    ]
    most = max(results.recall_gains_of(arm), key=lambda gain: gain.recall.value)
    if verdict.gains:
        most = max(verdict.gains, key=lambda gain: gain.recall.value)
        lines.append(
            f"Frontier: gain. {_signed(most.recall)} recall over {base} at equal precision "
            f"(at {most.guidance_scale:g})."
        )
    else:
        lines.append(
            f"Frontier: no gain shown. At most {_signed(most.recall)} recall over {base} at equal precision "
            f"(at {most.guidance_scale:g}); {base} dominates {dominated} of {len(points)} points."
        )
    for scale in verdict.beyond_reach:
        row = next(row for row in results.of(arm) if row.guidance_scale == scale)
        highest = max(other.precision.value for other in results.of(base))
        lines.append(
            f"At {scale:g} its precision {row.precision.value:.3f} (recall {row.recall.value:.3f}) is above {base}'s "
            f"at any scale tried (at most {highest:.3f}): a trade, not a gain by itself."
        )
    lines += [line for measure in results.compared if (line := _reach_text(results, arm, measure))]
    best = verdict.best
    lines.append(
        "Best scales by Frechet distance, chosen on these pictures: "
        f"{arm} {best.guidance_scale:g} ({results.best(arm).frechet:.2f}), "
        f"{base} {best.baseline_guidance_scale:g} ({results.best(base).frechet:.2f}); {_wins_text(best)}."
    )
    if verdict.unbeaten:
        scales = ", ".join(f"{scale:g}" for scale in verdict.unbeaten)
        lines[-1] += f" No clear win against {base} at {scales}."
    return lines


def brief(results: Results) -> str:
    """At most about 15 lines of plain text: the points (the best of each arm where there are many) and the verdicts."""
    shown = results.rows if len(results.rows) <= BRIEF_ROWS else [results.best(arm) for arm in results.arms]
    accuracy = results.accuracy
    cells = [["arm", "guidance_scale", "accuracy", "Frechet", "precision", "recall"]]
    cells += [
        [
            row.arm,
            f"{row.guidance_scale:g}",
            _plain(row.means[accuracy]),
            f"{row.frechet:.2f}",
            f"{row.precision.value:.3f}",
            f"{row.recall.value:.3f}",
        ]
        for row in shown
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [f"{results.rows[0].images} pictures per row, same prompts and seeds; {SCALE_NOTE}"]
    if len(shown) < len(results.rows):
        lines[0] += " Each arm at its best:"
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    for arm in results.challengers:
        headline, frontier, *_, best = statements(results, arm)
        lines.append(headline)
        lines += [
            line
            for text in (frontier, best)
            for line in textwrap.wrap(text, 110, initial_indent="  ", subsequent_indent="    ")
        ]
    return "\n".join(lines)


def plot_frontier(results: Results) -> Figure:
    """Precision against recall: one line per arm, guidance scales beside the points, intervals in faint."""
    figure, axes = _figure("Precision against recall by guidance_scale, with 95% intervals")
    for index, arm in enumerate(results.arms):
        rows = results.of(arm)
        recall, precision = [row.recall.value for row in rows], [row.precision.value for row in rows]
        (line,) = axes.plot(recall, precision, marker="o", markersize=5, linewidth=1.5, label=arm)
        axes.errorbar(
            recall,
            precision,
            xerr=_reach([row.recall for row in rows]),
            yerr=_reach([row.precision for row in rows]),
            fmt="none",
            ecolor=line.get_color(),
            elinewidth=0.8,
            alpha=0.35,
        )
        side = 1 if index % 2 == 0 else -1  # arms often nearly coincide: write on either side
        for row, x, y in zip(rows, recall, precision, strict=True):
            axes.annotate(
                f"{row.guidance_scale:g}",
                (x, y),
                xytext=(5 * side, 5 * side),
                textcoords="offset points",
                ha="left" if side > 0 else "right",
                va="bottom" if side > 0 else "top",
                color=line.get_color(),
                fontsize=8,
            )
    axes.margins(0.1)
    axes.set(xlabel="recall", ylabel="precision")
    axes.legend(frameon=False)
    return figure


def plot_accuracy(results: Results) -> Figure:
    """Accuracy against guidance_scale: one line per arm, 95% intervals as bands."""
    figure, axes = _figure("Accuracy, with 95% intervals")
    for arm in results.arms:
        rows = sorted(results.of(arm), key=lambda row: row.guidance_scale)
        scales, means = [row.guidance_scale for row in rows], [row.means[results.accuracy] for row in rows]
        (line,) = axes.plot(scales, [100 * mean.value for mean in means], marker="o", markersize=5, label=arm)
        low, high = [100 * mean.low for mean in means], [100 * mean.high for mean in means]
        axes.fill_between(scales, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="guidance_scale (omega + 1)", ylabel="accuracy (%)")
    axes.legend(frameon=False)
    return figure


def comparison_grid(results: Results) -> Image.Image:
    """The first cases: every arm side by side at its own best scale, from the same seed, over the prompt."""
    best = [results.best(arm) for arm in results.arms]
    stacks = [to_pil(results.pictures[row.arm, row.guidance_scale]) for row in best]
    tiles = [_side_by_side(pictures) for pictures in zip(*stacks, strict=True)]
    columns = max(1, min(len(tiles), PAGE_WIDTH // (tiles[0].width + 2 * MARGIN)))
    title = "   |   ".join(f"{row.arm}, guidance_scale {row.guidance_scale:g}" for row in best)
    return image_grid(tiles, columns, [case.prompt for case in results.cases], title=f"Left to right:   {title}")


def _side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """PIL images of one size in a row, with a white gap so that equal backgrounds do not run together."""
    width, height = pictures[0].size
    row = Image.new("RGB", (len(pictures) * (width + GAP) - GAP, height), "white")
    for i, picture in enumerate(pictures):
        row.paste(picture, (i * (width + GAP), 0))
    return row


def _figure(title: str) -> tuple[Figure, Axes]:
    # A Figure of its own, not pyplot: no global state, and no display is ever looked for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.2), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _reach(intervals: Sequence[Interval]) -> list[list[float]]:
    """Distances (2, n) from the estimates to the lower and upper ends, as matplotlib takes them."""
    # The percentiles of a skewed sample may leave the estimate just outside.
    below = [max(0.0, interval.value - interval.low) for interval in intervals]
    above = [max(0.0, interval.high - interval.value) for interval in intervals]
    return [below, above]


def _rows_table(results: Results) -> tuple[list[str], list[list[str]]]:
    measures = [results.accuracy, *(name for name in results.rows[0].means if name != results.accuracy)]
    titles = ["accuracy", *(name.replace("_", " ") for name in measures[1:])]
    overlap = ["precision", "density", "recall", "coverage"]

    def cells(row: Row) -> list[str]:
        held_out = "none" if row.held_out is None else _plain(row.held_out)
        means = [_plain(row.means[name]) for name in measures]
        scored = [f"{row.frechet:.2f}", *(_plain(getattr(row, name)) for name in overlap)]
        return [row.arm, f"{row.guidance_scale:g}", means[0], held_out, *means[1:], *scored]

    head = ["arm", "guidance_scale", titles[0], "accuracy, held-out pairs", *titles[1:], "Frechet distance", *overlap]
    return head, [cells(row) for row in results.rows]


def _comparison_table(results: Results, arm: str) -> tuple[list[str], list[list[str]]]:
    chosen = [comparison for comparison in results.comparisons if comparison.arm == arm]
    best = results.verdict(arm).best
    head = ["guidance_scale", f"{results.baseline}'s guidance_scale", "which"]
    head += [f"wins, {name.replace('_', ' ')}" for name in best.wins]
    shown = [results.accuracy, "precision", "recall"]
    head += [f"difference, {'accuracy' if name == results.accuracy else name}" for name in shown]
    rows = []
    for pair in chosen:
        which = ["best of each"] * (pair == best)
        which += ["equal scales"] * (pair.guidance_scale == pair.baseline_guidance_scale)
        row = [f"{pair.guidance_scale:g}", f"{pair.baseline_guidance_scale:g}", ", ".join(which)]
        row += [_plain(win) for win in pair.wins.values()]
        rows.append(row + [_signed(pair.differences[name]) for name in shown])
    return head, rows


def _frontier_table(results: Results, arm: str) -> tuple[list[str], list[list[str]]]:
    gains = {gain.guidance_scale: _signed(gain.recall) for gain in results.recall_gains_of(arm)}
    rows = []
    for point in results.frontier(arm):
        scales = ", ".join(f"{scale:g}" for scale in point.dominated_by)
        dominated = f"{point.opponent} at {scales}" if scales else "none"
        gain = gains[point.guidance_scale] if point.arm == arm else ""
        rows.append([point.arm, f"{point.guidance_scale:g}", dominated, gain])
    return ["arm", "guidance_scale", "dominated by", "recall gained at equal precision"], rows


def _reach_text(results: Results, arm: str, measure: str) -> str | None:
    """Where arm and baseline reach highest in a measure, each at its own scale."""
    comparison = results.reach(arm, measure)
    if comparison is None:
        return None
    ours, theirs = results.highest(arm, measure), results.highest(results.baseline, measure)
    difference = comparison.differences[measure]
    word = "a gain" if difference.above(0) else "a loss" if difference.below(0) else "no difference shown"
    return (
        f"Highest {measure.replace('_', ' ')} with at least {ACCURATE:.0%} accuracy: {arm} "
        f"{ours.means[measure].value:.3f} at {ours.guidance_scale:g}, {results.baseline} "
        f"{theirs.means[measure].value:.3f} at {theirs.guidance_scale:g}: {_signed(difference)} ({word})."
    )


def _wins_text(comparison: Comparison) -> str:
    texts = []
    for name, win in comparison.wins.items():
        shown = "better" if win.above(0.5) else "worse" if win.below(0.5) else "no difference shown"
        texts.append(f"{_percent(win)} on {name.replace('_', ' ')} ({shown})")
    return "it wins " + ", ".join(texts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plain(interval: Interval) -> str:
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _signed(interval: Interval) -> str:
    return f"{interval.value:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def _percent(interval: Interval) -> str:
    return f"{100 * interval.value:.0f}% [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"

"""The pictures of a report: two plots, and a page of the first cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

from selfnpo_fast.runtime.images import MARGIN, image_grid, to_pil
from selfnpo_fast.scoring.intervals import Interval
from selfnpo_fast.scoring.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GAP = 3
"""Pixels between the arms' pictures of one prompt."""
PAGE_WIDTH = 1000
"""Pixels, about."""


def plot_frontier(results: Results) -> Figure:
    """Precision against recall: one line per arm, with guidance scales and faint intervals.

    The sweep must have measured precision and recall.
    """
    figure, axes = _figure("Precision against recall by guidance_scale, with 95% intervals")
    for index, arm in enumerate(results.arms):
        rows = results.of(arm)
        recalls = [row.sets[results.roles.recall] for row in rows]
        precisions = [row.sets[results.roles.precision] for row in rows]
        recall, precision = [interval.value for interval in recalls], [interval.value for interval in precisions]
        (line,) = axes.plot(recall, precision, marker="o", markersize=5, linewidth=1.5, label=arm)
        axes.errorbar(
            recall,
            precision,
            xerr=_error_bars(recalls),
            yerr=_error_bars(precisions),
            fmt="none",
            ecolor=line.get_color(),
            elinewidth=0.8,
            alpha=0.35,
        )
        # Arms often nearly coincide: their labels stand on either side.
        side = 1 if index % 2 == 0 else -1
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
        scales, means = [row.guidance_scale for row in rows], [row.means[results.roles.accuracy] for row in rows]
        (line,) = axes.plot(scales, [100 * mean.value for mean in means], marker="o", markersize=5, label=arm)
        low, high = [100 * mean.low for mean in means], [100 * mean.high for mean in means]
        axes.fill_between(scales, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="guidance_scale (omega + 1)", ylabel="accuracy (%)")
    axes.legend(frameon=False)
    return figure


def comparison_grid(results: Results) -> Image.Image:
    """The first cases: the arms side by side, each at its best scale, over the prompt."""
    rows = [results.representative(arm) for arm in results.arms]
    stacks = [to_pil(results.pictures[row.arm, row.guidance_scale]) for row in rows]
    tiles = [_side_by_side(pictures) for pictures in zip(*stacks, strict=True)]
    columns = max(1, min(len(tiles), PAGE_WIDTH // (tiles[0].width + 2 * MARGIN)))
    title = "   |   ".join(f"{row.arm}, guidance_scale {row.guidance_scale:g}" for row in rows)
    return image_grid(tiles, columns, [case.prompt for case in results.cases], title=f"Left to right:   {title}")


def _side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """PIL images of one size in a row, with white gaps between them."""
    width, height = pictures[0].size
    joined = Image.new("RGB", (len(pictures) * (width + GAP) - GAP, height), "white")
    for i, picture in enumerate(pictures):
        joined.paste(picture, (i * (width + GAP), 0))
    return joined


def _figure(title: str) -> tuple[Figure, Axes]:
    # `Figure` instead of pyplot: no global state, and no display is ever looked for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.2), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _error_bars(intervals: Sequence[Interval]) -> list[list[float]]:
    """Distances (2, n) from the estimates to the lower and upper ends, as matplotlib takes them."""
    # The percentiles of a skewed sample may leave the estimate just outside.
    below = [max(0.0, interval.value - interval.low) for interval in intervals]
    above = [max(0.0, interval.high - interval.value) for interval in intervals]
    return [below, above]

"""The report of a sweep: JSON, Markdown and a brief text.

Its words claim no more than the intervals show. What rests on set measures that a sweep did not
have (frontier, gains, best scales) is left out.
"""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfnpo_fast.runtime.folders import whole_file, write_file
from selfnpo_fast.scoring.intervals import Interval
from selfnpo_fast.scoring.plots import comparison_grid, plot_accuracy, plot_frontier
from selfnpo_fast.scoring.results import ACCURATE, Comparison, Results, Row, Verdict

SCALE_NOTE = "guidance_scale is diffusers' and equals omega + 1."
BRIEF_ROWS = 6
"""The most rows that a brief report shows; of more it shows one per arm."""
TITLES = {"frechet": "Frechet distance"}
"""What reports call a measure, where that is not its name with spaces for underscores."""


def write_report(results: Results, folder: Path, config: Mapping[str, Any]) -> dict[str, Path]:
    """Writes the report's files into `folder`; returns their paths by name.

    They are report.json, report.md, frontier.png, accuracy.png and grid.png. `config` is stored as
    given and must fit into JSON. There is no frontier.png without precision
    and recall.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = ["report.json", "report.md", "frontier.png", "accuracy.png", "grid.png"]
    if not results.has_frontier:
        names.remove("frontier.png")
    paths = {name: folder / name for name in names}
    record = json.dumps(as_json(results, config), indent=1, allow_nan=False)
    write_file(paths["report.json"], record + "\n")
    write_file(paths["report.md"], markdown(results, config))
    plots = {"accuracy.png": plot_accuracy} | ({"frontier.png": plot_frontier} if results.has_frontier else {})
    for name, plot in plots.items():
        with whole_file(paths[name]) as file:
            plot(results).savefig(file, format="png")
    with whole_file(paths["grid.png"]) as file:
        comparison_grid(results).save(file, format="PNG")
    return paths


def as_json(results: Results, config: Mapping[str, Any]) -> dict[str, Any]:
    """Everything but the pictures."""
    record = {
        "config": dict(config),
        "note": SCALE_NOTE,
        "baseline": results.baseline,
        "accuracy": results.roles.accuracy,
        "rows": [row.record() for row in results.rows],
        "comparisons": [dataclasses.asdict(comparison) for comparison in results.comparisons],
    }
    if results.has_frontier:
        record["recall_gains"] = [dataclasses.asdict(gain) for gain in results.recall_gains]
        record["frontier"] = {
            arm: [dataclasses.asdict(point) for point in results.frontier(arm)] for arm in results.challengers
        }
    return record | {"verdicts": {arm: _verdict_json(results, arm) for arm in results.challengers}}


def _verdict_json(results: Results, arm: str) -> dict[str, Any]:
    """The verdict without the fields that the sweep cannot fill."""
    verdict = results.verdict(arm)
    record = dataclasses.asdict(verdict) | {"gain": verdict.gain, "statements": statements(results, arm)}
    return {key: value for key, value in record.items() if value is not None}


def markdown(results: Results, config: Mapping[str, Any]) -> str:
    """The report as GitHub-flavoured Markdown."""
    images = results.rows[0].images
    others = " and ".join(f"`{arm}`" for arm in results.challengers) or "nothing"
    parts = [
        "# Evaluation",
        f"`{results.baseline}` (plain guidance) against {others}: {images} pictures per row, the same prompts and "
        f"seeds in every row. {SCALE_NOTE} {_interval_note(results)}",
    ]
    for arm in results.challengers:
        if lines := statements(results, arm):
            parts += [f"## Verdict on `{arm}`", "\n".join(f"- {line}" for line in lines)]
    parts += ["## All points", _table(*_rows_table(results))]
    for arm in results.challengers:
        parts += _pairs_section(results, arm)
        if results.has_frontier:
            parts += _frontier_section(results, arm)
    if results.has_frontier:
        parts += ["![Precision against recall](frontier.png)"]
    parts += ["![Accuracy against guidance_scale](accuracy.png)"]
    parts += [f"![The first prompts, every arm at its {_representative_word(results)}](grid.png)"]
    parts += ["## Configuration", "```json\n" + json.dumps(dict(config), indent=1) + "\n```"]
    return "\n\n".join(parts) + "\n"


def _interval_note(results: Results) -> str:
    """What the brackets mean, for the head of the page."""
    over_real = " and ".join(map(_title, results.over_real))
    exception = f" ({over_real}: over real pictures)" if over_real else ""
    return (
        f"Brackets are 95% bootstrap intervals over prompts{exception}, each for itself: "
        "among many comparisons some exclude zero by chance."
    )


def _pairs_section(results: Results, arm: str) -> list[str]:
    return [
        f"## `{arm}` against `{results.baseline}`, pair by pair",
        "Wins are the share of pairs in which the arm scores higher, ties counted half; differences are arm minus "
        f"`{results.baseline}`. A negative changes the effective guidance, so equal scales are no fair comparison "
        "by themselves; every scale is held against every scale.",
        _table(*_comparison_table(results, arm)),
    ]


def _frontier_section(results: Results, arm: str) -> list[str]:
    return [
        "### Frontier",
        "A point is dominated by one that has no less precision and recall, and more of one (estimates, without "
        f"intervals). The gain is recall over `{results.baseline}` of at least equal precision, its scales joined "
        "by straight lines: sliding along these is what more guidance does anyway. Above the highest precision of "
        f"`{results.baseline}` it is taken over that point. A gain is claimed where its interval is above zero and "
        f"the point dominates one of `{results.baseline}`'s frontier.",
        _table(*_frontier_table(results, arm)),
    ]


def statements(results: Results, arm: str) -> list[str]:
    """What the sweep shows of an arm, the bottom line first. Says "no gain" where it shows none."""
    verdict = results.verdict(arm)
    return [
        *_gain_lines(results, verdict),
        *_trade_lines(results, verdict),
        *(line for measure in results.roles.compared if (line := _reach_text(results, arm, measure))),
        *_best_lines(results, verdict),
    ]


def _gain_lines(results: Results, verdict: Verdict) -> list[str]:
    """The bottom line, and what it rests on; nothing without precision and recall."""
    if verdict.gains is None:
        return []
    arm, base = verdict.arm, results.baseline
    points = [point for point in results.frontier(arm) if point.arm == arm]
    dominated = sum(bool(point.dominated_by) for point in points)
    most = max(verdict.gains or results.recall_gains_of(arm), key=lambda gain: gain.recall.value)
    if verdict.gain:
        frontier = (
            f"Frontier: gain. {_signed(most.recall)} recall over {base} at equal precision "
            f"(at {most.guidance_scale:g})."
        )
    else:
        frontier = (
            f"Frontier: no gain shown. At most {_signed(most.recall)} recall over {base} at equal precision "
            f"(at {most.guidance_scale:g}); {base} dominates {dominated} of {len(points)} points."
        )
    return [
        f"{arm}: {'a gain' if verdict.gain else 'no gain'} in precision and recall over plain "
        "guidance at all scales tried.",
        frontier,
    ]


def _trade_lines(results: Results, verdict: Verdict) -> list[str]:
    """One line for each scale with more precision than the baseline has anywhere."""
    base, roles = results.baseline, results.roles
    lines = []
    for scale in verdict.beyond_reach or []:
        row = next(row for row in results.of(verdict.arm) if row.guidance_scale == scale)
        precision, recall = row.value(roles.precision), row.value(roles.recall)
        highest = max(other.value(roles.precision) for other in results.of(base))
        lines.append(
            f"At {scale:g} its precision {precision:.3f} (recall {recall:.3f}) is above {base}'s "
            f"at any scale tried (at most {highest:.3f}): a trade, not a gain by itself."
        )
    return lines


def _reach_text(results: Results, arm: str, measure: str) -> str | None:
    """Where arm and baseline reach highest in a measure, each at its best scale for it."""
    comparison = results.reach(arm, measure)
    if comparison is None:
        return None
    ours, theirs = results.highest(arm, measure), results.highest(results.baseline, measure)
    difference = comparison.differences[measure]
    word = "a gain" if difference.above(0) else "a loss" if difference.below(0) else "no difference shown"
    return (
        f"Highest {_title(measure)} with at least {ACCURATE:.0%} accuracy: {arm} "
        f"{ours.means[measure].value:.3f} at {ours.guidance_scale:g}, {results.baseline} "
        f"{theirs.means[measure].value:.3f} at {theirs.guidance_scale:g}: {_signed(difference)} ({word})."
    )


def _best_lines(results: Results, verdict: Verdict) -> list[str]:
    """One line on the best scales; nothing without a distance."""
    best = verdict.best
    if best is None:
        return []
    arm, base, distance = verdict.arm, results.baseline, results.roles.distance
    wins = f"; {_wins_text(best)}" if best.wins else ""
    line = (
        f"Best scales by {_title(distance)}, chosen on these pictures: "
        f"{arm} {best.guidance_scale:g} ({results.best(arm).value(distance):.2f}), "
        f"{base} {best.baseline_guidance_scale:g} ({results.best(base).value(distance):.2f}){wins}."
    )
    if best.wins and verdict.unbeaten:
        scales = ", ".join(f"{scale:g}" for scale in verdict.unbeaten)
        line += f" No clear win against {base} at {scales}."
    return [line]


def _wins_text(comparison: Comparison) -> str:
    """On which compared measures the arm wins, as the end of a sentence."""
    texts = []
    for name, win in comparison.wins.items():
        word = "better" if win.above(0.5) else "worse" if win.below(0.5) else "no difference shown"
        texts.append(f"{_percent(win)} on {_title(name)} ({word})")
    return "it wins " + ", ".join(texts)


def brief(results: Results) -> str:
    """About 15 lines of text at most: the rows (one per arm where there are many), and verdicts."""
    few = len(results.rows) <= BRIEF_ROWS
    rows = results.rows if few else [results.representative(arm) for arm in results.arms]
    first = f"{results.rows[0].images} pictures per row, same prompts and seeds; {SCALE_NOTE}"
    if not few:
        first += f" Each arm at its {_representative_word(results).removesuffix(' scale')}:"
    cells = _brief_cells(results, rows)
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [first]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    for arm in results.challengers:
        verdict = results.verdict(arm)
        headline, details = _gain_lines(results, verdict)[:1], _gain_lines(results, verdict)[1:]
        lines += headline
        lines += [
            line
            for text in [*details, *_best_lines(results, verdict)]
            for line in textwrap.wrap(text, 110, initial_indent="  ", subsequent_indent="    ")
        ]
    return "\n".join(lines)


def _brief_cells(results: Results, rows: Sequence[Row]) -> list[list[str]]:
    """Head and lines of the brief report's table."""
    roles = results.roles
    cells = [["arm", "guidance_scale", "accuracy"]]
    cells += [[row.arm, f"{row.guidance_scale:g}", _plain(row.means[roles.accuracy])] for row in rows]
    columns = []
    if roles.distance is not None:
        # The column is narrow.
        title = _title(roles.distance).removesuffix(" distance")
        columns.append([title, *(f"{row.value(roles.distance):.2f}" for row in rows)])
    if results.has_frontier:
        columns.append(["precision", *(f"{row.value(roles.precision):.3f}" for row in rows)])
        columns.append(["recall", *(f"{row.value(roles.recall):.3f}" for row in rows)])
    return [line + [column[i] for column in columns] for i, line in enumerate(cells)]


def _representative_word(results: Results) -> str:
    """How `Results.representative` chooses a scale."""
    return "best scale" if results.roles.distance is not None else "most accurate scale"


def _rows_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table of all rows: accuracy, picture measures, set measures."""
    accuracy = results.roles.accuracy
    others = [name for name in results.rows[0].means if name != accuracy]
    sets = list(results.rows[0].sets)

    def cells(row: Row) -> list[str]:
        held_out = "none" if row.held_out is None else _plain(row.held_out)
        means = [_plain(row.means[name]) for name in others]
        compared = [_plain(value) if isinstance(value, Interval) else f"{value:.2f}" for value in row.sets.values()]
        return [row.arm, f"{row.guidance_scale:g}", _plain(row.means[accuracy]), held_out, *means, *compared]

    head = ["arm", "guidance_scale", "accuracy", "accuracy, held-out pairs", *map(_title, [*others, *sets])]
    return head, [cells(row) for row in results.rows]


def _comparison_table(results: Results, arm: str) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table of an arm's scales against the baseline's."""
    roles, best = results.roles, results.verdict(arm).best
    differences = {roles.accuracy: "accuracy"}
    if results.has_frontier:
        differences |= {roles.precision: "precision", roles.recall: "recall"}
    head = ["guidance_scale", f"{results.baseline}'s guidance_scale", "which"]
    head += [f"wins, {_title(name)}" for name in roles.compared]
    head += [f"difference, {title}" for title in differences.values()]
    lines = []
    for pair in results.comparisons:
        if pair.arm != arm:
            continue
        which = ["best of each"] * (pair == best)
        which += ["equal scales"] * (pair.guidance_scale == pair.baseline_guidance_scale)
        line = [f"{pair.guidance_scale:g}", f"{pair.baseline_guidance_scale:g}", ", ".join(which)]
        line += [_plain(win) for win in pair.wins.values()]
        lines.append(line + [_signed(pair.differences[name]) for name in differences])
    return head, lines


def _frontier_table(results: Results, arm: str) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table of who dominates whom, and of recall gained."""
    gains = {gain.guidance_scale: _signed(gain.recall) for gain in results.recall_gains_of(arm)}
    lines = []
    for point in results.frontier(arm):
        scales = ", ".join(f"{scale:g}" for scale in point.dominated_by)
        dominated = f"{point.opponent} at {scales}" if scales else "none"
        gain = gains[point.guidance_scale] if point.arm == arm else ""
        lines.append([point.arm, f"{point.guidance_scale:g}", dominated, gain])
    return ["arm", "guidance_scale", "dominated by", "recall gained at equal precision"], lines


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def _title(name: str) -> str:
    """What reports call a measure."""
    return TITLES.get(name, name.replace("_", " "))


def _plain(interval: Interval) -> str:
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _signed(interval: Interval) -> str:
    return f"{interval.value:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def _percent(interval: Interval) -> str:
    return f"{100 * interval.value:.0f}% [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"

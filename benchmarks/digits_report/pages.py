"""The digits report as a page: tables, plots and pictures from the records in digits.json.

An arm's record is what `report.Report` keeps of it; `arms` is a mapping of all records by arm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.digits_report.painter import BASE, PROMPTS, STEPS, Painter
from benchmarks.digits_report.recipes import CONFIRMATION_SEEDS, RECIPES, SHIPPED, START, TRAINING_SEEDS
from selfnpo_fast.runtime.images import image_grid, to_pil
from selfnpo_fast.scoring.digits.measures import ROLES, Realness
from selfnpo_fast.scoring.digits.scorer import FittedScorer
from selfnpo_fast.scoring.plots import plot_frontier
from selfnpo_fast.scoring.results import Results, Row

FINDINGS = Path(__file__).parent / "findings.md"
"""What a person read from the numbers; everything else on the page is made from the numbers."""

GROUPS = {
    "modes": ["continuous", "lockstep", "full", "naive"],
    "guidance": ["continuous", "w = 0", "w = -3", "w = -5"],
    "controls": ["continuous", "frozen", "shuffled", "dropout .1", "dropout .5"],
    "data": ["continuous", "data", "data, same prompt", "authors"],
    "prompts": ["continuous", "continuous, same prompt", "w = -5", "w = -5, same prompt"],
}
"""Arms that share a frontier plot, by the plot's name."""
PAIRS = 12
"""Pairs of pictures on each page of extremes."""


def results_of(arms: Mapping[str, Mapping], names: Sequence[str], base: str = BASE) -> Results:
    """Rows of the arms `names` and of the baseline (record `base`), for the plots of `scoring`.

    The baseline keeps only the scales that other arms have.
    """
    rows = [Row.from_record(record) for name in (base, *names) for record in arms[name]["rows"]]
    shared = {row.guidance_scale for row in rows if row.arm != BASE}
    rows = [row for row in rows if row.arm != BASE or row.guidance_scale in shared]
    return Results(
        baseline=BASE,
        roles=ROLES,
        over_real=(),
        rows=rows,
        comparisons=[],
        recall_gains=[],
        cases=[],
        pictures={},
    )


def _signed(record: Mapping[str, float]) -> str:
    return f"{record['value']:+.3f} [{record['low']:+.3f}, {record['high']:+.3f}]"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def _summary(arms: Mapping[str, Mapping]) -> str:
    """The table of all arms against plain guidance, one line per arm."""
    rows = []
    base = min(arms[BASE]["rows"], key=lambda row: row["frechet"])
    for name, record in arms.items():
        if name.startswith(BASE) or name == SHIPPED:
            continue
        best = min(record["rows"], key=lambda row: row["frechet"])
        cells = [f"`{name}`", str(record["updates"])]
        for measure in ("realness", "digit_log_prob"):
            reach = record["reach"].get(measure)
            seeds = ", ".join(f"{value:+.3f}" for value in reach["by_seed"]) if reach else ""
            cells += [f"{_signed(reach['difference'])} at {reach['guidance_scale']:g} ({seeds})" if reach else "none"]
        cells += [f"{best['frechet']:.2f} at {best['guidance_scale']:g}"]
        cells += [f"{_signed(record['recall_gain'])} at {record['recall_gain']['guidance_scale']:g}"]
        rows.append([*cells, "yes" if record["gain"] else "no"])
    head = ["arm", "updates", "highest realness", "highest digit log-probability", "lowest Frechet", "most recall"]
    plain = f"Plain guidance: lowest Frechet {base['frechet']:.2f} at {base['guidance_scale']:g}."
    return _table([*head, "gain in precision and recall"], rows) + "\n\n" + plain


def _against(arms: Mapping[str, Mapping]) -> str:
    """The table of differences to `continuous` at equal scale."""
    rows = []
    for name, record in arms.items():
        for scale in ("1.5", "2", "3"):
            if scale in record.get("against", {}):
                cells = [_signed(record["against"][scale][key]) for key in ("realness", "digit_log_prob")]
                rows.append([f"`{name}`", scale, *cells])
    return _table(["arm", "guidance_scale", "realness", "digit log-probability"], rows)


def _recipes(arms: Mapping[str, Mapping]) -> str:
    """The table of what each arm is."""
    rows = []
    for name, recipe in RECIPES.items():
        if name in arms:
            changes = ", ".join(f"`{key} {value}`" for key, value in recipe.changes.items()) or "none"
            rows.append([f"`{name}`", recipe.what, changes])
    return _table(["arm", "what", "changes to the starting point"], rows)


def _points(arms: Mapping[str, Mapping]) -> str:
    """The table of every arm at every scale."""
    head = ["arm", "guidance_scale", "accuracy", "colour", "digit log-prob", "realness", "Frechet"]
    head += ["precision", "density", "recall", "coverage"]
    rows = []
    for name, record in arms.items():
        for row in record["rows"]:
            means = [row["means"][key] for key in ("digit_correct", "colour_match", "digit_log_prob", "realness")]
            overlap = [row[key] for key in ("precision", "density", "recall", "coverage")]
            cells = [*(f"{mean['value']:.3f}" for mean in means), f"{row['frechet']:.2f}"]
            cells += [f"{value['value']:.3f}" for value in overlap]
            rows.append([f"`{name}`", f"{row['guidance_scale']:g}", *cells])
    return _table(head, rows)


def plot_gains(arms: Mapping[str, Mapping]) -> Figure:
    """Every arm's highest realness minus plain guidance's: an interval, and a dot per seed."""
    reaches = {name: record.get("reach", {}).get("realness") for name, record in arms.items() if name != SHIPPED}
    chosen = {name: reach for name, reach in reaches.items() if reach}
    figure = Figure(figsize=(7, 0.34 * len(chosen) + 1.2), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    for height, reach in enumerate(reversed(chosen.values())):
        difference = reach["difference"]
        (line,) = axes.plot([difference["low"], difference["high"]], [height, height], linewidth=2, alpha=0.6)
        axes.plot(difference["value"], height, "|", markersize=12, color=line.get_color())
        axes.plot(reach["by_seed"], [height] * len(reach["by_seed"]), "o", markersize=4, color=line.get_color())
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(chosen)), list(reversed(chosen)), fontsize=8)
    axes.set_title("Highest realness, difference to plain guidance (95% interval; dots: training seeds)", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    return figure


def extreme_pairs(painter: Painter, record: Mapping, scorer: FittedScorer) -> tuple[Image.Image, Image.Image]:
    """Two pages: the pictures that gained most realness, and those that lost most.

    `record` is the shipped config's. In each pair plain guidance is on the left and the negative on
    the right, from the same seed.
    """
    reach = record["reach"]["realness"]
    scales = {SHIPPED: reach["guidance_scale"], BASE: reach["base_guidance_scale"]}
    images = {arm: painter.all_of(arm, scale) for arm, scale in scales.items()}
    prompts = [case.prompt for case in painter.cases]
    realness = {arm: Realness(scorer).score(stack, prompts) for arm, stack in images.items()}
    order = (realness[SHIPPED] - realness[BASE]).argsort()
    title = f"left: plain guidance at {scales[BASE]:g}; right: with the negative at {scales[SHIPPED]:g}"
    pages = []
    for heading, chosen in (("most realness gained", order.flip(0)[:PAIRS]), ("most realness lost", order[:PAIRS])):
        tiles, captions = [], []
        for i in chosen.tolist():
            left, right = to_pil(torch.stack([images[BASE][i], images[SHIPPED][i]]))
            tile = Image.new("RGB", (left.width * 2 + 3, left.height), "white")
            tile.paste(left, (0, 0))
            tile.paste(right, (left.width + 3, 0))
            tiles.append(tile)
            values = f"{realness[BASE][i]:.2f} to {realness[SHIPPED][i]:.2f}"
            captions.append(f"{painter.cases[i].prompt} ({values})")
        pages.append(image_grid(tiles, 4, captions, title=f"{heading}; {title}"))
    return pages[0], pages[1]


def _confirmed(arms: Mapping[str, Mapping]) -> list[str]:
    """The section on the shipped config; nothing where it was not measured."""
    if SHIPPED not in arms:
        return []
    record = arms[SHIPPED]
    seeds = ", ".join(f"{value:+.3f}" for value in record["reach"]["realness"]["by_seed"])
    return [
        "## The shipped config, judged afresh",
        "`configs/digits.yaml` was chosen from the arms below. Judged on the same pictures it would be flattered, so "
        f"it was trained again with other seeds ({', '.join(map(str, CONFIRMATION_SEEDS))}) and drew other pictures, "
        "as did plain guidance.",
        "\n".join(f"- {line}" for line in record["statements"]),
        f"Realness by training seed: {seeds}.",
        "![Precision against recall of the shipped config](digits/shipped.png)",
        "![Pairs that gained most realness](digits/best_pairs.png)",
        "![Pairs that lost most realness](digits/worst_pairs.png)",
    ]


def markdown(arms: Mapping[str, Mapping], calibration: Mapping[str, Mapping[str, float]]) -> str:
    """The whole page. `calibration` is what `recipes.calibrate` measured."""
    return "\n\n".join(part for part in (*_head(arms), *_confirmed(arms), *_body(arms, calibration)) if part) + "\n"


def _head(arms: Mapping[str, Mapping]) -> list[str]:
    images = arms[BASE]["rows"][0]["images"]
    return [
        "# The digits report",
        "Does a Self-NPO negative help the embedded digits model, and what does the help come from? Every arm was "
        f"trained with {len(TRAINING_SEEDS)} seeds and drew {images} pictures per guidance scale: the {PROMPTS} "
        f"prompts once for each training seed, from the same noise in all arms, in {STEPS} DPM-Solver++ steps. "
        "guidance_scale is diffusers' (omega + 1). Brackets are 95% bootstrap intervals over prompts (recall: over "
        "real pictures), each for itself: among many some exclude zero by chance. What the training seeds give one by "
        "one stands in parentheses. Made by `make report`.",
        FINDINGS.read_text(encoding="utf-8").strip() if FINDINGS.exists() else "",
    ]


def _body(arms: Mapping[str, Mapping], calibration: Mapping[str, Mapping[str, float]]) -> list[str]:
    per_update = ", ".join(f"{name} {value:.2f} s" for name, value in calibration["seconds per update"].items())
    return [
        "## All arms against plain guidance",
        "Highest realness and log-probability: each arm at its best scale against plain guidance at its own best, "
        "among scales with at least 95% accuracy. Most recall: what the arm's best point has over plain guidance of at "
        "least equal precision. Arms that name `same prompt` give the negative branch the positive's prompt instead of "
        "the empty one.",
        _summary(arms),
        "![Highest realness of every arm](digits/gains.png)",
        "## Each arm against `continuous`, at the same scale",
        _against(arms),
        "## Equal pairs and equal seconds",
        "Arms train on as many pairs as `continuous`, those named `equal seconds` for as long instead, the start-up "
        f"pass of continuous rollouts included. Measured per update of 64 pairs, one thread, modes in turn: "
        f"{per_update}. Lockstep costs as much as full simulation here, since a batch runs until its last sample has "
        "stopped.",
        "## Frontiers",
        *(f"![Precision against recall: {name}](digits/{name}.png)" for name in _complete_groups(arms)),
        "## The arms",
        f"Starting point: `{' '.join(f'--{key} {value}' for key, value in START.items())}`",
        _recipes(arms),
        "<details><summary>All points</summary>",
        _points(arms),
        "</details>",
    ]


def _complete_groups(arms: Mapping[str, Mapping]) -> list[str]:
    """The groups of GROUPS whose arms were all measured."""
    return [group for group, names in GROUPS.items() if all(name in arms for name in names)]


def write_pages(arms: Mapping, calibration: Mapping, results: Path, painter: Painter | None) -> None:
    """Writes digits.md and digits/*.png into the folder `results`.

    Pairs of pictures need the painter of the shipped config; without a painter the pairs on the
    disk stay.
    """
    folder = results / "digits"
    folder.mkdir(parents=True, exist_ok=True)
    for group in _complete_groups(arms):
        plot_frontier(results_of(arms, GROUPS[group])).savefig(folder / f"{group}.png")
    plot_gains(arms).savefig(folder / "gains.png")
    if SHIPPED in arms:
        plot_frontier(results_of(arms, [SHIPPED], f"{BASE}, {SHIPPED}")).savefig(folder / "shipped.png")
        if painter is not None:
            best, worst = extreme_pairs(painter, arms[SHIPPED], FittedScorer.load())
            best.save(folder / "best_pairs.png")
            worst.save(folder / "worst_pairs.png")
    (results / "digits.md").write_text(markdown(arms, calibration), encoding="utf-8")

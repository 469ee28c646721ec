"""docs/models.md, made of the product's tables and of what the tests run.

    python tests/helpers/models_page.py    # writes the page

`tests/project/test_models_page.py` fails where the page differs.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path += [str(Path(__file__).parents[1] / "tools"), str(Path(__file__).parents[2])]

import family_runs
import stock
import tiny_pipelines

from selfnpo_fast.models import FAMILIES, Family
from selfnpo_fast.models.refused import REFUSED

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
PUBLISHED: dict[str, tuple[str, str]] = {}
"""Date and card of a whole run with published weights, by the pipeline's class: none was made."""
TINY = "tiny random network of the real class"

HEAD = """\
# Models

Made by `python tests/helpers/models_page.py` of the families in [models/](../selfnpo_fast/models),
of the refusals there, and of what the tests run.

- **Run with published weights (date, card)**: a whole run was made with the weights that people use.
- **Tiny random network of the real class**: diffusers' own pipeline, denoiser and scheduler classes
  ran here with random weights, on a CPU, and were held to diffusers' own loops. Where a model is
  trained, so did its autoencoder and text encoders.
- **Refused (reason)**: one line says so before any work.

{published}The second level shows that formulas, files and calls are right. It says nothing about memory,
time or what pictures gain ([limits](limits.md)). The gain that was [measured](results.md) is that of
the embedded digits model, a small Stable Diffusion.

## Trained, sampled, merged

*Yes* means that `tests/training/test_family_runs.py` does it: one update is held to a plain loop of
diffusers' scheduler and network, pair by pair; a run of LoRA and one of full weights, from noise
and from data, are sampled from, attached and merged, each against a second network in the stock
pipeline's loop. `tests/training/test_family_ranks.py` kills and resumes runs on two ranks.
[inference.md](inference.md#pipeline-classes) says how the negative branch of a class is told.

"""
HEAD_REFUSED = """
## Refused for training

By the class that a model's `model_index.json` names. A class in neither table is refused without a
reason of its own. So are models that call themselves turbo in their Hub id or their configs, and by
their configs CogVideoX 1.5, Wan2.2-TI2V-5B, and models that take a picture, a mask or a guidance
scale as an input ([limits](limits.md#models-without-weights-here)).

"""


def _title(family: Family) -> str:
    """The model's name: the first sentence of the class's docstring."""
    return (type(family).__doc__ or "").split("\n")[0].split(". ")[0].rstrip(".").split(",")[0]


def _level(family: Family) -> str:
    if family.pipeline_class in PUBLISHED:
        return "run with published weights ({}, {})".format(*PUBLISHED[family.pipeline_class])
    return TINY


def _attached(family: Family) -> str:
    """The classes that a negative is attached to, each of which a test attaches one to."""
    tested = {*stock.classes(), *tiny_pipelines.CLASSES}
    untested = [name for name in family.guided_pipelines if name not in tested]
    assert not untested, f"no test attaches a negative to {', '.join(untested)}"
    stem = family.pipeline_class.removesuffix("Pipeline")
    assert all(name.startswith(stem) for name in family.guided_pipelines)
    kinds = [name.removeprefix(stem).removesuffix("Pipeline") for name in family.guided_pipelines]
    return ", ".join(kind or "itself" for kind in kinds)


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))


def page() -> str:
    """The text of docs/models.md."""
    run = {case.pipeline for case in family_runs.CASES.values()}
    rows = []
    for name, family in FAMILIES.items():
        trained = family.adapter is not None
        assert trained == (name in run), f"family_runs.CASES has to hold the families that are trained: {name}"
        answers = ["yes" if trained else "no"] * 4
        rows.append([_title(family), f"`{name}`", *answers, _attached(family), _level(family)])
    columns = ["model", "pipeline", "LoRA", "full weights", "sampled", "merged", "attached to", "level"]
    reasons: dict[str, list[str]] = {}
    for name, reason in REFUSED.items():
        reasons.setdefault(reason, []).append(name.removesuffix("Pipeline"))
    refused = [[", ".join(names), f"refused ({reason})"] for reason, names in reasons.items()]
    published = "" if PUBLISHED else "No family has been run with published weights so far.\n\n"
    head = HEAD.replace("{published}", published)
    return (
        head
        + _table(columns, rows)
        + HEAD_REFUSED
        + _table(["classes, each with `Pipeline` behind it", "level"], refused)
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

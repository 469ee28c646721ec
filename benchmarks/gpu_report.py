"""The page of `gpu_check.py`: each part's figures beside what was expected, and its problems."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.environment import ROOT
from benchmarks.gpu_figures import Figure, digits, figures_of, problems_of
from benchmarks.gpu_parts import COMPLETE
from selfnpo_fast.runtime.errors import UserError

PAGE = ROOT / "docs" / "gpu.md"
EXPECTED = ROOT / "benchmarks" / "expected.json"

HEAD = """# On a GPU

`python -m benchmarks.gpu_check OUT` measures what a GPU does with this code: the fused operations,
updates at SD1.5's size, pictures, and the tests that need a GPU. It takes nine minutes at most and
needs neither weights nor a network. `--report OUT` writes this page from its results, and nothing
on it is written by hand.
"""
NOTHING = """
Nobody has run it on a GPU so far, so there is no figure here. [limits.md](limits.md) lists what has
never been seen to work.
"""


def read(out: Path, name: str) -> dict:
    """A part's JSON, or the summary's; empty where there is none that can be read."""
    try:
        found = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def part_figures(out: Path, name: str) -> list[Figure]:
    """The figures of one part."""
    return figures_of(read(out, name), read(out, "peaks").get("peaks", {}))


def expected_of(part: str, figure: str, card: str) -> str:
    """What was expected of a figure on this card, as text; "" where nothing was.

    Expected values are those of one kind of card, and of no other.
    """
    content = json.loads(EXPECTED.read_text(encoding="utf-8"))
    found = content["figures"].get(f"{part}.{figure}")
    if found is None or content["card"] not in card:
        return ""
    text = f"at most {digits(found['at_most'])}" if "at_most" in found else f"at least {digits(found['at_least'])}"
    return text + (f" ({found['share_of_peak']:.0%})" if "share_of_peak" in found else "")


def page(out: Path) -> str:
    """The page, from the results in `out`.

    Raises UserError where there is no summary, or where its parts ran on different devices.
    """
    summary = read(out, "summary")
    if not summary:
        raise UserError(f"{out}: there is no summary.json of gpu_check to report; run gpu_check {out} first")
    environment = summary["environment"]
    card = environment["device"]
    for record in summary["parts"]:
        other = read(out, record["name"]).get("environment", {}).get("device", card)
        if other != card:
            raise UserError(
                f"{out}: {record['name']} was measured on {other}, the check on {card}; two cards are never compared"
            )
    lines = [
        HEAD,
        f"All figures are those of one **{card}**, on {environment['date'][:10]}, commit {_commit(environment)}.",
    ]
    versions = read(out, "peaks").get("versions", {})
    if versions:
        lines.append(
            "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items() if version) + "."
        )
    if summary["tiny"]:
        lines.append("**A smoke run on tiny networks: no figure counts.**")
    lines += [
        "A figure is the median of its rounds, with the smallest and the largest in brackets. Shares are",
        "those of the copy and of the bf16 matrix product that the part `peaks` measured on this card.",
        "",
        *_overview(summary["parts"]),
    ]
    for record in summary["parts"]:
        lines += _section(out, record, card)
    return "\n".join(lines).rstrip() + "\n"


def _commit(environment: Mapping) -> str:
    """The commit's short name, and whether the checkout had been changed."""
    commit = environment.get("git_commit")
    if not commit:
        return "unknown"
    return commit[:10] + (" with changes" if environment.get("git_dirty") else "")


def _overview(records: list[dict]) -> Iterator[str]:
    """The table of parts: how each of them ended."""
    yield "| part | what | ended | seconds |"
    yield "| --- | --- | --- | --- |"
    for record in records:
        yield f"| {record['name']} | {record['what']} | {record['status']} | {record['seconds']:.0f} |"


def _section(out: Path, record: Mapping, card: str) -> Iterator[str]:
    """One part: its figures, its problems, and why it ended early."""
    name = record["name"]
    result, figures = read(out, name), part_figures(out, name)
    problems = problems_of(result)
    if not figures and not problems and record["status"] == COMPLETE:
        return
    yield from ("", f"## {name}", "", f"{record['what'][0].upper()}{record['what'][1:]}.")
    if record["status"] != COMPLETE:
        said = f": `{record['said']}`" if record["said"] else ""
        yield from ("", f"**{record['status']}**{said}")
    if figures:
        yield from ("", "| figure | measured | of peak | expected |", "| --- | --- | --- | --- |")
    for figure in figures:
        share = "" if figure.share is None else f"{figure.share:.1%}"
        yield f"| {figure.name} | {figure.text()} | {share} | {expected_of(name, figure.name, card)} |"
    if problems:
        yield from ("", "Failed, or slower than the plain way:", "", *(f"- {problem}" for problem in problems))


def write_page(out: Path) -> Path:
    """Writes the page and returns its path: docs/gpu.md, or gpu.md in `out` for smoke runs and
    CPUs."""
    text, summary = page(out), read(out, "summary")
    measured = not summary["tiny"] and not summary["environment"]["device"].startswith("CPU")
    target = PAGE if measured else out / "gpu.md"
    target.write_text(text, encoding="utf-8")
    return target

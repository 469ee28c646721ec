"""The figures in the first lines of the shipped configs: what `selfnpo doctor` computes for them.

    python -m benchmarks.config_costs             # names the lines whose figures are others
    python -m benchmarks.config_costs --write     # puts the figures there

A line such as

    #   8 x H100 with --engine.accumulation 1: 33.1 GiB each, 0.5 s an update, 0.1 h in all

names a number of cards, the card, and options that the config needs there. What follows the colon
is written here. Nothing is measured, and no weights are needed: benchmarks/configs and
tests/data/shapes have the configs of the networks.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from selfnpo_fast.runtime.command import short_spin

os.environ.update(short_spin())  # before torch is imported

from selfnpo_fast.doctor import costs
from selfnpo_fast.doctor.machines import GPUS, update_seconds
from selfnpo_fast.doctor.report import fits, make_tracer
from selfnpo_fast.train import CONFIGS, parse

NETWORKS = (Path(__file__).parent / "configs", Path(__file__).parents[1] / "tests" / "data" / "shapes")
"""Folders of networks without weights, each named as the config or its beginning."""
CARDS = {"H100": ("H100 SXM 80 GB", 80.0), "24 GB card": ("RTX 4090 24 GB", 24.0)}
"""The machine whose rates count and its memory in GiB, by the words of a config."""
LINE = re.compile(
    rf"^#   (?P<ranks>\d+) x (?P<card>{'|'.join(CARDS)})(?: with (?P<options>--[^:]+))?: (?P<figures>.*)$"
)


def network_of(path: Path) -> Path:
    """The folder of a config's network: MODEL for MODEL.yaml, MODEL_lora.yaml and MODEL_paper.yaml.

    Raises LookupError where there is none.
    """
    model = path.stem.removesuffix("_lora").removesuffix("_paper")
    for folder in NETWORKS:
        if (folder / model).is_dir():
            return folder / model
    raise LookupError(f"{path.name}: no network {model} in {' or '.join(map(str, NETWORKS))}")


def figures_of(path: Path) -> Callable[[re.Match], str]:
    """A function that gives the figures of one line of a config; its lines share their traces."""
    words = ["--config", str(path), "--model.path", str(network_of(path))]
    if "start: data" in path.read_text(encoding="utf-8"):
        words += ["--data.source", "digits"]  # it counts pictures only up to data.limit
    tracer = make_tracer(parse(words).config)

    def figures(line: re.Match) -> str:
        name, gib = CARDS[line["card"]]
        (machine,) = [gpu for gpu in GPUS if gpu.name == name]
        config = parse([*words, *(line["options"] or "").split()]).config
        run = tracer.plan(config, int(line["ranks"]), "cuda")
        memory = costs.memory(run)
        peak = f"{memory.peak / costs.GIB:.1f} GiB"
        if not fits(memory, gib):
            return f"does not fit, {peak}"
        seconds = update_seconds(run, machine)
        assert seconds is not None, "every precision has a rate"
        hours = seconds * config.updates / 3600
        each = " each" if run.world_size > 1 else ""
        return f"{peak}{each}, {seconds:.2g} s an update, {hours:.2g} h in all"

    return figures


def recomputed(path: Path) -> str:
    """The text of a config with the figures as they are now."""
    figures, lines = figures_of(path), []
    for text in path.read_text(encoding="utf-8").splitlines():
        line = LINE.match(text)
        lines.append(text if line is None else text[: line.start("figures")] + figures(line))
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    """Compare or write; 1 where a figure is another one and is not written."""
    changed = False
    for path in sorted(CONFIGS.glob("*.yaml")):
        before = path.read_text(encoding="utf-8")
        if not any(LINE.match(text) for text in before.splitlines()):
            continue
        after = recomputed(path)
        for old, new in zip(before.splitlines(), after.splitlines(), strict=True):
            if old != new:
                print(f"{path.name}: {new}", flush=True)
        changed |= after != before
        if "--write" in argv:
            path.write_text(after, encoding="utf-8")
    return int(changed and "--write" not in argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

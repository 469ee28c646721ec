"""What fits which cards, as a table in Markdown. Everything is computed and nothing is measured.

    python -m selfnpo_fast.doctor.fitting configs/sd15.yaml MODEL configs/sd15_lora.yaml MODEL

Each row is a config with the folder of a model, of which config files suffice. A cell has the
memory of a rank, and the options that bring it down to where it fits.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from selfnpo_fast.config import TrainConfig
from selfnpo_fast.doctor.costs import GIB, Tracer
from selfnpo_fast.doctor.report import changes_to_fit, fits, make_tracer
from selfnpo_fast.runtime.options import parse_with_config
from selfnpo_fast.runtime.screen import show

CARDS = ((16, 1), (24, 1), (48, 1), (80, 1), (80, 8))
"""(GiB of a card, number of cards)."""


def fitting_table(rows: Iterable[tuple[str, TrainConfig]], cards: Sequence[tuple[int, int]] = CARDS) -> str:
    """A table with a line for each (name, config) and a column for each of `cards`.

    Raises UserError as `selfnpo doctor` does.
    """
    names = [f"{size} GB" if count == 1 else f"{count} x {size} GB" for size, count in cards]
    lines = [f"| computed | {' | '.join(names)} |", "| --- |" + " --- |" * len(cards)]
    for name, config in rows:
        tracer = make_tracer(config)
        cells = [_cell(tracer, config, size, count) for size, count in cards]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(tracer: Tracer, config: TrainConfig, size: int, count: int) -> str:
    """GiB of a rank on `count` cards of `size` GiB, and the options that it takes to fit."""
    shared = _shared(config, count)
    options, memory = changes_to_fit(tracer, tracer.plan(shared, count, "cuda"), size)
    if not fits(memory, size):
        return f"no: {memory.peak / GIB:.1f}"
    accumulation, name = shared.engine.accumulation, "--engine.accumulation"
    if accumulation != config.engine.accumulation and not any(option.startswith(name) for option in options):
        options = [f"{name} {accumulation}", *options]
    host = sum(memory.host.values())
    words = [f"{memory.peak / GIB:.1f}", *(f"`{option.removeprefix('--')}`" for option in options)]
    return " ".join(words) + (f" (and {host / GIB:.1f} of the host)" if host else "")


def _shared(config: TrainConfig, count: int) -> TrainConfig:
    """The config with the fewest micro-batches that leave each of `count` ranks as many pairs at a
    time as one rank has, or fewer."""
    engine = config.engine
    most = engine.micro_batch(1)
    for steps in range(1, engine.batch_size // count + 1):
        if engine.batch_size % (count * steps) == 0 and engine.batch_size <= most * count * steps:
            return replace(config, engine=replace(engine, accumulation=steps))
    return config


@dataclass(frozen=True, kw_only=True)
class _NoOptions:
    """Print a table of what fits."""


def main(argv: Sequence[str]) -> None:
    """Print the table of pairs of a config and a model."""
    rows = []
    for path, model in zip(argv[::2], argv[1::2], strict=True):
        words = ["--config", path, "--model.path", model]
        rows.append((path, parse_with_config(_NoOptions, TrainConfig, words, "fitting", Path(path)).config))
    show(fitting_table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])

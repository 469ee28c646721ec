"""The tables of what fits which cards in docs/training.md: what `doctor.fitting` computes.

    python -m benchmarks.fitting_page                       # names the rows whose figures are others
    python -m benchmarks.fitting_page --write [CONFIG ...]  # puts the figures there, of all or some

A row begins with the name of a shipped config; what follows it is written here. Nothing is measured,
and no weights are needed, as in `config_costs`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection
from pathlib import Path

from selfnpo_fast.runtime.command import short_spin

os.environ.update(short_spin())  # before torch is imported

from benchmarks.config_costs import network_of
from selfnpo_fast.doctor.fitting import CARDS, fitting_table
from selfnpo_fast.train import CONFIGS, parse

PAGE = Path(__file__).parents[1] / "docs" / "training.md"
ROW = re.compile(r"^\| `(?P<stem>\w+)\.yaml` \| .* \|$")


def row(stem: str) -> str:
    """The row of a config: full weights on the larger cards, a LoRA on all of them."""
    path = CONFIGS / f"{stem}.yaml"
    config = parse(["--config", str(path), "--model.path", str(network_of(path))]).config
    cards = CARDS if config.lora.rank else CARDS[2:]
    return fitting_table([(f"`{path.name}`", config)], cards).splitlines()[-1]


def recomputed(line: str, stems: Collection[str] = ()) -> str:
    """A line of the page with the figures as they are now, where it is the row of one of `stems` or
    of any config."""
    found = ROW.match(line)
    return line if found is None or (stems and found["stem"] not in stems) else row(found["stem"])


def main(argv: list[str]) -> int:
    """Compare or write; 1 where a figure is another one and is not written."""
    stems = [word for word in argv if word != "--write"]
    lines, changed = PAGE.read_text(encoding="utf-8").splitlines(), False
    for place, line in enumerate(lines):
        new = recomputed(line, stems)
        if new == line:
            continue
        print(new, flush=True)
        changed, lines[place] = True, new
        if "--write" in argv:
            PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(changed and "--write" not in argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

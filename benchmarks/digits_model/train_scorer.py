"""Stage `scorer`: the digit and realness network, fitted on the scorer split only."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks.digits_model import data
from benchmarks.digits_model.checkpoints import Progress
from selfnpo_fast.scoring.digits.domain import digits_domain
from selfnpo_fast.scoring.digits.network import DigitScorer

STEPS, BATCH, RATE, SEED = 2500, 64, 2e-3, 3


def warp(images: torch.Tensor, generator: torch.Generator, strength: float, cells: int) -> torch.Tensor:
    """Images (N, 3, H, W) with pixels shifted along a smooth random field.

    The field has `cells` x `cells` control points; `strength` is the standard deviation of the
    shift in pixels.
    """
    n, _, height, width = images.shape
    field = torch.randn(n, 2, cells, cells, generator=generator) * (2 * strength / width)
    field = F.interpolate(field, (height, width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    identity = torch.eye(2, 3).expand(n, 2, 3)
    grid = F.affine_grid(identity, list(images.shape), align_corners=False) + field
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def corrupt(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Images (N, 3, 32, 32) with one of six generic flaws in each, chosen at random.

    The flaws are blur, noise, crumpling, a lost patch, a ghost of another digit, and a smear.
    """
    n = len(images)
    blurred = F.avg_pool2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), 5, 1) * 0.7 + images * 0.3
    noise = F.interpolate(torch.randn(n, 3, 16, 16, generator=generator), (32, 32), mode="bilinear")
    noisy = (images + 0.25 * noise).clamp(-1, 1)
    crumpled = warp(images, generator, 1.6, 9)
    # A patch of 7 x 7 pixels takes the colour of the picture's corner, which is background.
    lost = images.clone()
    corner = torch.randint(8, 18, (n, 2), generator=generator)
    for i, (y, x) in enumerate(corner.tolist()):
        lost[i, :, y : y + 7, x : x + 7] = images[i, :, :1, :1]
    weight = torch.rand(n, 1, 1, 1, generator=generator) * 0.4 + 0.25
    ghost = torch.lerp(images, images.roll(1, 0), weight)
    smear = F.interpolate(F.avg_pool2d(images, 2), (32, 32), mode="bilinear")
    flaws = torch.stack([blurred, noisy, crumpled, lost, ghost, smear])
    return flaws[torch.randint(len(flaws), (n,), generator=generator), torch.arange(n)]


def train(work: Path, progress: Progress) -> DigitScorer:
    """Fits the scorer and returns it in eval mode; goes on from what `progress` saved.

    The loss is cross-entropy on the digit of real pictures plus logistic loss of real against
    corrupted pictures.
    """
    torch.manual_seed(SEED)
    domain = digits_domain()
    coverage, digits = data.load_split(work, "scorer")
    scorer = DigitScorer()
    optimizer = torch.optim.AdamW(scorer.parameters(), RATE, weight_decay=5e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    start = progress.restore(scorer, optimizer, schedule)
    for step in range(start, STEPS):
        generator = torch.Generator().manual_seed(SEED * 10**6 + step)
        rows = torch.randint(len(coverage), (BATCH,), generator=generator)
        labels = data.draw_labels(domain, digits[rows], SEED * 10**6 + step, skip_held_out=False)
        # Gentle warps stand for handwriting that 4,000 samples do not cover; warped pictures count
        # as real.
        real = warp(data.recolour(domain, coverage[rows], labels), generator, 0.8, 4)
        _, logits, realness = scorer(torch.cat([real, corrupt(real, generator)]))
        target = torch.cat([torch.ones(BATCH), torch.zeros(BATCH)])
        loss = F.cross_entropy(logits[:BATCH], digits[rows], label_smoothing=0.02)
        loss = loss + F.binary_cross_entropy_with_logits(realness, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.save(step, STEPS, loss, scorer, optimizer, schedule)
    return scorer.eval()

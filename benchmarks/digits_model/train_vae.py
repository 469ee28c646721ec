"""Stage `vae`: an AutoencoderKL that takes 32x32 RGB to 8x8x4 latents."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from benchmarks.digits_model import data
from benchmarks.digits_model.checkpoints import Progress
from selfnpo_fast.scoring.digits.domain import Label, digits_domain

STEPS, BATCH, RATE, KL_WEIGHT, SEED = 2400, 32, 2e-3, 1e-7, 1


def new_vae() -> AutoencoderKL:
    """The untrained autoencoder."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=16,
        sample_size=32,
    )


def train(work: Path, progress: Progress) -> AutoencoderKL:
    """Fits the autoencoder and returns it; goes on from what `progress` saved.

    The loss is L1 + 2 L2 + KL_WEIGHT KL on digits of the model split in colours drawn for each
    batch.
    """
    torch.manual_seed(SEED)
    domain = digits_domain()
    coverage, digits = data.load_split(work, "model")
    vae = new_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.05)
    start = progress.restore(vae, optimizer, schedule)
    for step in range(start, STEPS):
        generator = torch.Generator().manual_seed(SEED * 10**6 + step)
        rows = torch.randint(len(coverage), (BATCH,), generator=generator)
        labels = data.draw_labels(domain, digits[rows], SEED * 10**6 + step, skip_held_out=True)
        images = data.recolour(domain, coverage[rows], labels)
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample(generator=generator)).sample
        error = decoded - images
        # Squares in addition to L1: thin strokes are few pixels, and L1 gives up their colour
        # first.
        loss = error.abs().mean() + 2 * error.square().mean() + KL_WEIGHT * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.save(step, STEPS, loss, vae, optimizer, schedule)
    return vae


@torch.no_grad()
def encode_split(vae: AutoencoderKL, work: Path, seed: int) -> tuple[torch.Tensor, list[Label]]:
    """The model split in the colours of `seed`: unscaled latent means (N, 4, 8, 8) and N labels."""
    domain = digits_domain()
    coverage, digits = data.load_split(work, "model")
    labels = data.draw_labels(domain, digits, seed, skip_held_out=True)
    images = data.recolour(domain, coverage, labels)
    return torch.cat([vae.encode(part).latent_dist.mean for part in images.split(250)]), labels

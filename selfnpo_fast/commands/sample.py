"""`selfnpo sample`: pictures with or without a negative model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.runtime.folders import check_writable
from selfnpo_fast.runtime.options import parse_options


@dataclass(kw_only=True)
class SampleOptions:
    """Draw pictures, with or without a negative model."""

    model: str = "digits"
    """`digits`, a folder in diffusers format, or a Hub id."""
    negative: str | None = None
    """A training run's folder, a diffusers folder, a Hub id or a safetensors file, full weights or LoRA; else none."""
    alpha: float = 1.0
    """Eq. 7: how much of what the model has learned beyond `base` the negative has, too."""
    beta: float = 1.0
    """Eq. 7: strength of the negative's own weights."""
    base: str | None = None
    """The model that both the model and the negative come from, for alpha below 1 or a fine-tuned model."""
    prompt: str | None = None
    """One prompt."""
    prompts: str | None = None
    """A file of prompts (.txt, .jsonl, .csv, .parquet), `digits` or `shipped`."""
    limit: int = 64
    """Use at most this many of `prompts`."""
    images_per_prompt: int = 1
    """Pictures of each prompt, with consecutive seeds."""
    seed: int = 0
    """Seed of the first picture; the next ones count up."""
    steps: int = 20
    """Solver steps."""
    guidance_scale: float = 3.0
    """diffusers' guidance_scale (omega + 1)."""
    solver: Literal["dpm++", "ddim", "euler"] = "dpm++"
    """DPM-Solver++(2M), DDIM or Euler."""
    negative_prompt: Literal["empty", "same"] = "empty"
    """Prompt of the negative branch: empty, or the same as the positive's."""
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    """Shares of the steps between which guidance acts, two numbers from 0 to 1."""
    guidance_rescale: float = 0.0
    """0 to 1: diffusers' guidance_rescale."""
    resolution: int | None = None
    """Picture height and width; the model's own by default."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the networks."""
    batch_size: int = 16
    """Pictures per forward."""
    output: str = "samples"
    """Folder for the PNG files and grid.png."""


def run(argv: list[str]) -> None:
    """The command with its words."""
    sample(parse_options(SampleOptions, argv, "selfnpo sample"))


def check_seeds(seeds: list[int]) -> None:
    """UserError where a seed does not fit."""
    if seeds[0] < 0 or seeds[-1] >= 2**63:
        raise UserError(f"seed: {seeds[0]} is not possible; expected 0 to 2^63 - {len(seeds)}")


def sample(options: SampleOptions) -> None:
    """Write one PNG per picture and grid.png; everything is checked before the folder is made."""
    import torch

    from selfnpo_fast.data.prompts import read_prompts
    from selfnpo_fast.guidance.sampler import GuidedSampler, SamplerConfig
    from selfnpo_fast.models import load_adapter
    from selfnpo_fast.negatives.load import load_negative
    from selfnpo_fast.runtime.dtypes import DTYPES
    from selfnpo_fast.runtime.images import image_grid, to_pil

    folder = check_writable(options.output)
    if (options.prompt is None) == (options.prompts is None):
        raise UserError("prompt: give either --prompt TEXT or --prompts FILE")
    if options.images_per_prompt < 1:
        raise UserError(f"images_per_prompt: {options.images_per_prompt} is not possible; expected at least 1")
    settings = SamplerConfig(
        steps=options.steps,
        guidance_scale=options.guidance_scale,
        solver=options.solver,
        negative_prompt=options.negative_prompt,
        batch_size=options.batch_size,
        guidance_interval=options.guidance_interval,
        guidance_rescale=options.guidance_rescale,
    )
    texts = [options.prompt] if options.prompt is not None else read_prompts(options.prompts, limit=options.limit)
    prompts = [text for text in texts for _ in range(options.images_per_prompt)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[options.precision]
    adapter = load_adapter(options.model, resolution=options.resolution)
    denoiser = adapter.load_denoiser(dtype).to(device)
    negative = None
    if options.negative is not None:
        negative = load_negative(
            denoiser, options.negative, alpha=options.alpha, beta=options.beta, base=options.base,
        )  # fmt: skip
    rows, empty = adapter.encode_prompts(prompts, device), adapter.encode_empty(device)
    seeds = [options.seed + i for i in range(len(prompts))]
    check_seeds(seeds)
    adapter.check_steps(settings.steps)
    adapter.check_size()
    with _bar(len(seeds), "image") as done:
        images = GuidedSampler(adapter, denoiser, negative).images(rows, empty, seeds, settings, done)
    folder.mkdir(parents=True, exist_ok=True)
    for i, (picture, seed) in enumerate(zip(to_pil(images, least_side=0), seeds, strict=True)):
        picture.save(folder / f"{i:04d}-seed{seed}.png")
    columns = options.images_per_prompt if options.images_per_prompt > 1 else min(len(images), 8)
    image_grid(images, columns).save(folder / "grid.png")
    print(f"{len(images)} images at guidance_scale {options.guidance_scale:g}; grid: {folder / 'grid.png'}")


@contextmanager
def _bar(total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """A progress bar; gives the callback `done(count)`."""
    from tqdm import tqdm

    with tqdm(total=total, unit=unit, dynamic_ncols=True) as bar:
        yield lambda count: bar.update(count - bar.n)

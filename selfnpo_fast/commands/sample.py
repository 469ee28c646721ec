"""`selfnpo sample`: pictures with or without a negative model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.runtime.folders import check_writable, whole_file, writing
from selfnpo_fast.runtime.limits import MAX_COUNT, check_count, check_seeds
from selfnpo_fast.runtime.locks import only_writer
from selfnpo_fast.runtime.options import parse_options
from selfnpo_fast.runtime.screen import progress_bar, show


@dataclass(kw_only=True)
class SampleOptions:
    """Draw pictures, with or without a negative model."""

    model: str = "digits"
    """`digits`, a folder in diffusers format, or a Hub id."""
    negative: str | None = None
    """The negative model, full weights or a LoRA: the folder of a training run, a diffusers folder,
    a Hub id or a safetensors file. By default there is none."""
    alpha: float = 1.0
    """Eq. 7: share of the model's change from `base` that the negative takes over, 0 to 1."""
    beta: float = 1.0
    """Eq. 7: share of the negative's change from its base, 0 to 1."""
    base: str | None = None
    """The model from which both the model and the negative were tuned; needed for alpha below 1 and
    for a fine-tuned model."""
    prompt: str | None = None
    """One prompt."""
    prompts: str | None = None
    """A file of prompts (.txt, .jsonl, .csv, .parquet), `digits` or `shipped`."""
    limit: int = 64
    """Use at most this many of `prompts`."""
    images_per_prompt: int = 1
    """Pictures per prompt, with consecutive seeds."""
    seed: int = 0
    """Seed of the first picture; the next pictures have the next seeds."""
    steps: int = 20
    """Solver steps."""
    guidance_scale: float = 3.0
    """guidance_scale as in diffusers (omega + 1)."""
    solver: Literal["dpm++", "ddim", "euler", "unipc", "own"] = "dpm++"
    """DPM-Solver++(2M), DDIM, Euler or UniPC of second order on the model's noise schedule or flow,
    which knows no DDIM; own: the model's scheduler, as it is configured."""
    negative_prompt: Literal["empty", "same"] = "empty"
    """Prompt of the negative branch: empty, or the same as the positive's."""
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    """Shares of the steps between which guidance acts, two numbers from 0 to 1."""
    guidance_rescale: float = 0.0
    """guidance_rescale as in diffusers, 0 to 1."""
    resolution: int | None = None
    """Picture height and width in pixels; by default those that the model was trained for."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the networks."""
    batch_size: int = 16
    """Pictures per forward."""
    output: str = "samples"
    """Folder for the PNG files and grid.png."""


def run(argv: list[str]) -> None:
    """`selfnpo sample` with the words that follow it."""
    sample(parse_options(SampleOptions, argv, "selfnpo sample"))


def sample(options: SampleOptions) -> None:
    """Draw pictures and write one PNG per picture and grid.png.

    Raises UserError for bad options, before anything is written, and RunError where a picture
    cannot be written.
    """
    folder = check_writable(options.output)
    with only_writer(folder):
        _sample(options, folder)


def _sample(options: SampleOptions, folder: Path) -> None:
    """`sample`, into a folder to which no other command writes."""
    import torch

    from selfnpo_fast.data.prompts import read_prompts
    from selfnpo_fast.diffusion.schedule_facts import ScheduleFacts
    from selfnpo_fast.guidance.sampler import GuidedSampler
    from selfnpo_fast.guidance.settings import SamplerConfig, checked_prompts
    from selfnpo_fast.models import load_adapter
    from selfnpo_fast.negatives.load import load_negative
    from selfnpo_fast.runtime.dtypes import DTYPES
    from selfnpo_fast.runtime.images import image_grid, to_pil

    # Checks that need no model.
    if (options.prompt is None) == (options.prompts is None):
        raise UserError("prompt: give either --prompt TEXT or --prompts FILE")
    for name in ("limit", "images_per_prompt", "steps", "batch_size"):
        check_count(name, getattr(options, name))
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
    texts = checked_prompts("prompt" if options.prompt is not None else "prompts", texts)
    check_count("images_per_prompt", options.images_per_prompt, most=MAX_COUNT // len(texts))
    check_seeds(options.seed, len(texts) * options.images_per_prompt)
    prompts = [text for text in texts for _ in range(options.images_per_prompt)]
    # The model, and the negative model if there is one.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[options.precision]
    adapter = load_adapter(options.model, resolution=options.resolution)
    denoiser = adapter.load_denoiser(dtype).to(device)
    negative = None
    if options.negative is not None:
        negative = load_negative(
            denoiser, options.negative, alpha=options.alpha, beta=options.beta, base=options.base,
            schedule=ScheduleFacts.of(adapter.schedule, options.model),
        )  # fmt: skip
    # Conditioning and noise, and checks that need the model.
    rows, empty = adapter.encode_prompts(prompts, device), adapter.encode_empty(device)
    seeds = [options.seed + i for i in range(len(prompts))]
    adapter.check_steps(settings.steps)
    adapter.check_size()
    # Pictures, one file for each, and a grid with the pictures of one prompt in a row.
    sampler, parts = GuidedSampler(adapter, denoiser, negative), []
    with progress_bar(len(seeds), "image") as bar:
        # What is drawn is written at once, so that it is there whatever becomes of the rest.
        for start in range(0, len(seeds), settings.batch_size):
            part = slice(start, start + settings.batch_size)
            own = {name: value[part] for name, value in rows.items()}
            done = lambda count, before=start: bar.update(before + count - bar.n)  # noqa: E731
            parts.append(sampler.images(own, empty, seeds[part], settings, done))
            with writing(folder):
                for i, picture in enumerate(to_pil(parts[-1], least_side=0), start):
                    with whole_file(folder / f"{i:04d}-seed{seeds[i]}.png") as file:
                        picture.save(file, format="PNG")
    images = torch.cat(parts)
    columns = options.images_per_prompt if options.images_per_prompt > 1 else min(len(images), 8)
    with writing(folder), whole_file(folder / "grid.png") as file:
        image_grid(images, columns).save(file, format="PNG")
    show(f"{len(images)} images at guidance_scale {options.guidance_scale:g}; grid: {folder / 'grid.png'}")

"""`selfnpo sample`: pictures or videos with or without a negative model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.runtime.folders import check_writable, whole_file, writing
from selfnpo_fast.runtime.limits import MAX_COUNT, check_count, check_seeds
from selfnpo_fast.runtime.locks import only_writer
from selfnpo_fast.runtime.options import parse_options
from selfnpo_fast.runtime.screen import progress_bar, show

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from selfnpo_fast.guidance.settings import SamplerConfig


@dataclass(kw_only=True)
class SampleOptions:
    """Draw pictures or videos, with or without a negative model."""

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
    use_dynamic_cfg: bool = False
    """use_dynamic_cfg as in diffusers: the scale of each step follows from its timestep."""
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
    height: int | None = None
    """Height in pixels where it differs from the width."""
    width: int | None = None
    """Width in pixels where it differs from the height."""
    frames: int | None = None
    """Frames of a video; by default those that the model was trained for. One is a PNG file."""
    fps: float | None = None
    """Frames per second of the .mp4 files; by default those of the model's kind."""
    vae_tiling: bool = False
    """Decode in tiles whose seams are blended (diffusers' enable_tiling): less memory."""
    vae_slicing: bool = False
    """Decode the pictures of a batch one by one (diffusers' enable_slicing)."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the networks."""
    batch_size: int | None = None
    """Pictures per forward; by default 16, and 1 video."""
    output: str = "samples"
    """Folder for the PNG or .mp4 files and grid.png."""


def run(argv: list[str]) -> None:
    """`selfnpo sample` with the words that follow it."""
    sample(parse_options(SampleOptions, argv, "selfnpo sample"))


def sample(options: SampleOptions) -> None:
    """Draw pictures and write one PNG per picture, or .mp4 per video, and grid.png.

    Raises UserError for bad options, before anything is written, and RunError where a picture
    cannot be written.
    """
    folder = check_writable(options.output)
    with only_writer(folder):
        _sample(options, folder)


def _sample(options: SampleOptions, folder: Path) -> None:
    """`sample`, into a folder to which no other command writes."""
    import torch

    from selfnpo_fast.config import ModelConfig
    from selfnpo_fast.diffusion.schedule_facts import ScheduleFacts
    from selfnpo_fast.guidance.sampler import GuidedSampler
    from selfnpo_fast.models import load_adapter_of
    from selfnpo_fast.negatives.load import load_negative
    from selfnpo_fast.runtime.dtypes import DTYPES
    from selfnpo_fast.runtime.videos import check_av, checked_fps

    # Checks that need no model, and the model with those that need no weights.
    prompts, settings = _prompts(options), _settings(options, options.batch_size or 16)
    of_model = ("resolution", "height", "width", "frames", "vae_tiling", "vae_slicing")
    adapter = load_adapter_of(ModelConfig(path=options.model, **{name: getattr(options, name) for name in of_model}))
    adapter.check_steps(settings.steps)
    videos = adapter.family.draws_videos
    fps = adapter.family.frame_rate if options.fps is None else float(checked_fps(options.fps))
    if videos:
        settings = _settings(options, options.batch_size or 1)
        if adapter.size.frames > 1:
            check_av(", or give --frames 1 for pictures")
    elif options.fps is not None:
        raise UserError(f"fps: {options.fps:g} is given, and {options.model} draws pictures; leave it out")
    # The networks, and the prompts' rows.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    denoiser = adapter.load_denoiser(DTYPES[options.precision]).to(device)
    negative = None
    if options.negative is not None:
        negative = load_negative(
            denoiser, options.negative, alpha=options.alpha, beta=options.beta, base=options.base,
            schedule=ScheduleFacts.of(adapter.schedule, options.model),
        )  # fmt: skip
    rows, empty = adapter.encode_branches(prompts, device)
    seeds = [options.seed + i for i in range(len(prompts))]
    sampler, noun, parts = GuidedSampler(adapter, denoiser, negative), "video" if videos else "image", []
    with progress_bar(len(seeds), noun) as bar:
        # What is drawn is written at once, so that it is there whatever becomes of the rest.
        for start in range(0, len(seeds), settings.batch_size):
            part = slice(start, start + settings.batch_size)
            own = {name: value[part] for name, value in rows.items()}
            done = lambda count, before=start: bar.update(before + count - bar.n)  # noqa: E731
            drawn = sampler.images(own, empty, seeds[part], settings, done)
            names = [f"{i:04d}-seed{seeds[i]}" for i in range(start, start + len(drawn))]
            parts.append(_write(drawn, folder, names, fps))
    with writing(folder), whole_file(folder / "grid.png") as file:
        _grid(torch.cat(parts), prompts, options, adapter.size.frames).save(file, format="PNG")
    show(f"{len(seeds)} {noun}s at guidance_scale {options.guidance_scale:g}; grid: {folder / 'grid.png'}")


def _prompts(options: SampleOptions) -> list[str]:
    """The prompt of each picture. Raises UserError."""
    from selfnpo_fast.data.prompts import read_prompts
    from selfnpo_fast.guidance.settings import checked_prompts

    if (options.prompt is None) == (options.prompts is None):
        raise UserError("prompt: give either --prompt TEXT or --prompts FILE")
    for name in ("limit", "images_per_prompt", "steps", "batch_size"):
        if getattr(options, name) is not None:
            check_count(name, getattr(options, name))
    texts = [options.prompt] if options.prompt is not None else read_prompts(options.prompts, limit=options.limit)
    texts = checked_prompts("prompt" if options.prompt is not None else "prompts", texts)
    check_count("images_per_prompt", options.images_per_prompt, most=MAX_COUNT // len(texts))
    check_seeds(options.seed, len(texts) * options.images_per_prompt)
    return [text for text in texts for _ in range(options.images_per_prompt)]


def _settings(options: SampleOptions, batch_size: int) -> SamplerConfig:
    """How pictures are drawn. Raises UserError."""
    from selfnpo_fast.guidance.settings import SamplerConfig

    names = ("steps", "guidance_scale", "use_dynamic_cfg", "solver", "negative_prompt")
    names += ("guidance_interval", "guidance_rescale")
    return SamplerConfig(batch_size=batch_size, **{name: getattr(options, name) for name in names})


def _write(drawn: torch.Tensor, folder: Path, names: list[str], fps: float) -> torch.Tensor:
    """Write pictures (N, 3, H, W) as PNG, or videos (N, F, 3, H, W) as .mp4, and a video of one frame
    as PNG; returns what the grid shows of them."""
    from selfnpo_fast.runtime.images import shown_frames, to_pil
    from selfnpo_fast.runtime.videos import write_mp4

    with writing(folder):
        if drawn.ndim == 5 and drawn.shape[1] > 1:
            for name, video in zip(names, drawn, strict=True):
                write_mp4(video, folder / f"{name}.mp4", fps=fps)
            return drawn[:, shown_frames(drawn.shape[1])].clone()
        pictures = drawn.flatten(0, 1) if drawn.ndim == 5 else drawn
        for name, picture in zip(names, to_pil(pictures, least_side=0), strict=True):
            with whole_file(folder / f"{name}.png") as file:
                picture.save(file, format="PNG")
        return pictures


def _grid(shown: torch.Tensor, prompts: list[str], options: SampleOptions, frames: int) -> Image.Image:
    """The pictures of one prompt in a row; or a row of frames for each video."""
    from selfnpo_fast.runtime.images import frame_grid, image_grid, shown_frames

    if shown.ndim == 5:
        return frame_grid(shown, shown_frames(frames), prompts)
    return image_grid(shown, options.images_per_prompt if options.images_per_prompt > 1 else min(len(shown), 8))

"""Every trained family as a tiny pipeline of the real classes, with a short run of each.

Nothing here asks the product what a family is: texts, calls of the denoiser and noise levels are
diffusers' own.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import crash
import diffusers
import numpy as np
import tiny
import tiny_transformers
import torch
from PIL import Image
from torch import nn

PROMPTS = ["a cat", "two birds", "a red blot"]
GRID = 4
"""Steps of the runs' grid."""
CLIP = {"model.height": 32, "model.width": 48, "model.frames": 9}


@dataclass(frozen=True)
class Case:
    """A family, or a variant of one, in small."""

    pipeline: str
    """The pipeline's class."""
    write: Callable[[Path], Path]
    size: dict[str, int] = field(default_factory=dict)
    """Options of a run that name the size, where the model's own would be too large."""
    flow: bool = False
    """Whether the model is a flow, here with a shift of 3."""
    two_calls: bool = False
    """Whether the stock pipeline calls its denoiser once for each branch, the positive first."""
    boundary: float | None = None
    """The time from which on the first of two denoisers predicts."""

    @property
    def denoisers(self) -> tuple[str, ...]:
        """The pipeline's attributes that hold them."""
        if self.pipeline in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
            return ("unet",)
        return ("transformer",) if self.boundary is None else ("transformer", "transformer_2")

    @property
    def videos(self) -> bool:
        return bool(self.size)

    def open(self, folder: Path) -> diffusers.DiffusionPipeline:
        """The stock pipeline in a folder. CogVideoX draws by DDIM, which needs no noise."""
        pipe = getattr(diffusers, self.pipeline).from_pretrained(folder)
        if self.pipeline == "CogVideoXPipeline":
            pipe.scheduler = diffusers.CogVideoXDDIMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        return pipe


CASES = {
    "sd": Case("StableDiffusionPipeline", tiny.write_sd),
    "sdxl": Case("StableDiffusionXLPipeline", tiny.write_sdxl),
    "sd3": Case("StableDiffusion3Pipeline", tiny_transformers.write_sd3, flow=True),
    "cogvideox_2b": Case("CogVideoXPipeline", tiny_transformers.write_cogvideox, CLIP),
    "cogvideox_5b": Case(
        "CogVideoXPipeline", functools.partial(tiny_transformers.write_cogvideox, rotary=True), CLIP
    ),
    "wan": Case("WanPipeline", tiny_transformers.write_wan, CLIP, flow=True, two_calls=True),
    "wan_two": Case(
        "WanPipeline", functools.partial(tiny_transformers.write_wan, experts=2, boundary=0.875), CLIP,
        flow=True, two_calls=True, boundary=875,
    ),
}  # fmt: skip


# Runs


def write_data(folder: Path, case: Case, kind: str) -> Path:
    """A folder of two captioned pictures, .mp4 files or folders of frames."""
    folder.mkdir()
    for i, caption in enumerate(PROMPTS[:2]):
        picture = lambda frame, i=i: np.random.default_rng(10 * i + frame).integers(0, 256, (64, 96, 3), dtype=np.uint8)  # noqa: E731
        (folder / f"{i}.txt").write_text(caption)
        if kind == "pictures":
            Image.fromarray(picture(0)).save(folder / f"{i}.png")
        elif kind == "frames":
            (folder / f"{i}").mkdir()
            for frame in range(case.size["model.frames"]):
                Image.fromarray(picture(frame)).save(folder / f"{i}" / f"{frame}.png")
        else:
            import av  # here, so that tests are collected where the package is missing

            with av.open(folder / f"{i}.mp4", "w") as container:
                stream = container.add_stream("libx264", rate=8)
                stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
                for frame in range(case.size["model.frames"]):
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(frame), format="rgb24")))
                container.mux(stream.encode())
    return folder


def words(case: Case, model: Path, output: Path, **changes) -> list[str]:
    """The words of a short run; changes are options with `__` for the dot."""
    prompts = model.parent / f"{model.name}-prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    options = {
        "model.path": model, "output": output, "updates": 2, "prompts.source": prompts, "rollout.grid_steps": GRID,
        "rollout.pool": 1, "reference.decay": 0.9, "engine.precision": "fp32", "engine.zero_stage": 0,
        "engine.batch_size": 4, "engine.gradient_checkpointing": "false", "optimizer.name": "adamw",
        "optimizer.lr": 3e-3, "log.every": 1, "log.sample_prompts": 1, "log.sample_steps": 2,
    }  # fmt: skip
    options |= case.size | {name.replace("__", "."): value for name, value in changes.items()}
    return [
        "--config",
        str(crash.CONFIG),
        *(word for key, value in options.items() for word in (f"--{key}", str(value))),
    ]


# What diffusers makes of a text, a state and a time


def rows_of(case: Case, pipe, text: str) -> dict:
    """The denoiser's arguments of one text, as the stock pipeline makes them."""
    match case.pipeline:
        case "StableDiffusionPipeline":
            return {"encoder_hidden_states": pipe.encode_prompt(text, "cpu", 1, False)[0]}
        case "StableDiffusionXLPipeline":
            embeds, _, pooled, _ = pipe.encode_prompt(text, device="cpu", do_classifier_free_guidance=False)
            if not text:  # force_zeros_for_empty_prompt
                embeds, pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
            ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
            return {"encoder_hidden_states": embeds, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}
        case "StableDiffusion3Pipeline":
            embeds, _, pooled, _ = pipe.encode_prompt(text, None, None, do_classifier_free_guidance=False)
            return {"encoder_hidden_states": embeds, "pooled_projections": pooled}
    tokens = 512 if case.two_calls else tiny_transformers.TOKENS  # of the pipelines' calls
    embeds, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=tokens, device="cpu")
    rows = {"encoder_hidden_states": embeds}
    if pipe.transformer.config.get("use_rotary_positional_embeddings"):
        rows["image_rotary_emb"] = pipe._prepare_rotary_positional_embeddings(32, 48, 3, "cpu")
    return rows


class Truth:
    """A family's noise levels, steps and predictions, by diffusers' schedulers and one network.

    A level is a number from 0 to 999, where 999 is the noisiest.
    """

    def __init__(self, case: Case, folder: Path, grid: int = GRID) -> None:
        self.case, self.pipe, self.grid = case, case.open(folder), grid
        self.networks = [getattr(self.pipe, name) for name in case.denoisers]
        if case.flow:
            self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
            self.sigmas = self.scheduler.sigmas.flip(0)  # of the levels, the cleanest first
        else:
            self.scheduler = type(self.pipe.scheduler).from_config(
                self.pipe.scheduler.config, timestep_spacing="trailing"
            )
            self.scheduler.final_alpha_cumprod = self.scheduler.alphas_cumprod[0]  # a rollout ends at level 0
        self.restart()
        self._rows = functools.cache(lambda text: rows_of(case, self.pipe, text))

    def restart(self) -> None:
        """Before a trajectory: schedulers of flows count their steps."""
        if self.case.flow:
            self.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / self.grid, self.grid))
        else:
            self.scheduler.set_timesteps(self.grid)

    def sigma(self, level: int) -> float:
        """A flow's share of noise; level 0 is clean."""
        return float(self.sigmas[level]) if level else 0.0

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, level: int) -> torch.Tensor:
        """The forward process: alpha clean + sigma noise, by the scheduler's own function."""
        if not self.case.flow:
            return self.scheduler.add_noise(clean, noise, torch.tensor([level]))
        fresh = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        return fresh.scale_noise(clean, fresh.timesteps[999 - level][None], noise) if level else clean

    def alpha_sigma(self, level: int) -> tuple[float, float]:
        one, zero = torch.ones(1, 1), torch.zeros(1, 1)
        return float(self.noised(one, zero, level)), float(self.noised(zero, one, level))

    @torch.no_grad()
    def predict(self, x: torch.Tensor, level: int, text: str) -> torch.Tensor:
        """The network's output for one state (1, ...)."""
        time = torch.tensor([1000 * self.sigma(level)]) if self.case.flow else torch.tensor([level])
        first = "sample" if self.case.denoisers == ("unet",) else "hidden_states"
        network = self.networks[self.case.boundary is not None and float(time) < self.case.boundary]
        return network(**{first: x, "timestep": time}, **self._rows(text), return_dict=False)[0]

    def x0(self, x: torch.Tensor, p: torch.Tensor, level: int) -> torch.Tensor:
        """The estimate of the clean latent."""
        if self.case.flow:
            return x - self.sigma(level) * p
        return self.scheduler.step(p, level, x).pred_original_sample

    def levels(self) -> list[int]:
        """Those of the grid, the noisiest first."""
        return [1000 * (i + 1) // self.grid - 1 for i in range(self.grid - 1, -1, -1)]

    def trajectory(self, x: torch.Tensor, predict: Callable[..., torch.Tensor]) -> dict[int, torch.Tensor]:
        """The states of a DDIM or Euler trajectory from noise, by level; the last one is at 0.

        `predict` is called with a state and its level.
        """
        states = {}
        self.restart()
        for level, t in zip(self.levels(), self.scheduler.timesteps, strict=True):
            states[level] = x
            x = self.scheduler.step(predict(x, level), t, x).prev_sample
        return states | {0: x}

    def renoised(self, x: torch.Tensor, noise: torch.Tensor, t: int, s: int) -> torch.Tensor:
        """Eq. 16: a state at level t, noised on to level s."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.alpha_sigma(t), self.alpha_sigma(s)
        ratio = alpha_s / alpha_t
        return ratio * x + max(sigma_s**2 - ratio**2 * sigma_t**2, 0) ** 0.5 * noise


# Two networks in the stock pipeline's loop


class ByBranch(nn.Module):
    """In a denoiser's place: computes the negative branch by another network.

    In one call the first half of all rows is negative; of two calls the second is.
    """

    def __init__(self, positive: nn.Module, negative: nn.Module, two_calls: bool) -> None:
        super().__init__()
        self.positive, self.negative, self.two_calls, self.calls = positive, negative, two_calls, 0

    config = property(lambda self: self.positive.config)
    dtype = property(lambda self: self.positive.dtype)
    device = property(lambda self: self.positive.device)
    add_embedding = property(lambda self: self.positive.add_embedding)

    def cache_context(self, name: str, **kwargs):
        return contextlib.nullcontext()

    def forward(self, *args, return_dict: bool = False, **kwargs) -> tuple[torch.Tensor]:
        if self.two_calls:
            self.calls += 1
            network = self.positive if self.calls % 2 else self.negative
            return network(*args, **kwargs, return_dict=False)
        halves = []
        for i, network in enumerate((self.negative, self.positive)):
            part = functools.partial(_half, i=i)
            named = {key: value if key == "image_rotary_emb" else part(value) for key, value in kwargs.items()}
            halves.append(network(*map(part, args), **named, return_dict=False)[0])
        return (torch.cat(halves),)


def _half(value, i: int):
    if isinstance(value, dict):
        return {key: _half(part, i) for key, part in value.items()}
    if isinstance(value, torch.Tensor) and value.ndim and len(value) > 1:
        return value.chunk(2)[i]
    return value

"""Guided sampling with a negative model.

p = p_neg + guidance_scale (p_pos - p_neg), diffusers' convention: guidance_scale = omega + 1. Without a negative model
this is plain classifier-free guidance. Beyond the networks a step is one fused call: guidance, x0 and the solver.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from selfnpo_fast.errors import UserError
from selfnpo_fast.models import StableDiffusionAdapter
from selfnpo_fast.solvers import solver_steps
from selfnpo_kernels import Draw, NoiseKey, affine_noise, draw_id, guided_step, normal

SOLVERS = ("dpm++", "ddim", "euler")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How pictures are drawn."""

    steps: int = 20
    """Solver steps."""
    guidance_scale: float = 3.0
    """diffusers' guidance_scale (omega + 1); 1 uses the positive model alone."""
    solver: Literal["dpm++", "ddim", "euler"] = "dpm++"
    """DPM-Solver++(2M), DDIM (eta 0) or Euler."""
    negative_prompt: Literal["empty", "same"] = "empty"
    """Prompt of the negative branch: empty, or the positive's own, as in autoguidance."""
    batch_size: int = 64
    """Pictures per forward."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"steps: {self.steps} is not possible; expected at least 1")
        if not 1 <= self.guidance_scale < math.inf:
            raise UserError(f"guidance_scale: {self.guidance_scale} is not possible; expected a number of at least 1")
        if self.solver not in SOLVERS:
            raise UserError(f"solver: {self.solver!r} is not supported; expected one of {', '.join(SOLVERS)}")
        if self.negative_prompt not in ("empty", "same"):
            raise UserError(f"negative_prompt: {self.negative_prompt!r} is not possible; expected empty or same")
        if self.batch_size < 1:
            raise UserError(f"batch_size: {self.batch_size} is not possible; expected at least 1")


def make_scheduler(name: str, config: dict):
    """The diffusers scheduler of a solver name, on the model's own noise schedule."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

    if name == "dpm++":
        return DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++", solver_order=2)
    if name == "ddim":
        return DDIMScheduler.from_config(config, clip_sample=False)
    if name == "euler":
        return EulerDiscreteScheduler.from_config(config)
    raise UserError(f"solver: {name!r} is not supported; expected one of {', '.join(SOLVERS)}")


def check_steps(adapter: StableDiffusionAdapter, steps: int, field: str = "steps") -> None:
    """UserError where the model has too few timesteps for `steps` solver steps."""
    most = adapter.schedule.num_train_timesteps
    if steps >= most:
        raise UserError(f"{field}: {steps} is not possible; the model has {most} timesteps, give fewer")


def start_noise(seeds: list[int], shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Standard normals (B, *shape) float32; a picture's noise depends on its own seed alone.

    The draw is its own kind, so that no picture starts from the noise of a training rollout.
    """
    ids = torch.tensor(seeds, dtype=torch.int64, device=device)
    return normal(NoiseKey(0, ids, draw_id(Draw.SAMPLE)), shape)


@torch.no_grad()
def sample_latents(
    adapter: StableDiffusionAdapter,
    denoiser: nn.Module,
    negative: nn.Module | None,
    prompts: dict[str, torch.Tensor],
    empty: dict[str, torch.Tensor],
    seeds: list[int],
    config: SamplerConfig,
) -> torch.Tensor:
    """Scaled latents (B, C, H, W) float32 for conditioning rows `prompts` (B, ...), `empty` (1, ...) and B seeds."""
    device = next(denoiser.parameters()).device
    scheduler = make_scheduler(config.solver, adapter.scheduler_config)
    check_steps(adapter, config.steps)
    scheduler.set_timesteps(config.steps)
    solver = solver_steps(scheduler, w=config.guidance_scale - 1)
    k, timesteps, keeps_x0 = solver.k.float().to(device), solver.timesteps.to(device), solver.keeps_x0
    negative_rows = {name: rows.expand(len(seeds), *rows.shape[1:]) for name, rows in empty.items()}
    if negative is not None and config.negative_prompt == "same":
        negative_rows = prompts
    against = denoiser if negative is None else negative
    x, x0 = start_noise(seeds, adapter.latent_shape, device), None
    if solver.init_scale != 1:
        x = affine_noise(x, torch.tensor([[solver.init_scale, 0.0]], device=device), x)
    for i in range(len(k)):
        t = timesteps[i].expand(len(seeds))
        pos = adapter.predict(denoiser, x, t, prompts)
        neg = adapter.predict(against, x, t, negative_rows) if config.guidance_scale != 1 else None
        x, x0 = guided_step(pos, neg, x, k[i : i + 1], x0_prev=x0 if keeps_x0 else None)
    return x


def sample_images(
    adapter: StableDiffusionAdapter,
    denoiser: nn.Module,
    negative: nn.Module | None,
    prompts: dict[str, torch.Tensor],
    empty: dict[str, torch.Tensor],
    seeds: list[int],
    config: SamplerConfig,
    progress: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Pictures (B, 3, height, width) float32 in [-1, 1] on the CPU; `progress` hears how many are done."""
    images = []
    for start in range(0, len(seeds), config.batch_size):
        part = slice(start, start + config.batch_size)
        rows = {name: value[part] for name, value in prompts.items()}
        latents = sample_latents(adapter, denoiser, negative, rows, empty, seeds[part], config)
        images.append(adapter.decode(latents).cpu())
        if progress is not None:
            progress(min(start + config.batch_size, len(seeds)))
    return torch.cat(images)

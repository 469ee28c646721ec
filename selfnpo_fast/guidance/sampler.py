"""Guided sampling with a negative model: the fast path.

p = p_neg + guidance_scale (p_pos - p_neg), diffusers' convention: guidance_scale = omega + 1. Without a negative model
this is plain classifier-free guidance. Beyond the networks a step is one fused call: guidance, x0 and the solver.

Shape letters: B pictures of a batch, N pictures, C H W latent channels, height and width.
"""

from __future__ import annotations

import math
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from selfnpo_fast.diffusion.solvers import SolverSteps, solver_steps
from selfnpo_fast.guidance.attach import has_negative
from selfnpo_fast.guidance.branches import Branches
from selfnpo_fast.guidance.trajectory import Trajectories
from selfnpo_fast.models import Adapter, Family, adapter_of
from selfnpo_fast.models.base import Conditioning
from selfnpo_fast.negatives.load import Negative, load_negative
from selfnpo_fast.runtime.batch_or_split import BRANCHES
from selfnpo_fast.runtime.capture import CudaGraphs, no_capture
from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.errors import RunError, UserError
from selfnpo_fast.runtime.images import to_pil
from selfnpo_kernels import Draw, NoiseKey, affine_noise, draw_id, normal

SOLVERS = {
    "dpm++": "DPMSolverMultistepScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
}
OUTPUTS = ("pil", "pt", "latent")
Progress = Callable[[int, int], None]
"""Hears (steps done, steps in all) of a call."""


class SamplingCancelled(RunError):
    """`cancelled` said so between two steps."""


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How pictures are drawn."""

    steps: int = 20
    """Solver steps."""
    guidance_scale: float = 3.0
    """diffusers' guidance_scale (omega + 1); 1 uses the positive model alone."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Shares of the steps between which guidance acts; outside, a step runs the positive model alone."""
    guidance_rescale: float = 0.0
    """0 to 1: diffusers' guidance_rescale (Lin et al., section 3.4)."""
    solver: Literal["dpm++", "ddim", "euler"] = "dpm++"
    """DPM-Solver++(2M), DDIM (eta 0) or Euler."""
    negative_prompt: Literal["empty", "same"] = "empty"
    """Prompt of the negative branch: empty, or the positive's own, as in autoguidance."""
    batch_size: int = 64
    """Pictures per forward (of one branch)."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"steps: {self.steps} is not possible; expected at least 1")
        if not 1 <= self.guidance_scale < math.inf:
            raise UserError(f"guidance_scale: {self.guidance_scale} is not possible; expected a number of at least 1")
        interval = tuple(self.guidance_interval)
        if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
            raise UserError(f"guidance_interval: {interval} is not possible; expected two shares of the steps, 0 to 1")
        if not 0 <= self.guidance_rescale <= 1:
            raise UserError(f"guidance_rescale: {self.guidance_rescale} is not possible; expected 0 to 1")
        if self.solver not in SOLVERS:
            raise UserError(f"solver: {self.solver!r} is not supported; expected one of {', '.join(SOLVERS)}")
        if self.negative_prompt not in ("empty", "same"):
            raise UserError(f"negative_prompt: {self.negative_prompt!r} is not possible; expected empty or same")
        if self.batch_size < 1:
            raise UserError(f"batch_size: {self.batch_size} is not possible; expected at least 1")

    def guided(self, step: int) -> bool:
        """Whether guidance acts at a step, as diffusers' control_guidance_start and _end count them."""
        start, end = self.guidance_interval
        return self.guidance_scale != 1 and step / self.steps >= start and (step + 1) / self.steps <= end


def make_scheduler(name: str, config: dict):
    """The diffusers scheduler of a solver name, on the model's own noise schedule."""
    import diffusers

    if name not in SOLVERS:
        raise UserError(f"solver: {name!r} is not supported; expected one of {', '.join(SOLVERS)}")
    options = {"dpm++": {"algorithm_type": "dpmsolver++", "solver_order": 2}, "ddim": {"clip_sample": False}}
    return getattr(diffusers, SOLVERS[name]).from_config(config, **options.get(name, {}))


def start_noise(seeds: Sequence[int], shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Standard normals (B, *shape) float32; a picture's noise depends on its own seed alone.

    The draw is its own kind, so that no picture starts from the noise of a training rollout.
    """
    ids = torch.tensor(seeds, dtype=torch.int64, device=device)
    return normal(NoiseKey(0, ids, draw_id(Draw.SAMPLE)), shape)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What a call of the sampler gives."""

    images: list | torch.Tensor
    """PIL images; or (N, 3, height, width) float32 in [-1, 1] on the CPU ("pt"); or scaled latents ("latent")."""
    seeds: list[int]
    """Of each picture: drawing with them again gives the pictures again."""


class GuidedSampler:
    """Draws pictures with a positive and a negative model; made once, called often, by any number of threads.

    Calls take turns: one lock guards the device, the buffers and the (not thread-safe) tokenizers. A shape of batch,
    picture and solver keeps static buffers and, on a GPU, one CUDA graph per kind of step; the `max_shapes` that were
    used last are kept. `branches` says whether one network runs both branches as one batch or as two (auto: whichever
    the first steps of a shape find faster). `compile` off | default | max compiles the networks' repeated blocks; with
    max, steps are captured as CUDA graphs as well.
    """

    def __init__(
        self,
        adapter: Adapter,
        denoiser: nn.Module,
        negative: Negative | None = None,
        *,
        compile: Literal["off", "default", "max"] = "off",
        branches: Literal["auto", "batched", "split"] = "auto",
        max_shapes: int = 4,
        solver: Literal["dpm++", "ddim", "euler"] = "dpm++",
    ) -> None:
        """Of a family's adapter, its denoiser and a negative model (none: plain guidance), all where they shall run."""
        if compile not in ("off", "default", "max"):
            raise UserError(f"compile: {compile!r} is not possible; expected off, default or max")
        if branches not in BRANCHES:
            raise UserError(f"branches: {branches!r} is not possible; expected one of {', '.join(BRANCHES)}")
        if max_shapes < 1:
            raise UserError(f"max_shapes: {max_shapes} is not possible; expected at least 1")
        self.adapter, self.solver = adapter, solver
        self.device = next(denoiser.parameters()).device
        self.dtype = next(denoiser.parameters()).dtype
        self._lock = threading.Lock()
        self._branches = Branches(adapter, denoiser, negative, compile)
        capture = CudaGraphs(self.device) if compile == "max" and self.device.type == "cuda" else no_capture
        longest = adapter.schedule.num_train_timesteps
        self._trajectories = Trajectories(self._branches, branches, capture, most=max_shapes, most_steps=longest)

    @classmethod
    def from_pipeline(
        cls,
        pipe,
        negative: str | Path | nn.Module | Negative | None = None,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        base: str | None = None,
        **options,
    ) -> GuidedSampler:
        """A sampler over a diffusers pipeline's own networks, which stay where they are and as they are.

        `negative`, alpha, beta and base as in `attach_negative`; further options as in the constructor. The solver is
        the pipeline's scheduler where it is DPM-Solver++, DDIM or Euler; calls may name another.

        Raises UserError for pipelines of other families, offloaded ones, and what `load_negative` refuses.
        """
        adapter = adapter_of(pipe)
        denoiser = getattr(pipe, adapter.denoiser_name)
        denoiser = getattr(denoiser, "_orig_mod", denoiser)  # under torch.compile; we compile a tree of our own
        _check_pipeline(pipe, denoiser, adapter.family)
        named = {scheduler: name for name, scheduler in SOLVERS.items()}
        solver = named.get(type(pipe.scheduler).__name__, "dpm++")
        loaded = None
        if negative is not None:
            loaded = load_negative(denoiser, negative, alpha=alpha, beta=beta, base=base)
        return cls(adapter, denoiser, loaded, **({"solver": solver} | options))

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        seeds: int | Sequence[int] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 4,
        output: Literal["pil", "pt", "latent"] = "pil",
        progress: Progress | None = None,
        cancelled: Callable[[], bool] | None = None,
        **settings,
    ) -> Drawn:
        """One picture per prompt. `settings` are fields of `SamplerConfig`: steps, guidance_scale and the like.

        seeds: one per picture, or the first of consecutive ones, or None for new random ones; a picture depends on its
        own seed and prompt alone, to float rounding, whatever else is drawn with it. negative_prompt: none for the
        family's own unconditional branch. height and width in pixels. `progress` hears of every step, `cancelled` is
        asked before each; neither may call the sampler.

        Raises UserError for bad input, SamplingCancelled where `cancelled` says yes. Nothing of a call that ends early
        stays behind.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise UserError("prompts: there are none; give at least one")
        if output not in OUTPUTS:
            raise UserError(f"output: {output!r} is not possible; expected one of {', '.join(OUTPUTS)}")
        config = SamplerConfig(**({"solver": self.solver} | settings), batch_size=batch_size)
        seeds = _seeds(seeds, len(prompts))
        size = (height or self.adapter.resolution, width or self.adapter.resolution)
        shape = self.adapter.latent_shape_of(*size)
        if next(self._branches.positive.parameters()).device != self.device:
            raise UserError(f"pipe: its {self.adapter.denoiser_name} has left {self.device}; make a sampler anew")
        with self._lock, torch.no_grad():
            rows = self.adapter.sized(self.adapter.encode_prompts(prompts, self.device), *size)
            if negative_prompt is None:
                against = self.adapter.sized(self.adapter.encode_empty(self.device), *size)
            else:
                texts = [negative_prompt] if isinstance(negative_prompt, str) else list(negative_prompt)
                if len(texts) not in (1, len(prompts)):
                    raise UserError(f"negative_prompt: {len(texts)} for {len(prompts)} prompts; give one, or one each")
                against = self.adapter.sized(self.adapter.encode_prompts(texts, self.device), *size)
            latents = self._latents(rows, against, seeds, config, shape, progress, cancelled)
            images = latents.cpu() if output == "latent" else self.adapter.decode(latents).cpu()
        return Drawn(images=to_pil(images, least_side=0) if output == "pil" else images, seeds=seeds)

    def latents(
        self,
        prompts: Conditioning,
        empty: Conditioning,
        seeds: Sequence[int],
        config: SamplerConfig,
        progress: Progress | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> torch.Tensor:
        """Scaled latents (N, C, H, W) float32 for rows `prompts` (N, ...), `empty` (1, ...) and N seeds."""
        with self._lock, torch.no_grad():
            return self._latents(prompts, empty, seeds, config, self.adapter.latent_shape, progress, cancelled)

    def images(
        self,
        prompts: Conditioning,
        empty: Conditioning,
        seeds: Sequence[int],
        config: SamplerConfig,
        progress: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """Pictures (N, 3, height, width) float32 in [-1, 1] on the CPU; `progress` hears how many are done."""
        images = []
        for start in range(0, len(seeds), config.batch_size):
            part = slice(start, start + config.batch_size)
            latents = self.latents(_part(prompts, part), empty, seeds[part], config)
            with self._lock:
                images.append(self.adapter.decode(latents).cpu())
            if progress is not None:
                progress(min(start + config.batch_size, len(seeds)))
        return torch.cat(images)

    def _latents(self, prompts, against, seeds, config, shape, progress, cancelled) -> torch.Tensor:
        self.adapter.check_steps(config.steps)
        solver = self._solver(config)
        if config.negative_prompt == "same":
            against = prompts
        total, done, out = config.steps * math.ceil(len(seeds) / config.batch_size), 0, []
        for start in range(0, len(seeds), config.batch_size):
            part = slice(start, start + config.batch_size)
            mine = seeds[part]
            x = start_noise(mine, shape, self.device)
            if solver.init_scale != 1:
                x = affine_noise(x, torch.tensor([[solver.init_scale, 0.0]], device=self.device), x)
            rows = _join(_part(against, part), _part(prompts, part), len(mine), self.dtype)
            trajectory = self._trajectories.of(x, rows, solver.keeps_x0, config.guidance_rescale)
            trajectory.begin(x, rows, solver)
            for step in range(config.steps):
                if cancelled is not None and cancelled():
                    raise SamplingCancelled(f"cancelled after {done} of {total} steps")
                trajectory.step(config.guided(step))
                done += 1
                if progress is not None:
                    progress(done, total)
            out.append(trajectory.x.clone())
        return torch.cat(out)

    def _solver(self, config: SamplerConfig) -> SolverSteps:
        scheduler = make_scheduler(config.solver, self.adapter.scheduler_config)
        scheduler.set_timesteps(config.steps)
        return solver_steps(scheduler, w=config.guidance_scale - 1)

    def close(self) -> None:
        """Give back the buffers and graphs of all shapes."""
        with self._lock:
            self._trajectories.clear()


def _check_pipeline(pipe, denoiser: nn.Module, family: Family) -> None:
    name = family.denoiser_name
    if has_negative(denoiser):
        raise UserError(f"pipe: a negative is attached to its {name}; detach it, and give it to the sampler")
    if any(hasattr(module, "_hf_hook") for module in denoiser.modules()):
        raise UserError(
            f"pipe: its {name} is offloaded, and the sampler keeps its networks where they are; make the sampler "
            "before enable_model_cpu_offload, or use attach_negative"
        )
    unguided, unsampled = family.why_unguided(denoiser.config), family.why_unsampled(denoiser.config)
    if unguided is not None:
        raise UserError(f"pipe: its {name} {unguided}: there is no negative branch")
    if unsampled is not None:
        raise UserError(f"pipe: its {name} {unsampled}")
    if getattr(pipe, "safety_checker", None) is not None:
        logger.warning("the sampler does not run the pipeline's safety checker")


def _seeds(seeds: int | Sequence[int] | None, count: int) -> list[int]:
    if seeds is None:
        return [secrets.randbelow(2**63) for _ in range(count)]
    out = [int(seeds) + i for i in range(count)] if isinstance(seeds, Integral) else [int(seed) for seed in seeds]
    if len(out) != count:
        raise UserError(f"seeds: {len(out)} for {count} prompts; give one each, or the first of consecutive ones")
    for seed in out:
        if not 0 <= seed < 2**63:
            raise UserError(f"seeds: {seed} is not possible; expected 0 to 2^63 - 1")
    return out


def _part(rows: Conditioning, part: slice) -> Conditioning:
    """The rows of some pictures; a single row stands for all."""
    return {name: value if len(value) == 1 else value[part] for name, value in rows.items()}


def _join(against: Conditioning, prompts: Conditioning, batch: int, dtype: torch.dtype) -> Conditioning:
    """(2 B, ...) rows in the network's dtype: the negative branch's first."""
    both = {name: (against[name], prompts[name]) for name in prompts}
    return {
        name: torch.cat([value.to(dtype).expand(batch, *value.shape[1:]) for value in pair])
        for name, pair in both.items()
    }

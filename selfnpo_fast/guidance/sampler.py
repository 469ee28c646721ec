"""Guided sampling with a negative model: the fast path.

p = p_neg + guidance_scale (p_pos - p_neg), where guidance_scale is diffusers', omega + 1. Without a
negative model this is plain classifier-free guidance. Next to the networks, a step is one fused
call, which computes guidance, x0 and the solver's step.

Shape letters: B pictures of a batch, N pictures; C, H, W latent channels, height and width.
"""

from __future__ import annotations

import math
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from selfnpo_fast.diffusion.schedule_facts import ScheduleFacts, check_same_schedule
from selfnpo_fast.diffusion.solvers import SolverSteps, solver_steps
from selfnpo_fast.guidance.attach import has_negative
from selfnpo_fast.guidance.branches import Branches
from selfnpo_fast.guidance.trajectory import Trajectories
from selfnpo_fast.models import Adapter, Family, adapter_of
from selfnpo_fast.models.base import Conditioning
from selfnpo_fast.negatives.load import Negative, load_negative
from selfnpo_fast.negatives.weights import config_of
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
"""The diffusers scheduler of each solver."""
OUTPUTS = ("pil", "pt", "latent")
Progress = Callable[[int, int], None]
"""Called with (steps done, steps in total) after every step of a call."""


class SamplingCancelled(RunError):
    """Raised between two steps where the callback `cancelled` has returned true."""


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How pictures are drawn. Raises UserError for values that are not possible."""

    steps: int = 20
    """Solver steps."""
    guidance_scale: float = 3.0
    """diffusers' guidance_scale (omega + 1); 1 uses only the positive model."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Shares of the steps, 0 to 1, between which guidance acts; outside, only the positive runs."""
    guidance_rescale: float = 0.0
    """0 to 1: diffusers' guidance_rescale (Lin et al., arXiv 2305.08891, section 3.4)."""
    solver: Literal["dpm++", "ddim", "euler"] = "dpm++"
    """DPM-Solver++(2M), DDIM (eta 0) or Euler."""
    negative_prompt: Literal["empty", "same"] = "empty"
    """Prompt of the negative branch: the empty one, or the positive's (autoguidance)."""
    batch_size: int = 64
    """Pictures per forward of one branch."""

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
        """Whether guidance acts at a step, counted from 0, by the rule of diffusers' ControlNets.

        That is the rule of control_guidance_start and control_guidance_end.
        """
        start, end = self.guidance_interval
        return self.guidance_scale != 1 and step / self.steps >= start and (step + 1) / self.steps <= end


def make_scheduler(name: str, config: dict) -> Any:
    """The diffusers scheduler of a solver, with the noise schedule of the model's scheduler config.

    Raises UserError for an unknown solver.
    """
    import diffusers

    if name not in SOLVERS:
        raise UserError(f"solver: {name!r} is not supported; expected one of {', '.join(SOLVERS)}")
    options: dict[str, dict[str, Any]] = {
        "dpm++": {"algorithm_type": "dpmsolver++", "solver_order": 2},
        "ddim": {"clip_sample": False},
    }
    return getattr(diffusers, SOLVERS[name]).from_config(config, **options.get(name, {}))


def start_noise(seeds: Sequence[int], shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Standard normals (B, *shape) float32 for B seeds; each picture's depend only on its seed.

    The draw is that of sampling, so that no picture starts from the noise of a training rollout.
    """
    ids = torch.tensor(seeds, dtype=torch.int64, device=device)
    return normal(NoiseKey(0, ids, draw_id(Draw.SAMPLE)), shape)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The result of a call of the sampler."""

    images: list | torch.Tensor
    """N pictures in the form that `output` names.

    - pil: a list of PIL images.
    - pt: (N, 3, height, width) float32 in [-1, 1], on the CPU.
    - latent: scaled latents (N, C, H, W) float32, on the CPU.
    """
    seeds: list[int]
    """The seed of each picture; a call with the same seeds draws the same pictures."""


class GuidedSampler:
    """Draws pictures with a positive and a negative model.

    Any number of threads may call one sampler. Calls take turns: one lock guards the device, the
    buffers and the tokenizers, which are not thread-safe.

    Each shape of batch, picture and solver has static buffers and, on a GPU with `compile` max, one
    CUDA graph per kind of step. The `max_shapes` that were used last are kept.
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
        """A sampler of a family's adapter and its denoiser, which is on the device to run on.

        - negative: None for plain guidance.
        - compile: torch.compile's mode for the networks' repeated blocks; max also captures steps
          as CUDA graphs.
        - branches: one batch or two where one network computes both branches; auto takes what is
          faster in the first steps of a shape.
        - max_shapes: how many shapes are kept.
        - solver: the default of calls.

        Raises UserError for values that are not possible, and for a negative of another schedule.
        """
        if compile not in ("off", "default", "max"):
            raise UserError(f"compile: {compile!r} is not possible; expected off, default or max")
        if branches not in BRANCHES:
            raise UserError(f"branches: {branches!r} is not possible; expected one of {', '.join(BRANCHES)}")
        if max_shapes < 1:
            raise UserError(f"max_shapes: {max_shapes} is not possible; expected at least 1")
        if negative is not None:
            check_same_schedule(negative.schedule, ScheduleFacts.of(adapter.schedule, "the model"))
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
        base: str | Path | None = None,
        **options,
    ) -> GuidedSampler:
        """A sampler over the networks of a diffusers pipeline, which are neither moved nor changed.

        `negative`, alpha, beta and base are those of `load_negative`, further options those of the
        constructor. The default solver is the pipeline's scheduler where that is DPM-Solver++, DDIM
        or Euler, and else DPM-Solver++.

        Raises UserError where the pipeline is of another family or is offloaded, where a negative
        is attached to it, and for all that `load_negative` refuses.
        """
        adapter = adapter_of(pipe)
        denoiser = getattr(pipe, adapter.denoiser_name)
        denoiser = getattr(denoiser, "_orig_mod", denoiser)  # torch.compile's wrapper
        _check_pipeline(pipe, denoiser, adapter.family)
        solver_of_scheduler = {scheduler: name for name, scheduler in SOLVERS.items()}
        solver = solver_of_scheduler.get(type(pipe.scheduler).__name__, "dpm++")
        loaded = None
        if negative is not None:
            schedule = ScheduleFacts.of(adapter.schedule, "the pipeline")
            loaded = load_negative(denoiser, negative, alpha=alpha, beta=beta, base=base, schedule=schedule)
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
        """One picture per prompt. `settings` are fields of `SamplerConfig`, such as steps.

        - seeds: one per picture, or the first of consecutive ones, or None for random ones. A
          picture depends only on its seed and prompt, up to float rounding, and not on others of
          the call.
        - negative_prompt: one, or one per picture; None for the family's unconditional branch.
        - height, width: in pixels; None for the model's resolution.
        - progress: called after every step with (steps done, steps in total).
        - cancelled: called before every step; the call ends where it returns true.

        Neither callback may call the sampler. A call that ends early leaves no state behind.

        Raises UserError for bad input, SamplingCancelled where `cancelled` has returned true.
        """
        # Check what can be checked before the lock.
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
            raise UserError(f"pipe: its {self.adapter.denoiser_name} has left {self.device}; make a new sampler")
        with self._lock, torch.no_grad():
            # Encode the prompts of both branches, draw the latents, decode them.
            rows = self._encode(prompts, size)
            negative_rows = self._encode_negative(negative_prompt, len(prompts), size)
            latents = self._latents(rows, negative_rows, seeds, config, shape, progress, cancelled)
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
        """Scaled latents (N, C, H, W) float32 for N seeds, at the adapter's resolution.

        Shapes:
        - prompts: (N, ...), conditioning rows.
        - empty: (1, ...), the negative branch's row.

        Raises UserError and SamplingCancelled like a call.
        """
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
        """Pictures (N, 3, height, width) float32 in [-1, 1] on the CPU; arguments as for `latents`.

        `progress` is called after every batch with the number of pictures that are done.
        """
        images = []
        for start in range(0, len(seeds), config.batch_size):
            batch = slice(start, start + config.batch_size)
            latents = self.latents(_part(prompts, batch), empty, seeds[batch], config)
            with self._lock:
                images.append(self.adapter.decode(latents).cpu())
            if progress is not None:
                progress(min(start + config.batch_size, len(seeds)))
        return torch.cat(images)

    def _encode(self, prompts: list[str], size: tuple[int, int]) -> Conditioning:
        """Conditioning rows (N, ...) of N prompts for pictures of a size in pixels."""
        return self.adapter.sized(self.adapter.encode_prompts(prompts, self.device), *size)

    def _encode_negative(
        self, negative_prompt: str | Sequence[str] | None, count: int, size: tuple[int, int]
    ) -> Conditioning:
        """The negative branch's conditioning rows, (1, ...) or (count, ...).

        Raises UserError for another number of negative prompts.
        """
        if negative_prompt is None:
            return self.adapter.sized(self.adapter.encode_empty(self.device), *size)
        texts = [negative_prompt] if isinstance(negative_prompt, str) else list(negative_prompt)
        if len(texts) not in (1, count):
            raise UserError(f"negative_prompt: {len(texts)} for {count} prompts; give one, or one each")
        return self._encode(texts, size)

    def _latents(
        self,
        prompts: Conditioning,
        negative_prompts: Conditioning,
        seeds: Sequence[int],
        config: SamplerConfig,
        shape: tuple[int, ...],
        progress: Progress | None,
        cancelled: Callable[[], bool] | None,
    ) -> torch.Tensor:
        """Scaled latents (N, *shape) float32, batch by batch. Needs the lock."""
        self.adapter.check_steps(config.steps)
        solver = self._solver(config)
        if config.negative_prompt == "same":
            negative_prompts = prompts
        total, done, latents = config.steps * math.ceil(len(seeds) / config.batch_size), 0, []
        for start in range(0, len(seeds), config.batch_size):
            # The batch's noise, at the variance that the solver starts from.
            batch = slice(start, start + config.batch_size)
            x = start_noise(seeds[batch], shape, self.device)
            if solver.init_scale != 1:
                x = affine_noise(x, torch.tensor([[solver.init_scale, 0.0]], device=self.device), x)
            # Both branches' rows, and the buffers of this shape.
            rows = _join(_part(negative_prompts, batch), _part(prompts, batch), len(x), self.dtype)
            trajectory = self._trajectories.of(x, rows, solver.keeps_x0, config.guidance_rescale)
            trajectory.begin(x, rows, solver)
            # The steps, between which a call can end.
            for step in range(config.steps):
                if cancelled is not None and cancelled():
                    raise SamplingCancelled(f"cancelled after {done} of {total} steps")
                trajectory.step(config.guided(step))
                done += 1
                if progress is not None:
                    progress(done, total)
            # A copy, since the next batch of this shape overwrites the buffer.
            latents.append(trajectory.x.clone())
        return torch.cat(latents)

    def _solver(self, config: SamplerConfig) -> SolverSteps:
        """The coefficients of all steps."""
        scheduler = make_scheduler(config.solver, self.adapter.scheduler_config)
        scheduler.set_timesteps(config.steps)
        return solver_steps(scheduler, w=config.guidance_scale - 1)

    def close(self) -> None:
        """Free the buffers and graphs of all shapes; later calls allocate them again."""
        with self._lock:
            self._trajectories.clear()


def _check_pipeline(pipe, denoiser: nn.Module, family: Family) -> None:
    """Raise UserError where the sampler cannot use the pipeline's denoiser."""
    name = family.denoiser_name
    if has_negative(denoiser):
        raise UserError(f"pipe: a negative is attached to its {name}; detach it, and give it to the sampler")
    if any(hasattr(module, "_hf_hook") for module in denoiser.modules()):
        raise UserError(
            f"pipe: its {name} is offloaded, and the sampler keeps its networks where they are; make the sampler "
            "before enable_model_cpu_offload, or use attach_negative"
        )
    config = config_of(denoiser)
    unguided, unsampled = family.why_unguided(config), family.why_unsampled(config)
    if unguided is not None:
        raise UserError(f"pipe: its {name} {unguided}: there is no negative branch")
    if unsampled is not None:
        raise UserError(f"pipe: its {name} {unsampled}")
    if getattr(pipe, "safety_checker", None) is not None:
        logger.warning("the sampler does not run the pipeline's safety checker")


def _seeds(seeds: int | Sequence[int] | None, count: int) -> list[int]:
    """`count` seeds. Raises UserError for another number of seeds, and for one out of range."""
    if seeds is None:
        return [secrets.randbelow(2**63) for _ in range(count)]
    if isinstance(seeds, int | Integral):  # numpy's integers are Integral
        values = [int(seeds) + i for i in range(count)]
    else:
        values = [int(seed) for seed in seeds]
    if len(values) != count:
        raise UserError(f"seeds: {len(values)} for {count} prompts; give one each, or the first of consecutive ones")
    for seed in values:
        if not 0 <= seed < 2**63:
            raise UserError(f"seeds: {seed} is not possible; expected 0 to 2^63 - 1")
    return values


def _part(rows: Conditioning, part: slice) -> Conditioning:
    """The rows of some pictures; a single row is that of all pictures."""
    return {name: value if len(value) == 1 else value[part] for name, value in rows.items()}


def _join(negative_rows: Conditioning, prompts: Conditioning, batch: int, dtype: torch.dtype) -> Conditioning:
    """(2 B, ...) rows in the network's dtype: the negative branch's, then the prompts'.

    Both are (B, ...) or (1, ...), where B is `batch`.
    """
    pairs = {name: (negative_rows[name], prompts[name]) for name in prompts}
    return {
        name: torch.cat([value.to(dtype).expand(batch, *value.shape[1:]) for value in pair])
        for name, pair in pairs.items()
    }

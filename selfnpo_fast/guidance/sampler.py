"""Guided sampling with a negative model: the fast path.

p = p_neg + guidance_scale (p_pos - p_neg), where guidance_scale is diffusers', omega + 1. Without a
negative model this is plain classifier-free guidance. Next to the networks, a step is one fused
call, which computes guidance, x0 and the solver's step.

Shape letters: B pictures of a batch, N pictures; C, H, W latent channels, height and width.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from selfnpo_fast.diffusion.schedule_facts import ScheduleFacts, check_same_schedule
from selfnpo_fast.diffusion.schedulers import OWN, SOLVERS, described, new_scheduler
from selfnpo_fast.diffusion.solvers import SolverSteps, solver_steps
from selfnpo_fast.guidance.attach import has_negative
from selfnpo_fast.guidance.branches import Branches, joined, rows_of_part
from selfnpo_fast.guidance.finite import check_finite
from selfnpo_fast.guidance.settings import (
    SamplerConfig,
    check_choice,
    check_integer,
    checked_prompts,
    checked_seeds,
    checked_size,
    config_of_call,
)
from selfnpo_fast.guidance.snapshot import Snapshot, check_networks, check_whole
from selfnpo_fast.guidance.trajectory import Trajectories
from selfnpo_fast.models import Adapter, Family, Size, adapter_of
from selfnpo_fast.models.base import Conditioning
from selfnpo_fast.negatives.load import Negative, load_negative
from selfnpo_fast.negatives.weights import config_of
from selfnpo_fast.runtime.attention import ATTENTION
from selfnpo_fast.runtime.batch_or_split import BRANCHES
from selfnpo_fast.runtime.capture import capture_of, own_modes
from selfnpo_fast.runtime.console import logger, say_once
from selfnpo_fast.runtime.dtypes import network_dtype
from selfnpo_fast.runtime.errors import RunError, UserError, shortened
from selfnpo_fast.runtime.images import to_pil
from selfnpo_fast.runtime.limits import MAX_COUNT
from selfnpo_kernels import Draw, NoiseKey, affine_noise, draw_id, normal

OUTPUTS = ("pil", "pt", "latent")
Progress = Callable[[int, int], None]
"""Called with (steps done, steps in total) after every step of a call."""


class SamplingCancelled(RunError):
    """Raised between two steps where the callback `cancelled` has returned true."""


def start_noise(seeds: Sequence[int] | torch.Tensor, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Standard normals (B, *shape) float32 for B seeds; each picture's depend only on its seed.

    The draw is that of sampling, so that no picture starts from the noise of a training rollout.
    The noise of step i of a stochastic solver is the same draw at grid index i.
    """
    ids = torch.as_tensor(seeds, dtype=torch.int64, device=device)
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
    solver: str
    """The solver that was used, as in `dpm++, order 2, sde`, `unipc, order 2`, `ddim` or
    `euler`."""


class GuidedSampler:
    """Draws pictures with a positive and a negative model.

    Any number of threads may call one sampler. Calls take turns: one lock guards the device, the
    buffers and the tokenizers, which are not thread-safe.

    Each shape of batch, picture and solver has static buffers and, on a GPU, one CUDA graph per
    kind of step. The `max_shapes` that were used last are kept.
    """

    def __init__(
        self,
        adapter: Adapter,
        denoiser: nn.Module,
        negative: Negative | None = None,
        *,
        compile: Literal["off", "default", "max"] = "off",
        graphs: bool = True,
        branches: Literal["auto", "batched", "split"] = "auto",
        attention: Literal["auto", "sdpa", "flash", "xformers"] = "auto",
        max_shapes: int = 4,
        solver: Literal["dpm++", "ddim", "euler", "unipc", "own"] = "dpm++",
    ) -> None:
        """A sampler of a family's adapter and its denoiser, which is on the device to run on.

        - negative: None for plain guidance.
        - compile: torch.compile's mode for the repeated blocks.
        - graphs: on a GPU, capture steps as CUDA graphs, compiled or not. The first replay of each
          is compared with the plain step; where they differ, a line says that graphs are off.
        - branches: one batch or two where one network computes both branches; auto takes what is
          faster in the first steps of a shape.
        - attention: kernels of the attention layers, as in `engine.attention`.
        - max_shapes: how many shapes are kept.
        - solver: the default of calls, as in `SamplerConfig`.

        Raises UserError for values that are not possible, a negative of another schedule, attention
        that reaches no layer, and where `solver` is own and no scheduler that the fused step serves.
        """
        check_choice("compile", compile, ("off", "default", "max"))
        if not isinstance(graphs, bool):
            raise UserError(f"graphs: {shortened(graphs)} is not possible; expected True or False")
        check_choice("branches", branches, BRANCHES)
        check_choice("attention", attention, ATTENTION)
        check_integer("max_shapes", max_shapes, 1, MAX_COUNT)
        check_choice("solver", solver, SOLVERS)
        new_scheduler(solver, adapter.scheduler)
        if negative is not None:
            check_same_schedule(negative.schedule, ScheduleFacts.of(adapter.schedule, "the model"))
        self.adapter, self.solver = adapter, solver
        self.device = next(denoiser.parameters()).device
        self.dtype = network_dtype(denoiser)
        self._lock = threading.Lock()
        self._drawing: int | None = None
        """The thread whose turn it is."""
        self._snapshot: Snapshot | None = None
        self._branches = Branches(adapter, denoiser, negative, compile, attention)
        if adapter.boundary is not None and graphs and self.device.type == "cuda":
            say_once("graphs: a model of two experts is not captured, since the host routes samples by their times")
            graphs = False
        capture = capture_of(self.device, graphs, "the sampler's steps", self.dtype)
        longest = adapter.schedule.num_train_timesteps
        self._trajectories = Trajectories(self._branches, branches, capture, most=max_shapes, most_steps=longest)

    @classmethod
    def from_pipeline(
        cls,
        pipe,
        negative: str | Path | nn.Module | Negative | Mapping | None = None,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        base: str | Path | None = None,
        **options,
    ) -> GuidedSampler:
        """A sampler over the networks of a diffusers pipeline, which are neither moved nor changed.

        `negative`, alpha, beta and base are those of `load_negative`, further options those of the
        constructor. The sampler draws with the pipeline as it is now: a call of it raises UserError
        where a part has been replaced or changed since, in weights, adapters, precision, device or
        settings. Make a new sampler then.

        The default solver is own, the pipeline's scheduler as it is configured: DPM-Solver++ or
        UniPC of order 1 or 2, DDIM, Euler, flow Euler, and PNDM as DPM-Solver++(2M).

        Raises UserError where the pipeline is of another family or is offloaded, where a negative
        is attached to it, where it has another scheduler and no `solver` is given, and for all that
        `load_negative` refuses.
        """
        if isinstance(getattr(pipe, "components", None), dict):
            check_whole(pipe)
        adapter = adapter_of(pipe)
        denoiser = adapter.denoiser_of(pipe)
        _check_denoiser(pipe, denoiser, adapter.family)
        options = {"solver": OWN} | options
        loaded = None
        if negative is not None:
            schedule = ScheduleFacts.of(adapter.schedule, "the pipeline")
            loaded = load_negative(denoiser, negative, alpha=alpha, beta=beta, base=base, schedule=schedule)
        sampler = cls(adapter, denoiser, loaded, **options)
        sampler._snapshot = Snapshot(pipe, sampler._branches.given_network)
        return sampler

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

        Neither callback may call the sampler, or wait for a thread that does. A call that ends
        early leaves no state behind.

        Raises UserError for bad input and for a callback that calls the sampler, SamplingCancelled
        where `cancelled` has returned true, and RunError where what was drawn is not finite.
        """
        # Check what can be checked before the lock.
        prompts = checked_prompts("prompts", prompts)
        negative_prompts = None if negative_prompt is None else checked_prompts("negative_prompt", negative_prompt)
        if negative_prompts is not None and len(negative_prompts) not in (1, len(prompts)):
            raise UserError(
                f"negative_prompt: {len(negative_prompts)} for {len(prompts)} prompts; give one, or one each"
            )
        check_choice("output", output, OUTPUTS)
        for name, callback in (("progress", progress), ("cancelled", cancelled)):
            if callback is not None and not callable(callback):
                raise UserError(f"{name}: {shortened(callback)} is not possible; expected a function")
        config = config_of_call({"solver": self.solver} | settings | {"batch_size": batch_size})
        seeds = checked_seeds(seeds, len(prompts))
        size = checked_size(height, width, self.adapter)
        shape = self.adapter.latent_shape_of(size)
        solver, name = self._solver(config, size)
        with self._turn():
            # Encode the prompts of both branches, draw the latents, decode them.
            rows = self._encode(prompts, size)
            negative_rows = self._encode_negative(negative_prompts, size)
            latents = self._latents(rows, negative_rows, seeds, config, solver, shape, progress, cancelled)
            images = latents.cpu() if output == "latent" else self.adapter.decode(latents).cpu()
            self._check(images, latents, seeds, config)
        return Drawn(images=to_pil(images, least_side=0) if output == "pil" else images, seeds=seeds, solver=name)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """This thread's turn, without gradients.

        Raises UserError for a callback that calls its own sampler, which would wait for itself, and
        where the pipeline has changed.
        """
        if self._drawing == threading.get_ident():
            raise UserError("sampler: progress and cancelled may not call the sampler that calls them")
        with self._lock, own_modes(self.device):
            self._drawing = threading.get_ident()
            try:
                if self._snapshot is not None:
                    self._snapshot.check()
                if next(self._branches.positive.parameters()).device != self.device:
                    name = self.adapter.denoiser_name
                    raise UserError(f"pipe: its {name} has left {self.device}; make a new sampler")
                self._trajectories.follow()
                yield
            finally:
                self._drawing = None

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

        Raises UserError, SamplingCancelled and RunError like a call.
        """
        shape, (solver, _) = self.adapter.latent_shape, self._solver(config, self.adapter.size)
        with self._turn():
            latents = self._latents(prompts, empty, seeds, config, solver, shape, progress, cancelled)
            self._check(latents, latents, seeds, config)
        return latents

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
        images, shape, (solver, _) = [], self.adapter.latent_shape, self._solver(config, self.adapter.size)
        for start in range(0, len(seeds), config.batch_size):
            batch = slice(start, start + config.batch_size)
            with self._turn():
                latents = self._latents(rows_of_part(prompts, batch), empty, seeds[batch], config, solver, shape)
                pictures = self.adapter.decode(latents).cpu()
                self._check(pictures, latents, seeds[batch], config)
            images.append(pictures)
            if progress is not None:
                progress(min(start + config.batch_size, len(seeds)))
        return torch.cat(images)

    def _encode(self, prompts: list[str], size: Size) -> Conditioning:
        """Conditioning rows (N, ...) of N prompts for pictures of a size in pixels."""
        return self.adapter.sized(self.adapter.encode_prompts(prompts, self.device), size)

    def _encode_negative(self, negative_prompts: list[str] | None, size: Size) -> Conditioning:
        """The negative branch's conditioning rows, (1, ...) or (N, ...)."""
        if negative_prompts is None:
            return self.adapter.sized(self.adapter.encode_empty(self.device), size)
        return self._encode(negative_prompts, size)

    def _solver(self, config: SamplerConfig, size: Size) -> tuple[SolverSteps, str]:
        """The coefficients of all steps for pictures of a size in pixels, and the solver's name."""
        self.adapter.check_steps(config.steps)
        scheduler = new_scheduler(config.solver, self.adapter.scheduler)
        self.adapter.set_timesteps(scheduler, config.steps, size)
        if len(scheduler.timesteps) != config.steps:
            raise UserError(
                f"steps: {config.steps} lead to {len(scheduler.timesteps)} timesteps of {type(scheduler).__name__} "
                f"with {scheduler.config.timestep_spacing} spacing; take another number"
            )
        w, output = [scale - 1 for scale in config.scales], self.adapter.schedule.prediction
        solver = solver_steps(scheduler, w=w, eta=config.eta, prediction_type=output)
        return solver, described(scheduler)

    def _latents(
        self,
        prompts: Conditioning,
        negative_prompts: Conditioning,
        seeds: Sequence[int],
        config: SamplerConfig,
        solver: SolverSteps,
        shape: tuple[int, ...],
        progress: Progress | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> torch.Tensor:
        """Scaled latents (N, *shape) float32, batch by batch. Needs the turn."""
        if config.negative_prompt == "same":
            negative_prompts = prompts
        total, done, latents = config.steps * math.ceil(len(seeds) / config.batch_size), 0, []
        for start in range(0, len(seeds), config.batch_size):
            # The batch's noise, at the variance that the solver starts from.
            batch = slice(start, start + config.batch_size)
            ids = torch.tensor(seeds[batch], dtype=torch.int64, device=self.device)
            x = start_noise(ids, shape, self.device)
            if solver.init_scale != 1:
                x = affine_noise(x, torch.tensor([[solver.init_scale, 0.0]], device=self.device), x)
            # Both branches' rows, and the buffers of this shape.
            rows = joined(rows_of_part(negative_prompts, batch), rows_of_part(prompts, batch), len(x), self.dtype)
            trajectory = self._trajectories.of(x, rows, solver, config.guidance_rescale)
            trajectory.begin(x, rows, solver, ids)
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

    def _check(self, result: torch.Tensor, latents: torch.Tensor, seeds: Sequence[int], config: SamplerConfig) -> None:
        """Raise RunError where a call's result, latents or pictures of them, is not finite."""
        networks = {self.adapter.denoiser_name: self._branches.positive, "negative": self._branches.negative}
        networks["autoencoder"] = getattr(self.adapter, "vae", None) if result is not latents else None
        check_finite(result, latents, seeds, config.scale_text, networks)

    def close(self) -> None:
        """Free the buffers and graphs of all shapes; later calls allocate them again."""
        with self._turn():
            self._trajectories.clear()


def _check_denoiser(pipe, denoiser: nn.Module, family: Family) -> None:
    """Raise UserError where the sampler cannot use the pipeline's denoiser."""
    name = family.denoiser_name
    if has_negative(denoiser):
        raise UserError(f"pipe: a negative is attached to its {name}; detach it, and give it to the sampler")
    check_networks(pipe, name)
    config = config_of(denoiser)
    unguided, unsampled = family.why_unguided(config), family.why_unsampled(config)
    if unguided is not None:
        raise UserError(f"pipe: its {name} {unguided}: there is no negative branch")
    if unsampled is not None:
        raise UserError(f"pipe: its {name} {unsampled}")
    if getattr(pipe, "safety_checker", None) is not None:
        logger.warning("the sampler does not run the pipeline's safety checker")

"""The operations of `bench_ops.py`: each as ours, in eager PyTorch, and as torch.compile gets it.

`tdft_step` is in `tdft.py`, `ema_update` in `ema.py`.

A case runs in one of two mixtures of dtypes. "fp32" is float32 throughout. "bf16" has the dtypes
of a bf16 run:

- sampling ops (normal, affine_noise, guided_step, guidance_rescale): bfloat16, as in a pipeline
- training ops (tdft_step, x0_loss): bfloat16 network outputs, float32 states
- ema_update: bfloat16 live weights and shadows, float32 masters

Eager is what people run: diffusers' DDIMScheduler (`step`, `add_noise`), its classifier-free
guidance and `rescale_noise_cfg`, `torch.randn`, autograd. A scheduler takes one timestep for the
whole batch. In `tdft_step` the samples have different timesteps, so the arithmetic of `step` is
written out with coefficients that are gathered per sample. The compiled functions are that
arithmetic without the scheduler object, whose Python integers would cause a recompilation at every
step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from diffusers import DDIMScheduler, UniPCMultistepScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from selfnpo_fast.diffusion.levels import Levels, ddim_coefficients, forward_coefficients, x0_coefficients
from selfnpo_fast.diffusion.solvers import solver_steps
from selfnpo_kernels import (
    Draw,
    NoiseKey,
    affine_noise,
    backends,
    draw_id,
    guidance_rescale,
    guided_step,
    normal,
    x0_loss,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Dtype of network outputs by mixture."""
GRID_STEPS = 25
GUIDANCE_SCALE = 7.5
RESCALE = 0.7
HUBER_C = 1e-3
SEED = 2**40 + 7
FIRST_ID = 2**33
REFERENCE_ROWS = 4
"""Samples whose noise the gate draws again with the reference backend.

The noise of a sample depends only on its id, so a few samples suffice.
"""


class Comparison(NamedTuple):
    """Two tensors that the gate compares."""

    what: str
    """Name of the tensors in a failure's message."""
    found: torch.Tensor
    truth: torch.Tensor
    coarse: bool = False
    """Whether `found` was rounded after every operation, as eager bfloat16 is."""


def scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.5's noise levels on the authors' grid {39, 79, ..., 999}."""
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    ddim = DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing")
    ddim.set_timesteps(GRID_STEPS)
    return ddim


def compile_plain(plain: Callable, device: torch.device) -> Callable:
    """torch.compile with the fastest settings for these functions: static shapes, no graph breaks.

    On a CPU inductor draws normals one at a time, far slower than torch.randn; with
    `fallback_random` it calls torch.randn.
    """
    options = {"fallback_random": True} if device.type == "cpu" else {}
    return torch.compile(plain, dynamic=False, fullgraph=True, options=options)


def column(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """values (B,), with axes of size 1 added so that they broadcast over `like` (B, ...)."""
    return values.view(-1, *[1] * (like.ndim - 1))


def moments(what: str, z: torch.Tensor) -> Iterator[Comparison]:
    """Tests whether z can be standard normal.

    Compares the amounts by which mean and variance exceed six standard errors with 0.
    """
    n, wide = z.numel(), z.double()
    for name, deviation, error in (
        ("mean", wide.mean(), 1 / math.sqrt(n)),
        ("variance", wide.var() - 1, math.sqrt(2 / n)),
    ):
        excess = (deviation.abs() - 6 * error).clamp(min=0).view(1)
        yield Comparison(f"{what}: {name} of the noise", excess, torch.zeros_like(excess))


class Op:
    """An op on latents of one shape in one mixture of dtypes.

    Subclasses define `ours`, `eager` and `plain`, the function that is compiled. All three take
    `inputs` and return tensors that are named by `outputs`.
    """

    outputs: tuple[str, ...] = ()
    """Names of the results, in order."""
    cycle = 1
    """Calls after which the work repeats: a timed sample has to consist of whole cycles."""
    reads_back: tuple[str, ...] = ()
    """Arms that wait for values of the device, which a CUDA graph cannot hold."""

    def __init__(self, shape: tuple[int, ...], dtype: str, device: torch.device) -> None:
        self.shape, self.batch, self.device = shape, shape[0], device
        self.torch_dtype, self.dtype = DTYPES[dtype], dtype
        self.elements = math.prod(shape)
        self.generator = torch.Generator(device).manual_seed(0)
        self.scheduler = scheduler()
        self.schedule = Levels.of(self.scheduler)
        self.alphas_cumprod = self.scheduler.alphas_cumprod.to(device)  # the scheduler's copy stays on the host
        self.inputs: tuple = ()
        self.build()

    def build(self) -> None:
        """Sets `inputs` and everything else that the arms need."""

    def random(self, dtype: torch.dtype) -> torch.Tensor:
        """Standard normals (B, ...) in `dtype`."""
        return torch.randn(self.shape, generator=self.generator, device=self.device).to(dtype)

    def timesteps(self) -> torch.Tensor:
        """Random timesteps (B,) int64 in 1..999."""
        return torch.randint(1, 1000, (self.batch,), generator=self.generator, device=self.device)

    def ids(self) -> torch.Tensor:
        """Sample ids (B,) int64."""
        return torch.arange(FIRST_ID, FIRST_ID + self.batch, device=self.device)

    def arms(self) -> dict[str, Callable[[], object]]:
        """The timed functions by arm, except for the compiled one and the floor.

        Each call returns new functions: those with a state begin it anew.
        """
        return {"ours": lambda: self.ours(*self.inputs), "eager": lambda: self.eager(*self.inputs)}

    @functools.cached_property
    def plain_compiled(self) -> Callable:
        """`plain` under torch.compile, which compiles it at its first call."""
        return compile_plain(self.plain, self.device)

    def compiled(self) -> Callable[[], object]:
        """The compiled arm, new for each call as those of `arms`."""
        return lambda: self.plain_compiled(*self.inputs)

    def check(self) -> Iterator[Comparison]:
        """Compares ours, and eager in the case's mixture, with eager in float32."""
        truth = self.eager(*(t.float() for t in self.inputs))
        found, eager = self.ours(*self.inputs), self.eager(*self.inputs)
        for name, ours, theirs, right in zip(self.outputs, found, eager, truth, strict=True):
            yield Comparison(name, ours, right)
            yield Comparison(f"eager {name}", theirs, right, coarse=True)

    def check_compiled(self, compiled: Callable[[], object]) -> Iterator[Comparison]:
        """Compares the results of the compiled arm with eager in float32."""
        truth = self.eager(*(t.float() for t in self.inputs))
        for name, found, right in zip(self.outputs, compiled(), truth, strict=True):
            yield Comparison(f"compiled {name}", found, right, coarse=True)


class Normal(Op):
    """`normal` against torch.randn."""

    def ours(self, rows: int | None = None):
        key = NoiseKey(SEED, self.sample_ids[:rows], draw_id(Draw.START_NOISE))
        return normal(key, self.shape[1:], self.torch_dtype)

    def build(self) -> None:
        self.sample_ids = self.ids()

    def eager(self):
        return torch.randn(self.shape, dtype=self.torch_dtype, device=self.device)

    plain = eager

    def check(self) -> Iterator[Comparison]:
        with backends.use("reference"):
            key = NoiseKey(SEED, self.sample_ids[:REFERENCE_ROWS], draw_id(Draw.START_NOISE))
            truth = normal(key, self.shape[1:])
        yield Comparison("normals (reference)", self.ours()[:REFERENCE_ROWS], truth)
        yield from moments("ours", self.ours())
        yield from moments("eager", self.eager())

    def check_compiled(self, compiled) -> Iterator[Comparison]:
        yield from moments("compiled", compiled())


class AffineNoise(Op):
    """`affine_noise` with a key against `randn_like` and the scheduler's `add_noise`.

    Every sample has its timestep.
    """

    def build(self) -> None:
        self.inputs = (self.random(self.torch_dtype),)
        self.s = self.timesteps()
        self.k = forward_coefficients(self.schedule, torch.arange(1000)).float().to(self.device)
        self.key = NoiseKey(SEED, self.ids(), draw_id(Draw.RENOISE))

    def ours(self, x):
        return affine_noise(x, self.k, self.key, index=self.s)

    def eager(self, x, noise=None):
        return self.scheduler.add_noise(x, torch.randn_like(x) if noise is None else noise, self.s)

    def plain(self, x):
        a = self.alphas_cumprod.to(x.dtype)[self.s]  # in x's dtype, as in `add_noise`
        return column(a**0.5, x) * x + column((1 - a) ** 0.5, x) * torch.randn_like(x)

    def check(self) -> Iterator[Comparison]:
        (x,), rows = self.inputs, slice(REFERENCE_ROWS)
        noise = self.random(self.torch_dtype)
        given = affine_noise(x, self.k, noise, index=self.s)
        yield Comparison("noise given", given, self.eager(x.float(), noise.float()))
        with backends.use("reference"):
            key = NoiseKey(SEED, self.key.sample_ids[rows], self.key.draws)
            truth = affine_noise(x[rows].float(), self.k, key, index=self.s[rows])
        yield Comparison("noise drawn (reference)", self.ours(x)[rows], truth)
        yield from self.noise_of("eager", self.eager(x))

    def noise_of(self, name: str, out: torch.Tensor) -> Iterator[Comparison]:
        """Tests the noise in an arm's output (B, ...).

        Not in bfloat16, where `add_noise` rounds its coefficients too coarsely.
        """
        if self.dtype == "fp32":
            signal, fresh = self.k[self.s].unbind(1)
            yield from moments(name, (out - column(signal, out) * self.inputs[0]) / column(fresh, out))

    def check_compiled(self, compiled) -> Iterator[Comparison]:
        yield from self.noise_of("compiled", compiled())


class GuidedStep(Op):
    """`guided_step` in the middle of the grid against eager guidance and the scheduler's `step`."""

    outputs = ("x_next", "x0")

    def build(self) -> None:
        self.inputs = (self.random(self.torch_dtype), self.random(self.torch_dtype), self.random(self.torch_dtype))
        self.t = self.scheduler.timesteps[GRID_STEPS // 2]
        now, then = (t.view(1) for t in (self.t, self.t - 1000 // GRID_STEPS))
        self.k = ddim_coefficients(self.schedule, now, then, GUIDANCE_SCALE - 1).float().to(self.device)
        self.levels = self.alphas_cumprod[now.item()], self.alphas_cumprod[then.item()]

    def ours(self, pos, neg, x):
        return guided_step(pos, neg, x, self.k)

    def combine(self, pos, neg):
        """diffusers' classifier-free guidance."""
        return neg + GUIDANCE_SCALE * (pos - neg)

    def eager(self, pos, neg, x):
        return self.scheduler.step(self.combine(pos, neg), self.t, x, return_dict=False)

    def plain(self, pos, neg, x):
        pred, (a, a_prev) = self.combine(pos, neg), self.levels
        x0 = (x - (1 - a) ** 0.5 * pred) / a**0.5
        return a_prev**0.5 * x0 + (1 - a_prev) ** 0.5 * pred, x0


class GuidedStepSingle(GuidedStep):
    """`guided_step` at w = -1, which uses only the unconditional branch."""

    def build(self) -> None:
        super().build()
        self.inputs = self.inputs[1:]

    def ours(self, neg, x):
        return guided_step(None, neg, x, self.k)

    def eager(self, neg, x):
        return self.scheduler.step(neg, self.t, x, return_dict=False)

    def plain(self, neg, x):
        return super().plain(neg, neg, x)

    def combine(self, pos, neg):
        return neg


class GuidedStepUniPC(GuidedStep):
    """`guided_step` in the middle of UniPC's trajectory, whose corrector needs the x0 of two steps
    before, against eager guidance and the scheduler's `step`."""

    reads_back = ("eager",)  # it solves for the corrector's coefficients at every step

    def build(self) -> None:
        # The states have the size of those of a trajectory, and x is what diffusers predicts from
        # `last`, to which its corrector goes back.
        self.at = GRID_STEPS // 2
        self.unipc = UniPCMultistepScheduler.from_config(self.scheduler.config)
        self.unipc.set_timesteps(GRID_STEPS)
        self.k = solver_steps(self.unipc, w=GUIDANCE_SCALE - 1).k[self.at : self.at + 1].float().to(self.device)
        pos, neg, self.last, m1, m2 = (self.random(self.torch_dtype) for _ in range(5))
        self.set_state(self.at - 1, m1.float(), m2.float())
        x = self.unipc.multistep_uni_p_bh_update(model_output=None, sample=self.last.float(), order=2)
        self.inputs = (pos, neg, x.to(self.torch_dtype), m1, m2)

    def set_state(self, step: int, m1: torch.Tensor, m2: torch.Tensor) -> None:
        """Put the scheduler before a step of second order, after the x0 of two steps, m2 and m1."""
        self.unipc._step_index, self.unipc.model_outputs = step, [m2, m1]
        self.unipc.last_sample = self.last.to(m1.dtype)
        self.unipc.this_order = self.unipc.lower_order_nums = 2

    def ours(self, pos, neg, x, m1, m2):
        return guided_step(pos, neg, x, self.k, x0_prev=m1, x0_prev2=m2)

    def eager(self, pos, neg, x, m1, m2):
        self.set_state(self.at, m1, m2)
        (x_next,) = self.unipc.step(self.combine(pos, neg), self.unipc.timesteps[self.at], x, return_dict=False)
        return x_next, self.unipc.model_outputs[-1]

    def plain(self, pos, neg, x, m1, m2):
        """With the corrector in the coefficients, as ours."""
        k, p = self.k[0], self.combine(pos, neg)
        return k[2] * x + k[3] * p + k[4] * m1 + k[7] * m2, k[0] * x + k[1] * p


class GuidanceRescale(GuidedStep):
    """`guidance_rescale` and `guided_step` against diffusers' chain with `rescale_noise_cfg`."""

    def ours(self, pos, neg, x):
        return guided_step(pos, neg, x, self.k, scale=guidance_rescale(pos, neg, self.k, RESCALE))

    def combine(self, pos, neg):
        return rescale_noise_cfg(super().combine(pos, neg), pos, guidance_rescale=RESCALE)


class X0Loss(Op):
    """`x0_loss` (Huber), forward and backward, against the authors' loss under autograd."""

    outputs = ("loss", "loss per sample", "gradient")

    def build(self) -> None:
        pred, x_s = self.random(self.torch_dtype), self.random(torch.float32)
        self.s = self.timesteps()
        self.k = x0_coefficients(self.schedule, torch.arange(1000)).float().to(self.device)
        # Targets differ from the estimate by 0.1 or more: where the difference is less than c, the
        # slope multiplies every rounding error by 1 / c.
        offset = self.random(torch.float32)
        target = self.estimate(pred, x_s) + offset + torch.where(offset < 0, -0.1, 0.1)
        self.weight = torch.rand(self.batch, generator=self.generator, device=self.device) + 0.5
        self.inputs = (pred, x_s, target)

    def estimate(self, pred, x_s):
        """The student's x0 (B, ...) from its output pred and its input x_s, both (B, ...)."""
        a = self.alphas_cumprod[self.s]
        return (x_s - column((1 - a).sqrt(), x_s) * pred) / column(a.sqrt(), x_s)

    def plain(self, pred, x_s, target):
        d = self.estimate(pred, x_s) - target
        per_sample = (torch.sqrt(d**2 + HUBER_C**2) - HUBER_C).flatten(1).mean(1)
        return (per_sample * self.weight).mean(), per_sample.detach()

    @staticmethod
    @torch.enable_grad()
    def with_gradient(loss, pred, x_s, target):
        """Runs a loss forward and backward: (loss, loss per sample (B,), gradient of pred)."""
        pred = pred.detach().requires_grad_(True)
        value, per_sample = loss(pred, x_s, target)
        (gradient,) = torch.autograd.grad(value, pred)
        return value.detach(), per_sample, gradient

    def our_loss(self, pred, x_s, target):
        return x0_loss(pred, x_s, target, self.k, "huber", self.weight, HUBER_C, index=self.s)

    def ours(self, *inputs):
        return self.with_gradient(self.our_loss, *inputs)

    def eager(self, *inputs):
        return self.with_gradient(self.plain, *inputs)

    def compiled(self):
        return lambda: self.with_gradient(self.plain_compiled, *self.inputs)

"""The operations of `bench_ops.py`: each as ours, as eager PyTorch, and as the function that torch.compile gets.

Mixtures: "fp32" is float32 throughout. "bf16" has what a bf16 run has: sampling ops (normal, affine_noise, guided_step,
guidance_rescale) all in bfloat16, as a diffusers pipeline; training ops (tdft_step, x0_loss) bfloat16 network outputs
beside float32 states; ema_update bfloat16 live weights and shadows beside float32 masters.

Eager is what people run: diffusers' DDIMScheduler (`step`, `add_noise`), its classifier-free guidance and
`rescale_noise_cfg`, `torch.randn`, autograd. A scheduler serves one timestep for the whole batch, and in `tdft_step`
every sample has its own, so there the arithmetic of `step` is written out with coefficients gathered per sample. The
compiled functions are that arithmetic without the scheduler object, whose Python integers would recompile at each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from diffusers import DDIMScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from benchmarks.nets import NETS
from selfnpo_fast.diffusion.schedule import NoiseSchedule, ddim_coefficients, forward_coefficients, x0_coefficients
from selfnpo_kernels import (
    Draw,
    NoiseKey,
    affine_noise,
    backends,
    draw_id,
    ema_update,
    guidance_rescale,
    guided_step,
    normal,
    x0_loss,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GRID_STEPS = 25
GUIDANCE_SCALE = 7.5
RESCALE = 0.7
DECAY = 0.999
HUBER_C = 1e-3
SEED = 2**40 + 7
FIRST_ID = 2**33
REFERENCE_ROWS = 4
"""Samples whose noise the gate draws anew with the reference backend; a sample's noise depends on its own id alone."""


class Comparison(NamedTuple):
    """Two tensors that the gate holds against each other."""

    what: str
    found: torch.Tensor
    truth: torch.Tensor
    coarse: bool = False
    """Whether `found` was rounded after every operation, as eager bfloat16 is."""


def scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.5's noise levels on the authors' grid {39, 79, ..., 999}."""
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    made = DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing")
    made.set_timesteps(GRID_STEPS)
    return made


def compile_plain(plain: Callable, device: torch.device) -> Callable:
    """torch.compile at its best for these functions: shapes known, no graph breaks.

    On a CPU inductor draws normals one at a time, far slower than torch.randn; `fallback_random` calls the latter.
    """
    options = {"fallback_random": True} if device.type == "cpu" else {}
    return torch.compile(plain, dynamic=False, fullgraph=True, options=options)


def column(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B,) shaped to broadcast over (B, ...)."""
    return values.view(-1, *[1] * (like.ndim - 1))


def moments(what: str, z: torch.Tensor) -> Iterator[Comparison]:
    """Whether z could be standard normal: mean and variance in excess of six standard errors, against 0."""
    n, wide = z.numel(), z.double()
    for name, off, error in (
        ("mean", wide.mean(), 1 / math.sqrt(n)),
        ("variance", wide.var() - 1, math.sqrt(2 / n)),
    ):
        excess = (off.abs() - 6 * error).clamp(min=0).view(1)
        yield Comparison(f"{what}: {name} of the noise", excess, torch.zeros_like(excess))


class Op:
    """An op on one latent shape in one mixture.

    `ours`, `eager` and `plain` (which is compiled) take `inputs` and return tensors named by `outputs`. `cycle` calls
    make one period, of which a sample has to hold whole ones.
    """

    outputs: tuple[str, ...] = ()
    training = False
    cycle = 1

    def __init__(self, shape: tuple[int, ...], dtype: str, device: torch.device) -> None:
        self.shape, self.batch, self.device = shape, shape[0], device
        self.low, self.dtype = DTYPES[dtype], dtype
        self.elements = math.prod(shape)
        self.generator = torch.Generator(device).manual_seed(0)
        self.scheduler = scheduler()
        self.schedule = NoiseSchedule.from_scheduler(self.scheduler)
        self.alphas_cumprod = self.scheduler.alphas_cumprod.to(device)  # the scheduler keeps its own on the host
        self.inputs: tuple = ()
        self.build()

    def build(self) -> None:
        """Make `inputs` and what else the arms need."""

    def random(self, dtype: torch.dtype) -> torch.Tensor:
        """Normals (B, ...)."""
        return torch.randn(self.shape, generator=self.generator, device=self.device).to(dtype)

    def timesteps(self) -> torch.Tensor:
        """A timestep for each sample, (B,)."""
        return torch.randint(1, 1000, (self.batch,), generator=self.generator, device=self.device)

    def ids(self) -> torch.Tensor:
        """Sample ids (B,)."""
        return torch.arange(FIRST_ID, FIRST_ID + self.batch, device=self.device)

    def arms(self) -> dict[str, Callable[[], object]]:
        """What is timed, compiled and floor apart."""
        return {"ours": lambda: self.ours(*self.inputs), "eager": lambda: self.eager(*self.inputs)}

    def compiled(self) -> Callable[[], object]:
        """The plain function under torch.compile; its first call compiles."""
        run = compile_plain(self.plain, self.device)
        return lambda: run(*self.inputs)

    def check(self) -> Iterator[Comparison]:
        """Ours and the timed eager chain against the eager chain in float32."""
        truth = self.eager(*(t.float() for t in self.inputs))
        found, eager = self.ours(*self.inputs), self.eager(*self.inputs)
        for name, ours, theirs, right in zip(self.outputs, found, eager, truth, strict=True):
            yield Comparison(name, ours, right)
            yield Comparison(f"eager {name}", theirs, right, coarse=True)

    def check_compiled(self, compiled: Callable[[], object]) -> Iterator[Comparison]:
        """What the compiled function returns, likewise."""
        truth = self.eager(*(t.float() for t in self.inputs))
        for name, found, right in zip(self.outputs, compiled(), truth, strict=True):
            yield Comparison(f"compiled {name}", found, right, coarse=True)


class Normal(Op):
    """`normal` against torch.randn."""

    def ours(self, rows: int | None = None):
        key = NoiseKey(SEED, self.sample_ids[:rows], draw_id(Draw.START_NOISE))
        return normal(key, self.shape[1:], self.low)

    def build(self) -> None:
        self.sample_ids = self.ids()

    def eager(self):
        return torch.randn(self.shape, dtype=self.low, device=self.device)

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
    """`affine_noise` with a key against `randn_like` and the scheduler's `add_noise`, every sample at its timestep."""

    def build(self) -> None:
        self.inputs = (self.random(self.low),)
        self.s = self.timesteps()
        self.k = forward_coefficients(self.schedule, torch.arange(1000)).float().to(self.device)
        self.key = NoiseKey(SEED, self.ids(), draw_id(Draw.RENOISE))

    def ours(self, x):
        return affine_noise(x, self.k, self.key, index=self.s)

    def eager(self, x, noise=None):
        return self.scheduler.add_noise(x, torch.randn_like(x) if noise is None else noise, self.s)

    def plain(self, x):
        a = self.alphas_cumprod.to(x.dtype)[self.s]  # in x's dtype, as `add_noise` has it
        return column(a**0.5, x) * x + column((1 - a) ** 0.5, x) * torch.randn_like(x)

    def check(self) -> Iterator[Comparison]:
        (x,), rows = self.inputs, slice(REFERENCE_ROWS)
        noise = self.random(self.low)
        given = affine_noise(x, self.k, noise, index=self.s)
        yield Comparison("noise given", given, self.eager(x.float(), noise.float()))
        with backends.use("reference"):
            key = NoiseKey(SEED, self.key.sample_ids[rows], self.key.draws)
            truth = affine_noise(x[rows].float(), self.k, key, index=self.s[rows])
        yield Comparison("noise drawn (reference)", self.ours(x)[rows], truth)
        yield from self.noise_of("eager", self.eager(x))

    def noise_of(self, name: str, out: torch.Tensor) -> Iterator[Comparison]:
        """The noise in an arm's output; in bfloat16 `add_noise` rounds its coefficients too coarsely to look."""
        if self.dtype == "fp32":
            signal, fresh = self.k[self.s].unbind(1)
            yield from moments(name, (out - column(signal, out) * self.inputs[0]) / column(fresh, out))

    def check_compiled(self, compiled) -> Iterator[Comparison]:
        yield from self.noise_of("compiled", compiled())


class GuidedStep(Op):
    """`guided_step` against classifier-free guidance and the scheduler's `step`, in the middle of the grid."""

    outputs = ("x_next", "x0")

    def build(self) -> None:
        self.inputs = (self.random(self.low), self.random(self.low), self.random(self.low))
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
    """The same at w = -1: the unconditional branch alone."""

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


class GuidanceRescale(GuidedStep):
    """`guidance_rescale` and `guided_step` against diffusers' chain with `rescale_noise_cfg`."""

    def ours(self, pos, neg, x):
        return guided_step(pos, neg, x, self.k, scale=guidance_rescale(pos, neg, self.k, RESCALE))

    def combine(self, pos, neg):
        return rescale_noise_cfg(super().combine(pos, neg), pos, guidance_rescale=RESCALE)


class X0Loss(Op):
    """`x0_loss` (Huber), forward and backward, against the authors' loss under autograd."""

    outputs = ("loss", "loss per sample", "gradient")
    training = True

    def build(self) -> None:
        pred, x_s = self.random(self.low), self.random(torch.float32)
        self.s = self.timesteps()
        self.k = x0_coefficients(self.schedule, torch.arange(1000)).float().to(self.device)
        # Targets at .1 or more from the estimate: nearer than c, the slope multiplies every rounding by 1 / c.
        off = self.random(torch.float32)
        target = self.estimate(pred, x_s) + off + torch.where(off < 0, -0.1, 0.1)
        self.weight = torch.rand(self.batch, generator=self.generator, device=self.device) + 0.5
        self.inputs = (pred, x_s, target)

    def estimate(self, pred, x_s):
        """The student's x0."""
        a = self.alphas_cumprod[self.s]
        return (x_s - column((1 - a).sqrt(), x_s) * pred) / column(a.sqrt(), x_s)

    def plain(self, pred, x_s, target):
        d = self.estimate(pred, x_s) - target
        per_sample = (torch.sqrt(d**2 + HUBER_C**2) - HUBER_C).flatten(1).mean(1)
        return (per_sample * self.weight).mean(), per_sample.detach()

    @staticmethod
    @torch.enable_grad()
    def with_gradient(loss, pred, x_s, target):
        """(loss, per sample, gradient) of a loss function."""
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
        run = compile_plain(self.plain, self.device)
        return lambda: self.with_gradient(run, *self.inputs)


class EmaUpdate(Op):
    """`ema_update` against the loop over parameters, with one kernel less than in diffusers' EMAModel."""

    training = True

    def __init__(self, network: str, dtype: str, device: torch.device) -> None:
        self.sizes = [p.shape for p in NETS[network]().network().parameters()]
        super().__init__((sum(size.numel() for size in self.sizes),), dtype, device)

    def build(self) -> None:
        masters = [torch.randn(size, generator=self.generator, device=self.device) for size in self.sizes]
        live = [torch.randn(size, generator=self.generator, device=self.device).to(self.low) for size in self.sizes]
        shadows = [m.to(self.low) for m in masters] if self.low != torch.float32 else []
        self.inputs = (masters, live, shadows)

    def ours(self, masters, live, shadows):
        ema_update(masters, live, shadows, DECAY)

    @torch.no_grad()
    def eager(self, masters, live, shadows):
        for i, (master, new) in enumerate(zip(masters, live, strict=True)):
            master.mul_(DECAY).add_(new, alpha=1 - DECAY)
            if shadows:
                shadows[i].copy_(master)

    plain = eager

    def moved(self, update: Callable) -> list[torch.Tensor]:
        """Masters and shadows, flat, after an update of copies, whose shadows are empty beforehand."""
        masters, live, shadows = ([t.clone() for t in tensors] for tensors in self.inputs)
        update(masters, live, [t.zero_() for t in shadows])
        return [torch.cat([t.flatten() for t in tensors]) for tensors in (masters, shadows) if tensors]

    def compare(self, name: str, found: list[torch.Tensor]) -> Iterator[Comparison]:
        truth, *_ = self.moved(self.eager)
        for what, tensor in zip(("masters", "shadows"), found, strict=False):
            yield Comparison(f"{name}{what}", tensor, truth)

    def check(self) -> Iterator[Comparison]:
        yield from self.compare("", self.moved(self.ours))
        yield from self.compare("eager ", self.moved(self.eager))

    def check_compiled(self, compiled) -> Iterator[Comparison]:
        """The compiled function works in place: on the inputs themselves, which go on from there."""
        before = self.inputs
        self.inputs = tuple([t.clone() for t in tensors] for tensors in before)
        for shadow in self.inputs[2]:
            shadow.zero_()
        compiled()
        found = [torch.cat([t.flatten() for t in tensors]) for tensors in self.inputs[::2] if tensors]
        self.inputs = before
        yield from self.compare("compiled ", found)

"""The operations: their contracts, and their registration with torch as `selfnpo::<op>`.

`schemas.py` holds the argument lists, `checks.py` what is refused, and `backends.py` decides which
implementation serves a call.

Letters for shapes: B samples; `...` the latent axes, any number of them (C, H, W for images;
F, C, H, W for video); R rows of a coefficient table.

Every op takes row-major tensors of float32, bfloat16 or float16, computes in float32 and rounds
each result once. (The gradient of `x0_loss` is rounded twice: it is computed from a slope that is
kept in the dtype of `pred`.) The network outputs pos and neg share one dtype; the states x, x0_prev
and final share another, and so do x_s and target. A call with a float64 state goes to the reference
backend, which then computes in float64.

Coefficient tables are float32 (R, n). `index` (B,) int64 names the row of each sample. Without an
index, R is B, or 1 where all samples share one row.

Only `x0_loss` has a gradient. The other ops refuse inputs that require one.

Every op raises a ValueError of one line, which names the op and the argument, for a wrong shape,
dtype, device, stride or range. An index outside its table is refused on CPUs only: on a GPU the
host would have to wait for the values, so the kernel reads the memory at that address. Every op
raises `backends.BackendError` (a RuntimeError) where a backend was asked for by name and cannot
serve the call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from selfnpo_kernels import backends, checks, known_lists
from selfnpo_kernels.rng import NoiseKey
from selfnpo_kernels.schemas import SCHEMAS


@dataclass(frozen=True, kw_only=True)
class TdftTables:
    """The coefficients that `tdft_step` reads by grid index, tensors on the device of the states.

    N is the number of grid steps, T the number of training timesteps. Row i + 1 of a table belongs
    to grid index i, and row 0 to t = 0 (grid index -1). Trajectories from noise start at the last
    grid index, N - 1.
    """

    step: torch.Tensor
    """(N + 1 or more, 8) float32: rows of `guided_step`, of which k4, k5 and k7 are not read."""
    start: torch.Tensor
    """(N + 1, 2) float32: coefficients of a clean latent and of noise at each grid index."""
    renoise: torch.Tensor
    """(N + 1, T, 2) float32: coefficients of Eq. 16 from a grid index to a timestep s."""
    timesteps: torch.Tensor
    """(N + 1,) int64: the training timestep of each grid index, ascending from 0."""
    weight: torch.Tensor
    """(N + 1,) float32: weight in the loss of a pair taken at each grid index."""


@dataclass(frozen=True, kw_only=True)
class TdftRules:
    """The numbers and switches of `tdft_step` that stay the same for a whole run."""

    num_prompts: int
    """Number of prompts (or latents), 1 to 2^31 - 1.

    Each epoch of `num_prompts` consecutive sample ids visits every prompt once, in an order that
    depends on the seed and the epoch (`rng.permute`).
    """
    stride: int
    """Number of slots of all ranks: a slot's next sample id is the current one plus `stride`."""
    max_steps: int
    """Largest number of grid steps of a trajectory that starts from data."""
    seed: int
    """Key of all random draws, any 64-bit integer."""
    dropout: float = 0.0
    """Probability that the student is given the empty prompt."""
    shuffled: bool = False
    """Whether the student is given the prompt of another sample."""
    naive: bool = False
    """Eq. 15 (noise added to the target) instead of Eq. 16; needs a `renoise` table of Eq. 15."""


def _signed(seed: int) -> int:
    """The signed 64-bit integer of the schemas that has the same bits as `seed`."""
    return (seed + 2**63) % 2**64 - 2**63


def _noise_arguments(noise: torch.Tensor | NoiseKey | None) -> tuple:
    """(noise, seed, sample_ids, draw, draws) in the order of the schemas."""
    if not isinstance(noise, NoiseKey):
        return noise, 0, None, 0, None
    draws = noise.draws
    if isinstance(draws, torch.Tensor):
        return None, _signed(noise.seed), noise.sample_ids, 0, draws
    return None, _signed(noise.seed), noise.sample_ids, int(draws), None


def normal(key: NoiseKey, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normals (B, *shape) in `dtype`, drawn for a key; `rng.py` defines the numbers.

    Meant for start noise: the other ops draw the noise of a key themselves.
    """
    _, seed, sample_ids, draw, draws = _noise_arguments(key)
    return torch.ops.selfnpo.normal(sample_ids, tuple(shape), seed, draw, draws, dtype)


def affine_noise(
    x: torch.Tensor, k: torch.Tensor, noise: torch.Tensor | NoiseKey, *, index: torch.Tensor | None = None
) -> torch.Tensor:
    """k0 x + k1 noise: forward diffusion, and the re-noising of Eq. 16.

    x: (B, ...).
    k: (R, 2) float32, the columns k0 and k1.
    noise: (B, ...), or the key of the normals to draw.
    Returns (B, ...) in x's dtype.
    """
    checks.no_gradient("affine_noise", x=x, k=k, noise=noise)
    return torch.ops.selfnpo.affine_noise(x, k, index, *_noise_arguments(noise))


def guidance_rescale(
    pos: torch.Tensor, neg: torch.Tensor, k: torch.Tensor, phi: float, *, index: torch.Tensor | None = None
) -> torch.Tensor:
    """The `scale` argument of `guided_step` that gives p the standard deviation of pos.

        p = pos + w (pos - neg)
        scale = phi std(pos) / std(p) + 1 - phi

    Source: Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed, section 3.4;
    the factor of diffusers' rescale_noise_cfg. The standard deviations are over a sample's
    elements.

    pos, neg: (B, ...), at least two elements per sample.
    k: (R, 8) float32, the columns of `guided_step`, of which only w is read.
    phi: 0 to 1.
    Returns (B,) float32.
    """
    checks.no_gradient("guidance_rescale", pos=pos, neg=neg, k=k)
    return torch.ops.selfnpo.guidance_rescale(pos, neg, k, index, phi)


def guided_step(
    pos: torch.Tensor | None,
    neg: torch.Tensor | None,
    x: torch.Tensor,
    k: torch.Tensor,
    *,
    index: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    x0_prev: torch.Tensor | None = None,
    x0_prev2: torch.Tensor | None = None,
    noise: torch.Tensor | NoiseKey | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One solver step under classifier-free guidance (Eq. 1), all in one pass.

        p = scale (pos + w (pos - neg))
        x0 = k0 x + k1 p
        x_next = k2 x + k3 p + k4 x0_prev + k5 noise + k7 x0_prev2

    pos, neg: (B, ...), the raw network outputs. One of them may be None; then p is scale times the
        other one, and w is not read.
    x: (B, ...).
    k: (R, 8) float32, the columns k0 .. k5, w and k7. diffusers' guidance_scale is w + 1.
    scale: (B,) float32 from `guidance_rescale`; 1 where it is None.
    x0_prev: (B, ...) in x's dtype, the x0 of the step before, for multistep solvers. Where it is
        None its term is left out.
    x0_prev2: the same of two steps before, for UniPC.
    noise: (B, ...) or its key, for stochastic solvers. Where it is None its term is left out.
    Returns (x_next, x0), each (B, ...) in x's dtype.
    """
    checks.no_gradient(
        "guided_step", pos=pos, neg=neg, x=x, k=k, scale=scale, x0_prev=x0_prev, x0_prev2=x0_prev2, noise=noise
    )
    return torch.ops.selfnpo.guided_step(pos, neg, x, k, index, scale, x0_prev, x0_prev2, *_noise_arguments(noise))


def tdft_step(
    pos: torch.Tensor | None,
    neg: torch.Tensor | None,
    x: torch.Tensor,
    final: torch.Tensor | None,
    slots: torch.Tensor,
    next_slots: torch.Tensor,
    tables: TdftTables,
    rules: TdftRules,
    latents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Moves every slot of a continuous rollout by one grid step, and returns a pair of each.

    A slot holds the state of one sample. One pass over the states takes the guided step, forms the
    pair of the state before the step (Eq. 16, with a drawn timestep s) and starts a new sample in
    each slot whose sample has ended. Nothing is read back to the host.

    pos, neg: (B, ...), the network outputs of x, as in `guided_step`.
    x: (B, ...), the slots' states. It is overwritten with their next states.
    final: (B, ...) in x's dtype for trajectories from noise: the state in which each slot's
        previous sample ended; it is overwritten when a sample ends. The state at the last grid
        index has no timestep s above it, so the pair at t = 0 of the previous sample takes its
        turn. None for trajectories from data.
    slots: (4, B) int64, with the rows grid index (-1 is t = 0), sample id, number of states that
        follow in this trajectory, and conditioning row (prompt index + 1; row 0 is the empty
        prompt).
    next_slots: (4, B) int64, written: the slots after the step. May not share memory with slots.
    latents: (num_prompts, ...), the scaled latents of trajectories from data; None from noise.

    Returns (target, x_s, pairs, weight):
    target, x_s: (B, ...) in x's dtype.
    pairs: (4, B) int64, with the rows t, s, sample id and the student's conditioning row.
    weight: (B,) float32, the pair's weight in the loss.
    """
    tensors = {"step": tables.step, "start": tables.start, "renoise": tables.renoise, "weight": tables.weight}
    checks.no_gradient("tdft_step", pos=pos, neg=neg, x=x, final=final, latents=latents, **tensors)
    return torch.ops.selfnpo.tdft_step(
        pos, neg, x, final, slots, next_slots,
        tables.step, tables.start, tables.renoise, tables.timesteps, tables.weight, latents,
        rules.num_prompts, rules.stride, rules.max_steps, _signed(rules.seed), rules.dropout,
        rules.shuffled, rules.naive,
    )  # fmt: skip


def x0_loss(
    pred: torch.Tensor,
    x_s: torch.Tensor,
    target: torch.Tensor,
    k: torch.Tensor,
    kind: str,
    weight: torch.Tensor,
    c: float = 1e-3,
    *,
    index: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of Eq. 17 on the student's x0, with its gradient in the same pass.

        d = k0 x_s + k1 pred - target
        "l2": the mean of d^2 (Eq. 17)
        "huber": the mean of sqrt(d^2 + c^2) - c (the pseudo-Huber loss of the authors' code)

    pred, x_s, target: (B, ...).
    k: (R, 2) float32, the columns k0 and k1.
    kind: "l2" or "huber".
    weight: (B,) float32.
    c: the width of the pseudo-Huber loss, 1e-12 or more.

    Returns (loss, per_sample):
    loss: () float32, the mean over the batch of weight times the sample's loss. It carries
        gradients to pred and to nothing else. The forward pass keeps the slope d(loss per element)
        / d(x0), which the backward pass scales.
    per_sample: (B,) float32, the unweighted loss of each sample, detached.

    Raises RuntimeError when the loss is differentiated twice.
    """
    checks.no_gradient("x0_loss", x_s=x_s, target=target, k=k, weight=weight)
    want_slope = torch.is_grad_enabled() and pred.requires_grad
    loss, per_sample, _ = torch.ops.selfnpo.x0_loss(pred, x_s, target, k, index, weight, kind, c, want_slope)
    return loss, per_sample.detach()


@torch.no_grad()
def ema_update(
    masters: Sequence[torch.Tensor], live: Sequence[torch.Tensor], shadows: Sequence[torch.Tensor], decay: float
) -> None:
    """master <- decay master + (1 - decay) live for a whole list of parameters, in one pass.

    masters: float32 tensors of any shapes, each dense in memory; overwritten.
    live: one tensor for each master, of any floating dtype.
    shadows: one tensor for each master, or an empty list. They get the masters' new values, rounded
        to their dtypes.
    decay: 0 to 1.

    live and shadows have the shapes and strides of their masters.

    Lists are checked at the first call with them. Later calls with the same tensors in the same
    memory go straight to the launch (`known_lists.py`).
    """
    torch.ops.selfnpo.ema_update(masters, live, shadows, decay)


# The results without their values, which torch.compile traces with.


def _fake_normal(sample_ids, shape, seed, draw, draws, dtype):
    return sample_ids.new_empty((sample_ids.shape[0], *shape), dtype=dtype)


def _fake_affine_noise(x, *_):
    return torch.empty_like(x)


def _fake_guidance_rescale(pos, neg, *_):
    return pos.new_empty(pos.shape[0], dtype=checks.arithmetic(pos, neg))


def _fake_guided_step(pos, neg, x, *_):
    return torch.empty_like(x), torch.empty_like(x)


def _fake_tdft_step(pos, neg, x, final, slots, *_):
    pairs = torch.empty_like(slots)
    return torch.empty_like(x), torch.empty_like(x), pairs, x.new_empty(x.shape[0], dtype=torch.float32)


def _fake_x0_loss(pred, x_s, target, k, index, weight, kind, c, want_slope):
    dtype = checks.arithmetic(pred, x_s, target)
    slope = torch.empty_like(pred) if want_slope else pred.new_empty(0)
    return pred.new_empty((), dtype=dtype), pred.new_empty(pred.shape[0], dtype=dtype), slope


def _fake_x0_loss_backward(slope, *_):
    return torch.empty_like(slope)


def _fake_ema_update(*_):
    return None


_FAKES: dict[str, Callable] = {name: globals()[f"_fake_{name}"] for name in SCHEMAS}


def _x0_loss_setup(ctx, inputs, output) -> None:
    _, _, _, k, index, weight, *_ = inputs
    _, per_sample, slope = output
    ctx.mark_non_differentiable(per_sample, slope)
    ctx.save_for_backward(slope, k, index, weight)


def _x0_loss_gradients(ctx, grad, *_):
    if torch.is_grad_enabled():
        raise RuntimeError("x0_loss: has no second derivative; call backward or grad without create_graph=True")
    slope, k, index, weight = ctx.saved_tensors
    return torch.ops.selfnpo.x0_loss_backward(slope, k, index, weight, grad), *[None] * 8


def _serve(name: str, *arguments):
    """Checks the arguments, tells autograd which tensors are overwritten, and calls the backend."""
    getattr(checks, name)(*arguments)
    run = backends.implementation(name, arguments)
    if name == "tdft_step":
        pos, neg, x, final, slots, next_slots, *_ = arguments
        # pos and neg are only read, and may be one tensor: each is compared with the states by
        # itself.
        for branch in ({"pos": pos}, {"neg": neg}):
            checks.no_shared_memory(name, x=x, final=final, **branch)
        checks.no_shared_memory(name, slots=slots, next_slots=next_slots)
        torch.autograd.graph.increment_version([t for t in (x, final, next_slots) if t is not None])
    return run(*arguments)


def _serve_ema_update(masters, live, shadows, decay):
    """As `_serve`, but checks lists only at the first call with them."""
    checks.ema_decay(decay)
    if not masters:
        checks.ema_lists(masters, live, shadows)
        return

    def check() -> None:
        checks.ema_lists(masters, live, shadows)
        checks.in_memory("ema_update", masters=masters, live=live, shadows=shadows)

    known = known_lists.CACHE.find((masters, live, shadows), check)
    run = backends.implementation("ema_update", known)
    torch.autograd.graph.increment_version([*masters, *shadows])
    run(masters, live, shadows, decay)


def _traced(name: str, *arguments):
    """Checks the arguments and returns results without values."""
    getattr(checks, name)(*arguments)
    return _FAKES[name](*arguments)


def _register() -> torch.library.Library:
    """Defines every op; the definitions live as long as the returned library."""
    library = torch.library.Library("selfnpo", "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        serve = _serve_ema_update if name == "ema_update" else functools.partial(_serve, name)
        library.impl(name, serve, "CompositeExplicitAutograd")
        torch.library.register_fake(f"selfnpo::{name}", functools.partial(_traced, name), lib=library)
    torch.library.register_autograd("selfnpo::x0_loss", _x0_loss_gradients, setup_context=_x0_loss_setup, lib=library)
    return library


_LIBRARY = _register()

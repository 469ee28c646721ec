"""The operations: schemas, checks, shapes for tracing, autograd, and the functions that people call.

Python owns every schema (`selfnpo::<op>`); `backends.py` says which implementation serves a call. Shape letters: B
samples; `...` the latent axes, any rank (images C, H, W; video F, C, H, W); R rows of a coefficient table.

Every op takes row-major tensors of float32, bfloat16 or float16, computes in float32 and rounds each result once (the
gradient of `x0_loss` twice: it is made of a slope that is kept in the dtype of `pred`). Network outputs share one
dtype, states and what continues them another: pos and neg; x, x0_prev and final; x_s and target. A float64
state takes the call to the reference, which then computes in float64. Coefficient tables are float32 (R, n): `index`
(B,) int64 names each sample's row; without it R is B, or 1 for all samples alike. Ops other than `x0_loss` have no
gradient and refuse inputs that ask for one.

Errors are ValueErrors of one line that name op and argument: shapes, dtypes, devices, strides, ranges. An index that is
in no table is refused on CPUs; a GPU would have to be waited for, and reads what is there. `backends.BackendError` (a
RuntimeError): a backend was asked for by name and cannot serve the call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from selfnpo_kernels import backends, checks
from selfnpo_kernels.rng import NoiseKey

# SymInt: a seed or a draw that changes from call to call is no reason to compile anew.
_NOISE = "SymInt seed, Tensor? sample_ids, SymInt draw, Tensor? draws"
SCHEMAS = {
    "normal": (
        "(Tensor sample_ids, SymInt[] shape, SymInt seed, SymInt draw, Tensor? draws, ScalarType dtype) -> Tensor"
    ),
    "affine_noise": f"(Tensor x, Tensor k, Tensor? index, Tensor? noise, {_NOISE}) -> Tensor",
    "guidance_rescale": "(Tensor pos, Tensor neg, Tensor k, Tensor? index, float phi) -> Tensor",
    "guided_step": (
        "(Tensor? pos, Tensor? neg, Tensor x, Tensor k, Tensor? index, Tensor? scale, Tensor? x0_prev, "
        f"Tensor? noise, {_NOISE}) -> (Tensor, Tensor)"
    ),
    "tdft_step": (
        "(Tensor? pos, Tensor? neg, Tensor(a!) x, Tensor(b!)? final, Tensor slots, Tensor(c!) next_slots, "
        "Tensor step, Tensor start, Tensor renoise, Tensor timesteps, Tensor weight, Tensor? latents, "
        "int items, int stride, int max_steps, int seed, float dropout, bool shuffled, bool naive"
        ") -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "x0_loss": (
        "(Tensor pred, Tensor x_s, Tensor target, Tensor k, Tensor? index, Tensor weight, str kind, float c, "
        "bool slope) -> (Tensor, Tensor, Tensor)"
    ),
    "x0_loss_backward": "(Tensor slope, Tensor k, Tensor? index, Tensor weight, Tensor grad) -> Tensor",
    "ema_update": "(Tensor(a!)[] masters, Tensor[] live, Tensor(b!)[] shadows, float decay) -> ()",
}


@dataclass(frozen=True, kw_only=True)
class TdftTables:
    """What `tdft_step` reads by grid index, on the device; N grid steps, T training timesteps.

    Row i + 1 belongs to grid index i, row 0 to t = 0. The last grid index is the start of trajectories from noise.
    """

    step: torch.Tensor  # (N + 1 or more, 7) float32: k0 .. k5 and w of `guided_step`
    start: torch.Tensor  # (N + 1, 2) float32: forward diffusion to the grid
    renoise: torch.Tensor  # (N + 1, T, 2) float32: Eq. 16 from grid index to timestep s
    timesteps: torch.Tensor  # (N + 1,) int64, ascending from 0
    weight: torch.Tensor  # (N + 1,) float32: the pair's weight in the loss


@dataclass(frozen=True, kw_only=True)
class TdftRules:
    """What `tdft_step` has to know besides."""

    items: int
    """Prompts (or images); a sample's item is a keyed permutation of its id, anew in every epoch of `items` ids."""
    stride: int
    """Slots of all ranks: what a new sample's id is beyond that of the one it follows."""
    max_steps: int
    """Grid steps of a trajectory that starts from data."""
    seed: int
    """Key of all draws, any 64-bit integer."""
    dropout: float = 0.0
    """Probability that the student is given the empty prompt."""
    shuffled: bool = False
    """Whether the student is given another sample's prompt."""
    naive: bool = False
    """Eq. 15 (noise added to the target) instead of Eq. 16; `renoise` has to be made for it."""


def _signed(seed: int) -> int:
    """The same 64 bits as the schema's signed integer."""
    return (seed + 2**63) % 2**64 - 2**63


def _noise_arguments(noise: torch.Tensor | NoiseKey | None) -> tuple:
    """(noise, seed, sample_ids, draw, draws) as the schemas have them."""
    if not isinstance(noise, NoiseKey):
        return noise, 0, None, 0, None
    draws = noise.draws
    if isinstance(draws, torch.Tensor):
        return None, _signed(noise.seed), noise.sample_ids, 0, draws
    return None, _signed(noise.seed), noise.sample_ids, int(draws), None


def normal(key: NoiseKey, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normals (B, *shape) of a key; see `rng.py`. Use it for start noise; the other ops draw their own."""
    _, seed, sample_ids, draw, draws = _noise_arguments(key)
    return torch.ops.selfnpo.normal(sample_ids, tuple(shape), seed, draw, draws, dtype)


def affine_noise(
    x: torch.Tensor, k: torch.Tensor, noise: torch.Tensor | NoiseKey, *, index: torch.Tensor | None = None
) -> torch.Tensor:
    """k0 x + k1 noise: forward diffusion, and the re-noising of Eq. 16.

    x (B, ...); k (R, 2); noise (B, ...) or the key of the normals to draw. Returns (B, ...) in x's dtype.
    """
    checks.no_gradient("affine_noise", x=x, k=k, noise=noise)
    return torch.ops.selfnpo.affine_noise(x, k, index, *_noise_arguments(noise))


def guidance_rescale(
    pos: torch.Tensor, neg: torch.Tensor, k: torch.Tensor, phi: float, *, index: torch.Tensor | None = None
) -> torch.Tensor:
    """The factor of "Common Diffusion Noise Schedules and Sample Steps are Flawed" (Lin et al., section 3.4), (B,).

    phi std(pos) / std(p) + 1 - phi with p = pos + w (pos - neg): the `scale` of `guided_step`, and what diffusers'
    rescale_noise_cfg multiplies by. pos, neg (B, ...); k (R, 7), of which only w is read; float32.
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
    noise: torch.Tensor | NoiseKey | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One solver step under classifier-free guidance (Eq. 6), all in one pass.

        p = scale (pos + w (pos - neg)), or whichever of pos and neg is given alone
        x0 = k0 x + k1 p
        x_next = k2 x + k3 p + k4 x0_prev + k5 noise

    pos, neg (B, ...) raw network outputs; x (B, ...); k (R, 7) holds k0 .. k5 and w; scale (B,) from
    `guidance_rescale`; x0_prev (B, ...) in x's dtype, for DPM-Solver++(2M); noise (B, ...) or its key, for stochastic
    solvers. Without x0_prev or noise its term is left out, whatever k4 or k5 say. diffusers' guidance_scale is w + 1.
    Returns `(x_next, x0)`, each (B, ...) in x's dtype.
    """
    checks.no_gradient("guided_step", pos=pos, neg=neg, x=x, k=k, scale=scale, x0_prev=x0_prev, noise=noise)
    return torch.ops.selfnpo.guided_step(pos, neg, x, k, index, scale, x0_prev, *_noise_arguments(noise))


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
    """Advance every slot of a continuous rollout by one grid step and leave the pair of the state it was in.

    One pass: guided step, Eq. 16, the draw of s, and a new sample wherever one has ended; nothing is asked of the host.
    pos, neg (B, ...) as in `guided_step`. x (B, ...) holds the slots' states and is overwritten with their next ones.
    slots (4, B) int64 is read: grid index (-1 is t = 0), sample id, states left after this one, row of the prompt in
    the conditioning table (item + 1; row 0 is the empty prompt). next_slots (4, B), another tensor, is written.
    From noise (latents None) `final` (B, ...) keeps where each slot's previous sample ended: the state at the last
    grid index has no s above it, and the pair at t = 0 of the sample before takes its place. From data, latents
    (items, ...) are the scaled latents and final is None.

    Returns `(target, x_s, pairs, weight)`: target and x_s (B, ...) in x's dtype; pairs (4, B) int64 with t, s, sample
    id and the student's row; weight (B,) float32.
    """
    checks.no_gradient("tdft_step", pos=pos, neg=neg, x=x, final=final, latents=latents, **vars(tables))
    return torch.ops.selfnpo.tdft_step(
        pos, neg, x, final, slots, next_slots,
        tables.step, tables.start, tables.renoise, tables.timesteps, tables.weight, latents,
        rules.items, rules.stride, rules.max_steps, _signed(rules.seed), rules.dropout, rules.shuffled, rules.naive,
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
    """The loss of Eq. 17 on the student's x0 = k0 x_s + k1 pred, with its gradient in the same pass.

    pred, x_s, target (B, ...); k (R, 2); weight (B,) float32. `kind` "l2" is the mean square (Eq. 17), "huber" the
    authors' pseudo-Huber mean(sqrt(d^2 + c^2) - c). Returns the weighted mean over the batch, a scalar that carries
    gradients to `pred` (and to nothing else), and the unweighted loss per sample (B,), detached. The forward pass
    leaves the slope d(loss per element) / d(x0); the backward pass scales it. Differentiating twice is refused.
    """
    checks.no_gradient("x0_loss", x_s=x_s, target=target, k=k, weight=weight)
    slope = torch.is_grad_enabled() and pred.requires_grad
    loss, per_sample, _ = torch.ops.selfnpo.x0_loss(pred, x_s, target, k, index, weight, kind, c, slope)
    return loss, per_sample.detach()


@torch.no_grad()
def ema_update(
    masters: Sequence[torch.Tensor], live: Sequence[torch.Tensor], shadows: Sequence[torch.Tensor], decay: float
) -> None:
    """master <- decay master + (1 - decay) live, in place, for a whole list of parameters in one pass.

    masters float32; live of any dtype; shadows, one for each master or none at all, get the masters' new values in
    their own dtype. All of equal sizes, row-major or sharing the master's strides.
    """
    torch.ops.selfnpo.ema_update(
        [m.detach() for m in masters], [p.detach() for p in live], [s.detach() for s in shadows], decay
    )


# What tracing has to know: the shapes that come out.


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


def _fake_x0_loss(pred, x_s, target, k, index, weight, kind, c, slope):
    wide = checks.arithmetic(pred, x_s, target)
    rise = torch.empty_like(pred) if slope else pred.new_empty(0)
    return pred.new_empty((), dtype=wide), pred.new_empty(pred.shape[0], dtype=wide), rise


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
    """What every device runs: check, pick the backend, call it, and tell autograd what was overwritten."""
    getattr(checks, name)(*arguments)
    run = backends.implementation(name, arguments)
    if name == "tdft_step":
        pos, neg, x, final, slots, next_slots, *_ = arguments
        for read in ({"pos": pos}, {"neg": neg}):
            checks.apart(name, x=x, final=final, **read)
        checks.apart(name, slots=slots, next_slots=next_slots)
        torch.autograd.graph.increment_version([t for t in (x, final, next_slots) if t is not None])
    elif name == "ema_update":
        torch.autograd.graph.increment_version([*arguments[0], *arguments[2]])
    return run(*arguments)


def _traced(name: str, *arguments):
    getattr(checks, name)(*arguments)
    return _FAKES[name](*arguments)


def _register() -> torch.library.Library:
    library = torch.library.Library("selfnpo", "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        library.impl(name, functools.partial(_serve, name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"selfnpo::{name}", functools.partial(_traced, name), lib=library)
    torch.library.register_autograd("selfnpo::x0_loss", _x0_loss_gradients, setup_context=_x0_loss_setup, lib=library)
    return library


_LIBRARY = _register()

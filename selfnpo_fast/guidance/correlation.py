"""How alike the positive's and the negative's predictions are, and the variance that guidance will have.

Guidance predicts (w + 1) p - w n (Eq. 1, w = guidance_scale - 1). With variances v_p, v_n and covariance c of the two
predictions its variance is

    (w + 1)^2 v_p + w^2 v_n - 2 w (w + 1) c,

which is 2 w^2 + 2 w + 1 for independent predictions of variance 1, and v_p for equal ones. A network that is shown
states of much too large or small a variance leaves the states that it was trained on, and pictures burn out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from selfnpo_fast.diffusion.solvers import solver_steps
from selfnpo_fast.models import Adapter
from selfnpo_fast.models.base import Conditioning
from selfnpo_fast.negatives.load import Negative, as_network, load_negative
from selfnpo_fast.runtime.errors import UserError
from selfnpo_kernels import Draw, NoiseKey, draw_id, guided_step, normal

BOUND = 1.5
"""Largest variance, relative to that of plain guidance at the same timestep, with which an alpha is recommended."""
ALPHAS = tuple(i / 10 for i in range(10, -1, -1))


@dataclass(frozen=True)
class Moments:
    """Second moments of the two predictions at one timestep, over all elements and prompts."""

    timestep: float
    positive: float
    """Variance v_p of p."""
    negative: float
    """Variance v_n of n."""
    covariance: float

    @property
    def rho(self) -> float:
        """The correlation of p and n, -1 to 1."""
        return self.covariance / math.sqrt(self.positive * self.negative)

    def variance_ratio(self, w: float) -> float:
        """Variance of (w + 1) p - w n, divided by that of p."""
        guided = (w + 1) ** 2 * self.positive + w**2 * self.negative - 2 * w * (w + 1) * self.covariance
        return guided / self.positive


def moments(p: torch.Tensor, n: torch.Tensor, timestep: float) -> Moments:
    """Of predictions p and n of one shape, in float64. Raises UserError where one is constant or not finite."""
    p, n = (value.double().flatten() - value.double().mean() for value in (p, n))
    found = Moments(timestep, p.square().mean().item(), n.square().mean().item(), (p * n).mean().item())
    if not (0 < found.positive < math.inf and 0 < found.negative < math.inf):
        raise UserError(f"negative: a prediction at timestep {timestep:g} is constant or not finite")
    return found


@dataclass(frozen=True)
class Correlation:
    """What `correlation` measured; `str` gives it in a few lines."""

    guidance_scale: float
    levels: tuple[Moments, ...]
    """Positive against negative, from the noisiest timestep on."""
    plain: tuple[Moments, ...]
    """Positive against itself under the negative branch's prompt: plain classifier-free guidance."""
    alpha: float | None = None
    """The recommended alpha; None where none was asked for."""
    note: str = ""

    @property
    def w(self) -> float:
        """The paper's omega."""
        return self.guidance_scale - 1

    @property
    def excess(self) -> float:
        """The largest ratio of guidance's variance with the negative to that of plain guidance, over the timesteps."""
        pairs = zip(self.levels, self.plain, strict=True)
        return max(level.variance_ratio(self.w) / plain.variance_ratio(self.w) for level, plain in pairs)

    def __str__(self) -> str:
        independent = 2 * self.w**2 + 2 * self.w + 1
        lines = [
            f"variance of the guided prediction at guidance_scale {self.guidance_scale:g}, relative to the positive's "
            f"(independent predictions would have {independent:.3g}):"
        ]
        for level, plain in zip(self.levels, self.plain, strict=True):
            lines.append(
                f"  timestep {level.timestep:4.0f}: {level.variance_ratio(self.w):.3g} at correlation {level.rho:.4f}; "
                f"plain guidance {plain.variance_ratio(self.w):.3g} at {plain.rho:.4f}"
            )
        lines.append(f"at most {self.excess:.3g} times plain guidance's variance")
        if self.alpha is not None:
            lines.append(f"recommended alpha: {self.alpha:g}")
        return "\n".join([*lines, *([self.note] if self.note else [])])


@dataclass(frozen=True)
class State:
    """A state that sampling visits, and the positive's prediction there; x and p (B, C, H, W)."""

    timestep: torch.Tensor
    x: torch.Tensor
    p: torch.Tensor


PredictHere = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(x (B, ...), t (B,)) -> raw network output (B, ...), under fixed prompts."""


@torch.no_grad()
def visited(adapter: Adapter, predict: PredictHere, x: torch.Tensor, steps: int) -> list[State]:
    """The states of a short DDIM trajectory from noise x (B, C, H, W) under `predict` alone, one for each step."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(adapter.scheduler_config, clip_sample=False)
    scheduler.set_timesteps(steps)
    solver = solver_steps(scheduler)
    k, states = solver.k.float().to(x.device), []
    for i, timestep in enumerate(solver.timesteps.to(x.device)):
        p = predict(x, timestep.expand(len(x)))
        states.append(State(timestep, x, p))
        x, _ = guided_step(p, None, x, k[i : i + 1])
    return states


@torch.no_grad()
def against(states: list[State], predict: PredictHere) -> tuple[Moments, ...]:
    """Moments of the positive's predictions at the states and those of `predict`."""
    return tuple(
        moments(state.p, predict(state.x, state.timestep.expand(len(state.x))), state.timestep.item())
        for state in states
    )


def correlation(
    adapter: Adapter,
    positive: nn.Module,
    negative: nn.Module | Negative,
    prompts: Conditioning,
    negative_prompts: Conditioning,
    *,
    guidance_scale: float = 7.5,
    steps: int = 8,
    seed: int = 0,
    alphas: Callable[[float], nn.Module | Negative] | None = None,
) -> Correlation:
    """Measure the two predictions on the states that the positive visits from noise, under a few prompts.

    prompts are conditioning rows (B, ...), negative_prompts the negative branch's (1, ...) or (B, ...). A negative that
    is a LoRA is measured as a network of its own, which takes the memory of one.

    With `alphas` (alpha -> the negative at that alpha, see `alphas_of`) an alpha is recommended: the smallest of 1.0,
    0.9, ..., 0.0 down to which the variance of guidance stays within 1.5 times that of plain guidance at every
    timestep. A larger alpha carries more of the positive's own change over into the negative (Eq. 7) and makes the two
    more alike, which is stable, but what both share guidance cannot push away from: so no more of it than stability
    asks for. Plain guidance is the measure because samplers and guidance scales in use are made for its variance.

    Raises UserError where guidance_scale is below 1 or not finite, or a prediction is constant or not finite.
    """
    if not 1 <= guidance_scale < math.inf:
        raise UserError(f"guidance_scale: {guidance_scale} is not possible; expected a number of at least 1")
    count, device = len(next(iter(prompts.values()))), next(positive.parameters()).device
    ids = torch.arange(seed, seed + count, device=device)
    noise = normal(NoiseKey(0, ids, draw_id(Draw.SAMPLE)), adapter.latent_shape)
    rows = {name: value.expand(count, *value.shape[1:]) for name, value in negative_prompts.items()}
    states = visited(adapter, lambda x, t: adapter.predict(positive, x, t, prompts), noise, steps)
    plain = against(states, lambda x, t: adapter.predict(positive, x, t, rows))

    def measured(one: nn.Module | Negative) -> Correlation:
        network = as_network(positive, one) if isinstance(one, Negative) else one
        levels = against(states, lambda x, t: adapter.predict(network, x, t, rows))
        return Correlation(guidance_scale, levels, plain)

    result = measured(negative)
    if alphas is None:
        return result
    best = None
    for alpha in ALPHAS:
        if measured(alphas(alpha)).excess > BOUND:
            break
        best = alpha
    if best is None:
        note = f"even alpha 1 gives more than {BOUND} times plain guidance's variance: lower beta or guidance_scale"
        return replace(result, alpha=1.0, note=note)
    return replace(result, alpha=best)


def alphas_of(positive: nn.Module, source: str | Path, base: str | Path, **options) -> Callable[[float], Negative]:
    """The negative at any alpha, made anew from its files on each call; arguments as for `load_negative`."""
    return lambda alpha: load_negative(positive, source, alpha=alpha, base=base, **options)

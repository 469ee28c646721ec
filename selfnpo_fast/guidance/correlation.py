"""How alike the positive's and the negative's predictions are, and the variance that guidance has.

Guidance predicts (w + 1) p - w n (Eq. 1), with w = guidance_scale - 1. Where p and n have variances
v_p and v_n and covariance c, the variance of the guided prediction is

    (w + 1)^2 v_p + w^2 v_n - 2 w (w + 1) c.

This is 2 w^2 + 2 w + 1 for independent predictions of variance 1, and v_p for equal ones. A network
that is given states of a much larger or smaller variance than in training draws burnt pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from selfnpo_fast.diffusion.schedule_facts import ScheduleFacts, check_same_schedule
from selfnpo_fast.diffusion.schedulers import new_scheduler
from selfnpo_fast.diffusion.solvers import solver_steps
from selfnpo_fast.models import Adapter
from selfnpo_fast.models.base import Conditioning, Predict
from selfnpo_fast.negatives.load import Negative, as_network, load_negative
from selfnpo_fast.runtime.errors import UserError
from selfnpo_kernels import Draw, NoiseKey, draw_id, guided_step, normal

BOUND = 1.5
"""Largest variance of guidance for which an alpha is recommended, in units of plain guidance's."""
ALPHAS = tuple(i / 10 for i in range(10, -1, -1))
"""The alphas that are tried, from the largest to the smallest."""


@dataclass(frozen=True)
class Moments:
    """Second moments of two predictions at one timestep, over all elements and prompts."""

    timestep: float
    """The training timestep."""
    positive: float
    """The variance v_p of p."""
    negative: float
    """The variance v_n of n."""
    covariance: float
    """The covariance c of p and n."""

    @property
    def rho(self) -> float:
        """The correlation of p and n, from -1 to 1."""
        return self.covariance / math.sqrt(self.positive * self.negative)

    def variance_ratio(self, w: float) -> float:
        """The variance of (w + 1) p - w n, divided by that of p."""
        guided = (w + 1) ** 2 * self.positive + w**2 * self.negative - 2 * w * (w + 1) * self.covariance
        return guided / self.positive


def moments(p: torch.Tensor, n: torch.Tensor, timestep: float) -> Moments:
    """The moments of predictions p and n of one shape, computed in float64.

    Raises UserError where a prediction is constant or not finite.
    """
    p, n = (value.double().flatten() - value.double().mean() for value in (p, n))
    result = Moments(timestep, p.square().mean().item(), n.square().mean().item(), (p * n).mean().item())
    if not (0 < result.positive < math.inf and 0 < result.negative < math.inf):
        raise UserError(f"negative: a prediction at timestep {timestep:g} is constant or not finite")
    return result


@dataclass(frozen=True)
class Correlation:
    """What `correlation` has measured; `str` gives a report of a few lines."""

    guidance_scale: float
    """diffusers' guidance_scale, omega + 1."""
    levels: tuple[Moments, ...]
    """Positive and negative, from the noisiest timestep on."""
    plain: tuple[Moments, ...]
    """Positive and positive under the negative branch's prompt: plain classifier-free guidance."""
    alpha: float | None = None
    """The recommended alpha; None without a recommendation."""
    note: str = ""
    """A remark about the recommendation, the report's last line."""

    @property
    def w(self) -> float:
        """The paper's omega."""
        return self.guidance_scale - 1

    @property
    def excess(self) -> float:
        """Guidance's variance with the negative, divided by plain guidance's: the largest ratio."""
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
    """A state that sampling visits, and the positive's prediction for it."""

    timestep: torch.Tensor
    """0-d, the training timestep."""
    x: torch.Tensor
    """(B, C, H, W) float32, the state."""
    p: torch.Tensor
    """(B, C, H, W), the positive's output in the network's dtype."""


@torch.no_grad()
def visited(adapter: Adapter, predict: Predict, x: torch.Tensor, rows: Conditioning, steps: int) -> list[State]:
    """The states of a DDIM trajectory of `predict` without guidance, one for each of the steps.

    Shapes:
    - x: (B, C, H, W) float32, the noise.
    - rows: (B, ...), the prompts' conditioning rows.
    """
    scheduler = new_scheduler("euler" if adapter.schedule.is_flow else "ddim", adapter.scheduler)
    adapter.set_timesteps(scheduler, steps, adapter.size)
    solver = solver_steps(scheduler, prediction_type=adapter.schedule.prediction)
    k, states = solver.k.float().to(x.device), []
    for i, timestep in enumerate(solver.timesteps.to(x.device)):
        p = predict(x, timestep.expand(len(x)), rows)
        states.append(State(timestep, x, p))
        x, _ = guided_step(p, None, x, k[i : i + 1])
    return states


@torch.no_grad()
def against(states: list[State], predict: Predict, rows: Conditioning) -> tuple[Moments, ...]:
    """Moments of the positive's predictions and those of `predict` under `rows` (B, ...)."""
    return tuple(
        moments(state.p, predict(state.x, state.timestep.expand(len(state.x)), rows), state.timestep.item())
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
    """Measure positive and negative on the states that the positive visits under a few prompts.

    `steps` are the timesteps to measure at. `seed` is that of the first prompt's noise, and the
    others count up. A LoRA is turned into a network, which takes memory like one.

    With `alphas`, which gives the negative at an alpha (see `alphas_of`), an alpha is recommended:
    the smallest of 1.0, 0.9, ..., 0.0 down to which the variance of guidance is at most BOUND times
    plain guidance's at every timestep. Samplers and guidance scales in use are made for the
    variance of plain guidance. A larger alpha carries more of the positive's change, eta, over into
    the negative (Eq. 7). It makes the two more alike, and guidance more stable. But guidance cannot
    push away from what both share, so alpha is no larger than stability asks for.

    Shapes:
    - prompts: (B, ...), conditioning rows.
    - negative_prompts: (1, ...) or (B, ...), the negative branch's conditioning rows.

    Raises UserError where guidance_scale is below 1 or not finite, where a prediction is constant
    or not finite, and for a negative of another schedule.
    """
    if not 1 <= guidance_scale < math.inf:
        raise UserError(f"guidance_scale: {guidance_scale} is not possible; expected a number of at least 1")
    if isinstance(negative, Negative):
        check_same_schedule(negative.schedule, ScheduleFacts.of(adapter.schedule, "the model"))
    count, device = len(next(iter(prompts.values()))), next(positive.parameters()).device
    ids = torch.arange(seed, seed + count, device=device)
    noise = normal(NoiseKey(0, ids, draw_id(Draw.SAMPLE)), adapter.latent_shape)
    negative_rows = {name: value.expand(count, *value.shape[1:]) for name, value in negative_prompts.items()}
    predict = partial(adapter.predict, positive)
    states = visited(adapter, predict, noise, prompts, steps)
    plain = against(states, predict, negative_rows)

    def measured(candidate: nn.Module | Negative) -> Correlation:
        """The correlation with one negative, on the same states."""
        network = as_network(positive, candidate) if isinstance(candidate, Negative) else candidate
        levels = against(states, partial(adapter.predict, network), negative_rows)
        return Correlation(guidance_scale, levels, plain)

    result = measured(negative)
    if alphas is None:
        return result
    # The variance grows as alpha falls: stop at the first alpha above the bound.
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
    """A function that loads the negative at a given alpha; arguments as for `load_negative`."""
    return lambda alpha: load_negative(positive, source, alpha=alpha, base=base, **options)

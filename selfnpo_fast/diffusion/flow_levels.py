"""The noise levels of diffusers' flow schedulers, read from their configs.

Shape letter: T levels.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from selfnpo_fast.runtime.console import say_once
from selfnpo_fast.runtime.errors import UserError, shortened

_MATCHING = "FlowMatchEulerDiscreteScheduler"
_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def is_flow(scheduler: Any) -> bool:
    """Whether a diffusers scheduler is that of a flow model.

    UniPC and DPM-Solver++ have an alphas_cumprod then, too, which means nothing.
    """
    config = getattr(scheduler, "config", None) or {}
    return type(scheduler).__name__.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction"


def has_flow_sigmas(scheduler: Any) -> bool:
    """Whether `flow_sigmas` reads the noise levels of a diffusers scheduler."""
    config = getattr(scheduler, "config", None) or {}
    return type(scheduler).__name__ == _MATCHING or bool(config.get("use_flow_sigmas"))


def flow_sigmas(scheduler: Any, tokens: int | None = None) -> torch.Tensor:
    """sigma (T,) float64, ascending: the scheduler's shift of (i + 1) / T at index i, but 0 at index
    0, where trajectories end.

    A grid of N levels (`Levels.grid`) is then what the scheduler makes of diffusers' usual
    `sigmas=linspace(1, 1 / N, N)`, and its last step ends at 0. With shift_terminal that holds for
    N = T, since the stretch depends on N.

    tokens    the number of tokens of a latent in the denoiser, on which dynamic shifting depends

    Raises UserError where the shift depends on the tokens and they are not given, and for a flow
    whose network predicts something else.
    """
    config = scheduler.config
    prediction = config.get("prediction_type", "flow_prediction")
    if prediction != "flow_prediction":
        raise UserError(
            f"prediction_type: {shortened(prediction)} is not supported with use_flow_sigmas; expected "
            "'flow_prediction'"
        )
    count = config.num_train_timesteps
    sigma = torch.arange(1, count + 1, dtype=torch.float64) / count
    if config.get("use_dynamic_shifting"):
        mu = shift_mu(config, tokens)
        factor = math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu
        sigma = factor / (factor + (1 / sigma - 1))
    else:
        # FlowMatchEuler's `shift` can be set after it is made; others have flow_shift.
        shift = getattr(scheduler, "shift", None) or config.get("flow_shift", 1.0)
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
    terminal = config.get("shift_terminal")
    if terminal:
        sigma = 1 - (1 - sigma) * (1 - terminal) / (1 - sigma[0])
    for name in _SPACINGS:
        if config.get(name):
            say_once(f"scheduler: {name} spaces the steps of sampling; training's noise levels are those without it")
    sigma[0] = 0
    return sigma


def shift_mu(config: Any, tokens: int | None) -> float:
    """The logarithm of the shift: linear in the number of tokens, as diffusers' `calculate_shift`.

    Raises UserError where the tokens are not given.
    """
    if tokens is None:
        raise UserError(
            "scheduler: its use_dynamic_shifting makes noise levels depend on the size of the latent, which this "
            "family does not give"
        )
    first, last = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return low + (high - low) * (tokens - first) / (last - first)

"""What a call of the sampler is given: its settings, and the checks of all its arguments."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
import torch

from selfnpo_fast.diffusion.schedulers import SOLVERS
from selfnpo_fast.models.base import Adapter
from selfnpo_fast.models.size import AskedSize, Size
from selfnpo_fast.runtime.errors import UserError, shortened
from selfnpo_fast.runtime.limits import MAX_COUNT, MAX_PROMPT_CHARACTERS

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How pictures are drawn. Raises UserError for values that are not possible."""

    steps: int = 20
    """Solver steps."""
    guidance_scale: float | Sequence[float] = 3.0
    """diffusers' guidance_scale (omega + 1), for all steps or for each of them; at steps with up to
    1 only the positive model runs, as in diffusers."""
    use_dynamic_cfg: bool = False
    """diffusers' use_dynamic_cfg: guidance_scale s becomes 1 + s (1 - cos(pi ((n - t) / n)^5)) / 2 at
    timestep t of n steps."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Shares of the steps, 0 to 1, between which guidance acts; outside, only the positive runs."""
    guidance_rescale: float = 0.0
    """0 to 1: diffusers' guidance_rescale (Lin et al., arXiv 2305.08891, section 3.4)."""
    solver: Literal["dpm++", "ddim", "euler", "unipc", "own"] = "dpm++"
    """DPM-Solver++(2M), DDIM, Euler or UniPC of second order on the model's noise schedule or flow,
    which knows no DDIM; own: the model's scheduler, as it is configured."""
    eta: float = 0.0
    """0 to 1: DDIM's share of noise per step (Song et al., arXiv 2010.02502, Eq. 16)."""
    negative_prompt: Literal["empty", "same"] = "empty"
    """Prompt of the negative branch: the empty one, or the positive's (autoguidance)."""
    batch_size: int = 64
    """Pictures per forward of one branch."""

    def __post_init__(self) -> None:
        check_integer("steps", self.steps, 1, MAX_COUNT)
        check_integer("batch_size", self.batch_size, 1, MAX_COUNT)
        object.__setattr__(self, "guidance_scale", _checked_scale(self.guidance_scale, self.steps))
        check_bool("use_dynamic_cfg", self.use_dynamic_cfg)
        if self.use_dynamic_cfg and isinstance(self.guidance_scale, Sequence):
            raise UserError("use_dynamic_cfg: it is not possible with a guidance_scale for each step; give one number")
        check_number("guidance_rescale", self.guidance_rescale, 0, 1)
        check_number("eta", self.eta, 0, 1)
        check_choice("solver", self.solver, SOLVERS)
        check_choice("negative_prompt", self.negative_prompt, ("empty", "same"))
        interval = self.guidance_interval
        shares = [_number(share) for share in interval] if isinstance(interval, list | tuple) else []
        if len(shares) != 2 or not 0 <= shares[0] <= shares[1] <= 1:
            raise UserError(
                f"guidance_interval: {shortened(interval)} is not possible; expected two shares of the steps, 0 to 1"
            )

    @property
    def scales(self) -> tuple[float, ...]:
        """The guidance_scale of each step."""
        scale = self.guidance_scale
        return tuple(scale) if isinstance(scale, Sequence) else (float(scale),) * int(self.steps)

    def at(self, timesteps: torch.Tensor) -> SamplerConfig:
        """The same with the guidance_scale of each step, where the timesteps (steps,) say it."""
        if not self.use_dynamic_cfg or self.scales[0] <= 1:
            return self
        # t counts training timesteps and n solver steps, as in diffusers (its issue 9641): scales
        # swing from step to step.
        scale, n = self.scales[0], int(self.steps)
        waves = [math.cos(math.pi * ((n - t) / n) ** 5.0) for t in timesteps.tolist()]
        scales = tuple(1 + scale * ((1 - wave) / 2) for wave in waves)
        return replace(self, guidance_scale=scales, use_dynamic_cfg=False)

    @property
    def scale_text(self) -> str:
        """guidance_scale in messages: `3`, or `1 to 6` where steps differ."""
        least, most = min(self.scales), max(self.scales)
        return f"{least:g}" if least == most else f"{least:g} to {most:g}"

    def guided(self, step: int) -> bool:
        """Whether guidance acts at a step, counted from 0, by the rule of diffusers' ControlNets.

        That is the rule of control_guidance_start and control_guidance_end.
        """
        start, end = self.guidance_interval
        return self.scales[step] > 1 and step / self.steps >= start and (step + 1) / self.steps <= end


def config_of_call(settings: dict[str, Any]) -> SamplerConfig:
    """The config of a call's settings by name. Raises UserError for a name that is none."""
    known = [field.name for field in fields(SamplerConfig)]
    for name in settings:
        if name not in known:
            raise UserError(f"{name}: there is no such setting; expected {', '.join(known)}")
    return SamplerConfig(**settings)


def _number(value: object) -> float:
    """A real number as a float, and NaN for everything else: true and false are not meant so."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # an integer beyond all floats
        return math.inf


def check_number(field: str, value: object, least: float, most: float = math.inf) -> None:
    """UserError that names `field` where `value` is no finite number from `least` to `most`."""
    number = _number(value)
    if not least <= number <= most or math.isinf(number):
        expected = f"{least:g} to {most:g}" if most < math.inf else f"a number of at least {least:g}"
        raise UserError(f"{field}: {shortened(value)} is not possible; expected {expected}")


def _checked_scale(scale: Any, steps: int) -> Any:
    """guidance_scale as it is given, and a tuple of floats where there is one for each step.

    Raises UserError where it is neither a number of at least 0 nor as many of them as steps.
    """
    if isinstance(scale, np.ndarray | torch.Tensor):
        scale = scale.tolist()
    if not isinstance(scale, list | tuple):
        check_number("guidance_scale", scale, 0)
        return scale
    if len(scale) != steps:
        raise UserError(f"guidance_scale: {len(scale)} numbers for {steps} steps; give one, or one for each step")
    for i, of_step in enumerate(scale):
        check_number(f"guidance_scale[{i}]", of_step, 0)
    return tuple(map(float, scale))


def check_integer(field: str, value: object, least: int, most: int) -> int:
    """`value` as an int. Raises UserError that names `field` unless it is an integer from `least`
    to `most`; integers of NumPy are."""
    number = least - 1 if isinstance(value, bool) or not isinstance(value, Integral) else int(value)
    if not least <= number <= most:
        raise UserError(f"{field}: {shortened(value)} is not possible; expected an integer from {least} to {most:,}")
    return number


def check_bool(field: str, value: object) -> None:
    """UserError that names `field` where `value` is neither true nor false."""
    if not isinstance(value, bool):
        raise UserError(f"{field}: {shortened(value)} is not possible; expected True or False")


def check_choice(field: str, value: object, choices: Sequence[str]) -> None:
    """UserError that names `field` where `value` is none of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"{field}: {shortened(value)} is not possible; expected one of {', '.join(choices)}")


def checked_prompts(field: str, prompts: str | Iterable[str]) -> list[str]:
    """One prompt, or several, as a list. Raises UserError that names `field` where there is none,
    one is no text, or one has more than `MAX_PROMPT_CHARACTERS`."""
    if isinstance(prompts, str):
        prompts = [prompts]
    if isinstance(prompts, np.ndarray):
        prompts = prompts.tolist()
    if isinstance(prompts, bytes | Mapping) or not isinstance(prompts, Iterable):
        raise UserError(f"{field}: {shortened(prompts)} is not possible; expected a text, or a list of texts")
    texts = list(prompts)
    if not texts:
        raise UserError(f"{field}: there are none; give at least one")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"{field}: entry {i} is {shortened(text)}, not a text; expected a list of texts")
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise UserError(
                f"{field}: entry {i} has {len(text):,} characters; expected at most {MAX_PROMPT_CHARACTERS:,}"
            )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"{field}: entry {i} is no valid text: {shortened(text)}") from error
    return texts


def checked_seeds(seeds: int | Iterable[int] | None, count: int) -> list[int]:
    """`count` seeds: those given, or consecutive ones from the one given, or random ones.

    Raises UserError for another number of seeds, and for what is no integer from 0 to 2^63 - 1.
    """
    if seeds is None:
        return [secrets.randbelow(2**63) for _ in range(count)]
    if isinstance(seeds, torch.Tensor | np.ndarray):
        seeds = seeds.tolist()
    if isinstance(seeds, Integral) and not isinstance(seeds, bool):
        seeds = [int(seeds) + i for i in range(count)]
    if isinstance(seeds, str | bytes | Mapping) or not isinstance(seeds, Iterable):
        raise UserError(f"seeds: {shortened(seeds)} is not possible; expected an integer, or a list of integers")
    values = list(seeds)
    if len(values) != count:
        raise UserError(f"seeds: {len(values)} for {count} prompts; give one each, or the first of consecutive ones")
    return [check_integer("seeds", seed, 0, MAX_SEED) for seed in values]


def checked_size(height: int | None, width: int | None, frames: int | None, adapter: Adapter) -> Size:
    """The size of a call, the adapter's where a side or the frames are None. Raises UserError for
    what is no positive integer."""
    sides = {"height": height, "width": width, "frames": frames}
    given = {name: check_integer(name, side, 1, MAX_COUNT) for name, side in sides.items() if side is not None}
    return adapter.size_of(AskedSize(**given))

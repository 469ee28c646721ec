"""What files say of the meaning of a network's output: its prediction type and its noise schedule.

Neither shows in the weights: a v-prediction network has the tensors of an epsilon network. Guidance
subtracts one output from the other, so that both have to mean the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from selfnpo_fast.diffusion.flow_levels import has_flow_sigmas
from selfnpo_fast.diffusion.levels import Levels
from selfnpo_fast.runtime.console import say_once
from selfnpo_fast.runtime.errors import UserError, one_line, shortened
from selfnpo_fast.runtime.limits import MAX_COUNT, check_count

SCHEDULE_MARKS = ("v_pred", "ztsnr")
"""Empty tensors by which ComfyUI's checkpoints say v-prediction and zero terminal SNR."""
_LEVELS = 33
"""Timesteps whose noise level is recorded, evenly spaced from the first to the last."""
_RELATIVE, _ABSOLUTE = 1e-3, 1e-6
"""Tolerances of noise levels. The absolute one holds both ways in which diffusers' schedulers write
zero terminal SNR, 0 and 2^-24."""
_PREDICTION_TYPES = {
    "eps": "epsilon", "v": "v_prediction", "vpred": "v_prediction", "v_pred": "v_prediction",
    "v-prediction": "v_prediction",
}  # fmt: skip
"""Names of other programs for prediction types."""


@dataclass(frozen=True)
class ScheduleFacts:
    """What is known of the schedule of one model. None stands for what its files do not say."""

    source: str
    """The model, for messages."""
    prediction_type: str | None = None
    """epsilon, v_prediction, sample or flow, or what else the file says."""
    timesteps: int | None = None
    """T, the number of training timesteps."""
    levels: tuple[float, ...] | None = None
    """alphas_cumprod at 33 of the T timesteps, evenly spaced; both ends are among them."""
    zero_snr: bool | None = None
    """Whether the last timestep is pure noise (zero terminal SNR)."""

    @classmethod
    def of(cls, schedule: Levels, source: str) -> ScheduleFacts:
        """The facts of noise levels."""
        if schedule.is_flow:
            return cls._of_flow(source, schedule.num_train_timesteps)
        return cls._of_levels(source, schedule.prediction, schedule.alphas_cumprod)

    @classmethod
    def _of_flow(cls, source: str, timesteps: int) -> ScheduleFacts:
        """The facts of a flow. Its shift is none: it says where a trajectory stops, and not what an
        output at a noise level means. Nor is the output's sign, which is the family's."""
        return cls(source, "flow", timesteps)

    @classmethod
    def of_scheduler(cls, scheduler: Any, source: str) -> ScheduleFacts:
        """The facts of a diffusers scheduler, as far as it has any: some have no alphas_cumprod."""
        config = getattr(scheduler, "config", None) or {}
        if has_flow_sigmas(scheduler):
            return cls._of_flow(source, config["num_train_timesteps"])
        prediction_type, levels = config.get("prediction_type"), getattr(scheduler, "alphas_cumprod", None)
        if levels is None or not len(levels):
            return cls(source, prediction_type)
        return cls._of_levels(source, prediction_type, levels)

    @classmethod
    def _of_levels(cls, source: str, prediction_type: str | None, alphas_cumprod: torch.Tensor) -> ScheduleFacts:
        count = len(alphas_cumprod)
        index = [round(i * (count - 1) / (_LEVELS - 1)) for i in range(_LEVELS)]
        levels = tuple(alphas_cumprod.detach().double().cpu()[index].tolist())
        return cls(source, prediction_type, count, levels, levels[-1] <= _ABSOLUTE)

    def record(self) -> dict:
        """The facts as JSON can hold them; `of_record` reads them back."""
        return {
            "prediction_type": self.prediction_type,
            "num_train_timesteps": self.timesteps,
            "zero_terminal_snr": self.zero_snr,
            "alphas_cumprod": None if self.levels is None else list(self.levels),
        }

    @classmethod
    def of_record(cls, record: Any, source: str) -> ScheduleFacts:
        """The facts in what `record` has given. Raises ValueError where it is nothing of the
        kind."""
        try:
            prediction_type, timesteps = record["prediction_type"], record["num_train_timesteps"]
            levels, zero_snr = record["alphas_cumprod"], record["zero_terminal_snr"]
            if not isinstance(prediction_type, str | None):
                raise TypeError("prediction_type is no text")
            if timesteps is not None:
                check_count("num_train_timesteps", timesteps)
            if not isinstance(zero_snr, bool | None):
                raise TypeError("zero_terminal_snr is neither true nor false")
            if levels is None:
                return cls(source, prediction_type, timesteps, zero_snr=zero_snr)
            if len(levels) != _LEVELS:
                raise TypeError(f"{len(levels)} noise levels instead of {_LEVELS}")
            levels = tuple(float(level) for level in levels)
            return cls(source, prediction_type, timesteps, levels, levels[-1] <= _ABSOLUTE)
        except (TypeError, KeyError, ValueError, OverflowError) as error:
            raise ValueError(f"its record of the schedule is damaged: {one_line(error)}") from error

    @classmethod
    def of_metadata(cls, metadata: dict[str, str], keys: Sequence[str], source: str) -> ScheduleFacts:
        """The facts in a safetensors file's metadata, as kohya's scripts and the model spec name
        them.

        SCHEDULE_MARKS among `keys`, the file's tensors, count too.
        """
        said = metadata.get("modelspec.prediction_type", "").strip().lower()
        prediction_type = _PREDICTION_TYPES.get(said, said) or None
        by_flag = {"true": "v_prediction", "false": "epsilon"}
        prediction_type = prediction_type or by_flag.get(metadata.get("ss_v_parameterization", "").strip().lower())
        zero_snr = {"true": True, "false": False}.get(metadata.get("ss_zero_terminal_snr", "").strip().lower())
        if "v_pred" in keys:
            prediction_type = "v_prediction"
        return cls(source, prediction_type, zero_snr=True if "ztsnr" in keys else zero_snr)

    @classmethod
    def of_scheduler_config(cls, config: dict, source: str, field: str) -> ScheduleFacts:
        """The facts in a scheduler_config.json. Raises UserError that names `field` where no
        scheduler can be made of it."""
        import diffusers

        name = config.get("_class_name")
        named = getattr(diffusers, name, None) if isinstance(name, str) else None
        if not (inspect.isclass(named) and issubclass(named, diffusers.SchedulerMixin)):
            say_once(
                f"{field}: {source}: its scheduler {shortened(name)} is not known: its noise levels are not compared"
            )
            kind = config.get("prediction_type")
            return cls(source, kind if isinstance(kind, str) else None)
        for key, value in config.items():  # any of them may be a count of something
            if key == "num_train_timesteps" or (isinstance(value, int) and not isinstance(value, bool)):
                least = 1 if key == "num_train_timesteps" else -MAX_COUNT
                check_count(f"{field}: {source}: {one_line(key, 40)} of its scheduler", value, least)
        try:
            return cls.of_scheduler(named.from_config(config), source)
        except Exception as error:  # a constructor raises any type for a wrong config
            raise UserError(f"{field}: cannot load scheduler_config.json from {source}: {one_line(error)}") from error


def combined(source: str, several: Sequence[ScheduleFacts | None]) -> ScheduleFacts | None:
    """The facts of models that mean the same, for one that is made of them; None without any.

    Each fact is that of the first model that says it.
    """
    known = [facts for facts in several if facts is not None]

    def first(name: str) -> Any:
        """The first value of a fact that is known."""
        return next((value for facts in known if (value := getattr(facts, name)) is not None), None)

    names = ("prediction_type", "timesteps", "levels", "zero_snr")
    facts = {name: first(name) for name in names}
    return None if not any(value is not None for value in facts.values()) else ScheduleFacts(source, **facts)


def check_same_schedule(negative: ScheduleFacts | None, other: ScheduleFacts | None, field: str = "negative") -> None:
    """Compare what is known of both. Raises UserError, which names both, where they differ."""
    if negative is None or other is None:
        return
    mend = f"the outputs of both mean different things; give a negative that was trained from {other.source}"
    kinds = negative.prediction_type, other.prediction_type
    if None not in kinds and kinds[0] != kinds[1]:
        raise UserError(
            f"{field}: prediction type {one_line(kinds[0], 40)} of {negative.source} does not go with "
            f"{one_line(kinds[1], 40)} of {other.source}: {mend}"
        )
    if None not in (negative.zero_snr, other.zero_snr) and negative.zero_snr != other.zero_snr:
        one, two = (negative, other) if negative.zero_snr else (other, negative)
        raise UserError(
            f"{field}: the noise schedule of {one.source} is rescaled to zero terminal SNR "
            f"(rescale_betas_zero_snr), that of {two.source} is not: {mend}"
        )
    if None not in (negative.timesteps, other.timesteps) and negative.timesteps != other.timesteps:
        raise UserError(
            f"{field}: {negative.source} has {negative.timesteps} timesteps, {other.source} {other.timesteps}: {mend}"
        )
    if negative.levels is None or other.levels is None:
        return
    for i, (a, b) in enumerate(zip(negative.levels, other.levels, strict=True)):
        if not abs(a - b) <= _ABSOLUTE + _RELATIVE * abs(b):  # also where one is not a number
            step = round(i * ((other.timesteps or 1) - 1) / (_LEVELS - 1))
            raise UserError(
                f"{field}: the noise schedule of {negative.source} does not go with that of {other.source}: "
                f"alphas_cumprod at timestep {step} is {a:.6g} and {b:.6g}: {mend}"
            )

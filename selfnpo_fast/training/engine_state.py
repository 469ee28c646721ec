"""What a checkpoint holds of the student's engine, by parameter name, so that any number of ranks can continue from it.

Ranks have to call the members of these classes, and iterate over what they give, together.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from selfnpo_fast.training.engine import StudentEngine

NamedTensors = Iterator[tuple[str, torch.Tensor]]
"""(parameter name, whole float32 tensor), which all ranks have to iterate together."""
_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""Attributes of DeepSpeed's dynamic loss scaler."""


class StudentWeights:
    """The trained parameters and their fp32 masters."""

    def __init__(self, engine: StudentEngine) -> None:
        self.engine = engine

    def state_dict(self) -> NamedTensors:
        """Every trained parameter, whole."""
        return self.engine.full_weights()

    def load_state_dict(self, weights: dict[str, torch.Tensor]) -> None:
        """Set parameters and masters."""
        for name, param in self.engine.trainable:
            value = weights[name].to(param.device)
            _set(self.engine, param, value)
            with torch.no_grad(), self.engine.gather([param], modify=True):
                param.copy_(value)


class EngineCounters:
    """Steps of the optimiser and of its learning rate, and the dynamic loss scale of fp16."""

    def __init__(self, engine: StudentEngine) -> None:
        self.engine = engine
        self.steps = 0
        """Steps that the optimiser had made when the loaded state was saved."""

    def state_dict(self) -> dict:
        """Plain values, the same on all ranks."""
        optimizer = self.engine.engine.basic_optimizer
        steps = [state["step"] for p in _native_params(self.engine) if (state := optimizer.state.get(p))]
        return {
            "steps": int(steps[0]) if steps else 0,
            "lr_steps": self.engine.lr_scheduler.last_epoch,
            "loss_scale": loss_scale(self.engine),
        }

    def load_state_dict(self, saved: dict) -> None:
        """Restore the learning rate and the loss scale; the optimiser's steps come with its moments."""
        scheduler, steps = self.engine.lr_scheduler, saved["lr_steps"]
        scheduler.load_state_dict(scheduler.state_dict() | {"last_epoch": steps, "_step_count": steps + 1})
        rates = [base * rule(steps) for base, rule in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        scheduler._last_lr = rates
        for group, rate in zip(self.engine.engine.basic_optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for name, value in (saved["loss_scale"] or {}).items():
            setattr(self.engine.engine.optimizer.loss_scaler, name, value)
        self.steps = saved["steps"]


class Moment:
    """One of Adam's moments; the first step that is not skipped makes it."""

    def __init__(self, engine: StudentEngine, key: str, counters: EngineCounters) -> None:
        self.engine, self.key, self.counters = engine, key, counters

    def state_dict(self) -> NamedTensors | None:
        """The moment of every trained parameter, whole; None before there are any."""
        state = self.engine.engine.basic_optimizer.state
        return self._whole() if all(state.get(p) for p in _native_params(self.engine)) else None

    def _whole(self) -> NamedTensors:
        from deepspeed.utils import safe_get_full_optimizer_state

        for name, param in self.engine.trainable:
            if self.engine.stage == 0:
                yield name, self.engine.engine.basic_optimizer.state[param][self.key]
            else:
                yield name, safe_get_full_optimizer_state(param, self.key)

    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """Set the moment; the optimiser's steps are those of the counters, which are loaded before."""
        engine, state = self.engine.engine, self.engine.engine.basic_optimizer.state
        for p in _native_params(self.engine):
            if not state[p]:
                state[p] = {"step": torch.tensor(float(self.counters.steps), device=p.device)}
                state[p] |= {name: torch.zeros_like(p, dtype=torch.float32) for name in moment_names(self.engine)}
        # DeepSpeed ties the moments to the parameters' names after its first step; these have come another way.
        link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()
        for name, param in self.engine.trainable:
            _set(self.engine, param, tensors[name].to(param.device), self.key)


class NativeMoments:
    """The 8-bit optimiser's state on one rank; empty where `Moment` parts hold all."""

    def __init__(self, engine: StudentEngine) -> None:
        self.engine = engine

    def state_dict(self) -> dict[str, torch.Tensor]:
        """By the number of the parameter and the name of the value."""
        if moment_names(self.engine):
            return {}
        state = self.engine.engine.basic_optimizer.state
        return {
            f"{i}.{key}": torch.as_tensor(value)
            for i, p in enumerate(_native_params(self.engine))
            for key, value in state[p].items()
        }

    def load_state_dict(self, saved: dict[str, torch.Tensor]) -> None:
        """Restore the state on the same rank of a world of the same size."""
        state = self.engine.engine.basic_optimizer.state
        for i, p in enumerate(_native_params(self.engine)):
            mine = {key.split(".", 1)[1]: value for key, value in saved.items() if key.split(".", 1)[0] == str(i)}
            if mine:
                step = int(mine.pop("step"))  # bitsandbytes keeps an int
                state[p] = {"step": step, **{key: value.to(p.device) for key, value in mine.items()}}

    def reshard(self, states: list, world) -> None:
        """None: 8-bit moments belong to each rank's share, and another number of ranks is refused before."""


def moment_names(engine: StudentEngine) -> tuple[str, ...]:
    """The moments that are saved by parameter name; 8-bit ones cannot be."""
    return ("exp_avg", "exp_avg_sq") if isinstance(engine.engine.basic_optimizer, torch.optim.AdamW) else ()


def loss_scale(engine: StudentEngine) -> dict | None:
    """The dynamic loss scaler's values, or None where there is none."""
    scaler = getattr(engine.engine.optimizer, "loss_scaler", None)
    if not getattr(scaler, "dynamic", False):
        return None
    return {name: getattr(scaler, name) for name in _LOSS_SCALE if hasattr(scaler, name)}


def _set(engine: StudentEngine, param: nn.Parameter, value: torch.Tensor, moment: str | None = None) -> None:
    """Put a whole tensor into the fp32 master, or a moment, of a parameter."""
    from deepspeed import utils

    if engine.stage == 0:
        if moment is not None:
            engine.engine.basic_optimizer.state[param][moment].copy_(value)
    elif engine.stage < 3:
        where = (param, value) if moment is None else (param, value, moment)
        (utils.safe_set_full_fp32_param if moment is None else utils.safe_set_full_optimizer_state)(*where)
    else:
        # Shards are padded to one size, which DeepSpeed's setter for whole tensors does not expect.
        size = param.ds_tensor.ds_numel
        flat = nn.functional.pad(value.flatten(), (0, size * torch.distributed.get_world_size() - value.numel()))
        part = flat.narrow(0, size * torch.distributed.get_rank(), size)
        where = (param, part) if moment is None else (param, part, moment)
        (utils.safe_set_local_fp32_param if moment is None else utils.safe_set_local_optimizer_state)(*where)


def _native_params(engine: StudentEngine) -> list[torch.Tensor]:
    """This rank's optimiser parameters in their own order (flat partitions under ZeRO)."""
    if engine.stage == 3:  # which empties the parameter groups between steps
        return list(engine.engine.optimizer.fp32_partitioned_groups_flat)
    return [p for group in engine.engine.basic_optimizer.param_groups for p in group["params"]]

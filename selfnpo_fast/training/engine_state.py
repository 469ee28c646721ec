"""What a checkpoint holds of the student's engine.

Weights and moments are saved by parameter name, so that any number of ranks can continue from them.
All ranks have to call the methods of these classes together, and iterate together over what they
return.
"""

from __future__ import annotations

import torch
from torch import nn

from selfnpo_fast.runtime.writer import NamedTensors
from selfnpo_fast.training.engine import StudentEngine

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

    def load_state_dict(self, state: dict) -> None:
        """Restore the learning rate and the loss scale.

        The optimiser's own step counts are restored with its moments.
        """
        scheduler, steps = self.engine.lr_scheduler, state["lr_steps"]
        scheduler.load_state_dict(scheduler.state_dict() | {"last_epoch": steps, "_step_count": steps + 1})
        rates = [base * rule(steps) for base, rule in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        scheduler._last_lr = rates
        for group, rate in zip(self.engine.engine.basic_optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for name, value in (state["loss_scale"] or {}).items():
            setattr(self.engine.engine.optimizer.loss_scaler, name, value)
        self.steps = state["steps"]


class Moment:
    """One of Adam's two moments. It exists after the first step that is not skipped."""

    def __init__(self, engine: StudentEngine, key: str, counters: EngineCounters) -> None:
        """`key` names the moment in the optimiser's state; `counters` hold its number of steps."""
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
        """Set the moment, and the optimiser's steps from the counters, which are loaded first."""
        engine, state = self.engine.engine, self.engine.engine.basic_optimizer.state
        # Make the state that the optimiser's first step would make.
        for p in _native_params(self.engine):
            if not state[p]:
                state[p] = {"step": torch.tensor(float(self.counters.steps), device=p.device)}
                state[p] |= {name: torch.zeros_like(p, dtype=torch.float32) for name in moment_names(self.engine)}
        # DeepSpeed ties moments to parameter names after its first step; none has been made here.
        link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()
        for name, param in self.engine.trainable:
            _set(self.engine, param, tensors[name].to(param.device), self.key)


class NativeMoments:
    """The 8-bit optimiser's state on one rank; empty for AdamW, whose moments `Moment` saves."""

    def __init__(self, engine: StudentEngine) -> None:
        self.engine = engine

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors by `<index of the parameter>.<name of the value>`."""
        if moment_names(self.engine):
            return {}
        state = self.engine.engine.basic_optimizer.state
        return {
            f"{i}.{key}": torch.as_tensor(value)
            for i, p in enumerate(_native_params(self.engine))
            for key, value in state[p].items()
        }

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore the state on the same rank of a world of the same size."""
        by_param: dict[str, dict[str, torch.Tensor]] = {}
        for name, value in state.items():
            index, _, key = name.partition(".")
            by_param.setdefault(index, {})[key] = value
        optimizer_state = self.engine.engine.basic_optimizer.state
        for i, p in enumerate(_native_params(self.engine)):
            values = by_param.get(str(i))
            if values:
                step = int(values.pop("step"))  # bitsandbytes keeps an int
                optimizer_state[p] = {"step": step, **{key: value.to(p.device) for key, value in values.items()}}

    def reshard(self, states: list, world) -> None:
        """None: a run with 8-bit moments and another number of ranks is refused before this."""


def moment_names(engine: StudentEngine) -> tuple[str, ...]:
    """The moments that are saved by parameter name; none of the 8-bit optimiser's can be."""
    return ("exp_avg", "exp_avg_sq") if isinstance(engine.engine.basic_optimizer, torch.optim.AdamW) else ()


def loss_scale(engine: StudentEngine) -> dict | None:
    """The dynamic loss scaler's values, or None where there is none."""
    scaler = getattr(engine.engine.optimizer, "loss_scaler", None)
    if not getattr(scaler, "dynamic", False):
        return None
    return {name: getattr(scaler, name) for name in _LOSS_SCALE if hasattr(scaler, name)}


def _set(engine: StudentEngine, param: nn.Parameter, value: torch.Tensor, moment: str | None = None) -> None:
    """Copy a whole tensor into the fp32 master of a parameter, or into one of its moments."""
    from deepspeed import utils

    if engine.stage == 0:
        # A float32 parameter is its own master, and the caller sets it.
        if moment is not None:
            engine.engine.basic_optimizer.state[param][moment].copy_(value)
    elif engine.stage < 3:
        if moment is None:
            utils.safe_set_full_fp32_param(param, value)
        else:
            utils.safe_set_full_optimizer_state(param, value, moment)
    else:
        # Shards are padded to one size, which DeepSpeed's setter for whole tensors does not expect.
        size = param.ds_tensor.ds_numel
        flat = nn.functional.pad(value.flatten(), (0, size * torch.distributed.get_world_size() - value.numel()))
        shard = flat.narrow(0, size * torch.distributed.get_rank(), size)
        if moment is None:
            utils.safe_set_local_fp32_param(param, shard)
        else:
            utils.safe_set_local_optimizer_state(param, shard, moment)


def _native_params(engine: StudentEngine) -> list[torch.Tensor]:
    """The optimiser's own parameters on this rank, in its order: flat partitions under ZeRO."""
    if engine.stage == 3:  # which empties the parameter groups between steps
        return list(engine.engine.optimizer.fp32_partitioned_groups_flat)
    return [p for group in engine.engine.basic_optimizer.param_groups for p in group["params"]]

"""What a checkpoint holds of the student's engine.

Weights and moments are saved by parameter name, so that any number of ranks can continue from them.
All ranks have to call the methods of these classes together, and iterate together over what they
return.
"""

from __future__ import annotations

import torch
from torch import nn

from selfnpo_fast.runtime.layout import Layout, check_keys, check_layout, check_number, check_whole_number, layout_of
from selfnpo_fast.runtime.writer import NamedTensors
from selfnpo_fast.training.engine import StudentEngine

_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""Attributes of DeepSpeed's dynamic loss scaler."""


def _trained_layout(engine: StudentEngine) -> Layout:
    """A float32 tensor of each trained parameter's whole shape, which ZeRO 3 keeps elsewhere."""
    return {name: (torch.float32, tuple(getattr(p, "ds_shape", p.shape))) for name, p in engine.trainable}


class StudentWeights:
    """The trained parameters and their fp32 masters."""

    required = True

    def __init__(self, engine: StudentEngine) -> None:
        self.engine = engine

    def layout(self) -> Layout:
        """That of `state_dict()`."""
        return _trained_layout(self.engine)

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

        The optimiser's own step counts are restored with its moments. Raises ValueError for values
        that `state_dict()` cannot have returned.
        """
        check_keys(state, ("steps", "lr_steps", "loss_scale"))
        check_whole_number("steps", state["steps"])
        check_whole_number("lr_steps", state["lr_steps"])
        self._check_scale(state["loss_scale"])
        scheduler, steps = self.engine.lr_scheduler, state["lr_steps"]
        scheduler.load_state_dict(scheduler.state_dict() | {"last_epoch": steps, "_step_count": steps + 1})
        rates = [base * rule(steps) for base, rule in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        scheduler._last_lr = rates
        for group, rate in zip(self.engine.engine.basic_optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for name, value in (state["loss_scale"] or {}).items():
            setattr(self.engine.engine.optimizer.loss_scaler, name, value)
        self.steps = state["steps"]
        if _is_on_host(self.engine):
            self._catch_up()

    def _catch_up(self) -> None:
        """Let CPUAdam count the steps of the loaded state.

        It multiplies up the powers of beta from step to step, and would compute them in another way
        after a jump, which differs in the last bits: a resumed run would not end in the same ones.
        """
        optimizer = self.engine.engine.basic_optimizer
        group, nothing = optimizer.param_groups[0], [torch.zeros(1) for _ in range(4)]
        first, second = group["betas"]
        for step in range(1, self.steps + 1):
            settings = (0.0, first, second, group["eps"], 0.0, group["bias_correction"])
            optimizer.ds_opt_adam.adam_update(optimizer.opt_id, step, *settings, *nothing)

    def _check_scale(self, saved: object) -> None:
        """ValueError unless `saved` has the names of this engine's loss scale, and numbers."""
        present = loss_scale(self.engine)
        if present is None:
            if saved is not None:
                raise ValueError("loss_scale is there, but this run has none")
            return
        check_keys(saved, present)
        check_number("cur_scale", saved["cur_scale"], 2.0**-60)
        for name in present:
            if name != "cur_scale":
                check_whole_number(name, saved[name], -1)


class Moment:
    """One of Adam's two moments. It exists after the first step that is not skipped."""

    def __init__(self, engine: StudentEngine, key: str, counters: EngineCounters) -> None:
        """`key` names the moment in the optimiser's state; `counters` hold its number of steps."""
        self.engine, self.key, self.counters = engine, key, counters

    @property
    def required(self) -> bool:
        """Whether the counters speak of steps, so that there has to be a moment."""
        return self.counters.steps > 0

    def layout(self) -> Layout:
        """That of `state_dict()`, where there is one."""
        return _trained_layout(self.engine)

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
                steps = self.counters.steps
                state[p] = {"step": steps if _is_on_host(self.engine) else torch.tensor(float(steps), device=p.device)}
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
        """Restore the state on the same rank of a world of the same size.

        Raises ValueError where `state` is none of this run's optimiser.
        """
        if not state:  # before the first step
            return
        if moment_names(self.engine):
            raise ValueError("8-bit moments are there, but this run's optimiser has none")
        optimizer, params = self.engine.engine.basic_optimizer, _native_params(self.engine)
        # Make the state that the optimiser's first step would make; the saved one has to look like
        # it.
        for p in params:
            optimizer.init_state(optimizer.param_groups[0], p, 0, 0)
        check_layout(layout_of(state.items()), layout_of(self.state_dict().items()))
        for i, p in enumerate(params):
            own = optimizer.state[p]
            values = {key: state[f"{i}.{key}"].to(p.device) for key in own}
            step = int(values.pop("step"))  # bitsandbytes keeps an int
            check_whole_number("step", step)
            own.update(values, step=step)

    def reshard(self, states: list, world) -> None:
        """None: a run with 8-bit moments and another number of ranks is refused before this."""


def moment_names(engine: StudentEngine) -> tuple[str, ...]:
    """The moments that are saved by parameter name; none of the 8-bit optimiser's can be."""
    is_adamw = isinstance(engine.engine.basic_optimizer, torch.optim.AdamW) or _is_on_host(engine)
    return ("exp_avg", "exp_avg_sq") if is_adamw else ()


def _is_on_host(engine: StudentEngine) -> bool:
    """Whether DeepSpeed's CPUAdam is the optimiser; it has AdamW's state, but counts in ints."""
    return type(engine.engine.basic_optimizer).__name__ == "DeepSpeedCPUAdam"


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

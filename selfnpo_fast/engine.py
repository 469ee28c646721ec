"""The student under DeepSpeed: configuration, initialisation, and the few things the trainer asks of it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn

from selfnpo_fast.config import OptimizerConfig, TrainConfig
from selfnpo_fast.console import logger, quiet_libraries
from selfnpo_fast.errors import UserError
from selfnpo_fast.moving_reference import no_gather
from selfnpo_fast.world import World


def zero_stage(config: TrainConfig) -> int:
    """The ZeRO stage in force: half precision needs stage 1 at least, whose fp32 masters we can address by name."""
    stage = config.engine.zero_stage
    return max(stage, 1) if config.engine.precision != "fp32" else stage


def deepspeed_config(config: TrainConfig, world_size: int) -> dict:
    """The DeepSpeed configuration of a run."""
    engine = config.engine
    micro = engine.micro_batch(world_size)
    out = {
        "train_batch_size": engine.batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": engine.accumulation,
        "gradient_clipping": config.optimizer.clip,
        "zero_optimization": {"stage": zero_stage(config), "overlap_comm": torch.cuda.is_available()},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if engine.precision == "bf16":
        out["bf16"] = {"enabled": True}
        out["data_types"] = {"grad_accum_dtype": "fp32"}
    elif engine.precision == "fp16":
        out["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}
    return out


def make_optimizer(config: OptimizerConfig) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """A factory that DeepSpeed calls with the parameters it manages."""
    arguments = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps, "weight_decay": config.weight_decay}

    def build(params):
        """The optimiser over `params`."""
        params = list(params)
        if config.name == "adamw8bit":
            import bitsandbytes

            return bitsandbytes.optim.AdamW8bit(params, **arguments)
        return torch.optim.AdamW(params, **arguments)

    return build


def warmup_schedule(optimizer: torch.optim.Optimizer, warmup: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over `warmup` updates, then constant."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(warmup, 1)))


def _import_deepspeed():
    import deepspeed

    quiet_libraries()  # DeepSpeed sets its logger's level while it is imported
    # The shared-memory op takes a minute to compile and serves tensor-parallel inference alone.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class StudentEngine:
    """The trained network: a thin face over a DeepSpeed engine."""

    def __init__(self, config: TrainConfig, student: nn.Module, world: World) -> None:
        deepspeed = self._deepspeed = _import_deepspeed()
        if config.engine.precision == "fp16" and world.device.type == "cpu":
            raise UserError("engine.precision: fp16 needs a GPU; use fp32 or bf16 on a CPU")
        self.stage = zero_stage(config)
        if self.stage != config.engine.zero_stage:
            logger.info("ZeRO: stage 1 instead of 0, since %s keeps fp32 masters", config.engine.precision)
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        deepspeed.init_distributed(dist_backend=backend, verbose=False, auto_mpi_discovery=False)
        self.trainable = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
        # Its bf16 optimiser prints memory figures to standard output, whatever its log level.
        with contextlib.redirect_stdout(io.StringIO()):
            self.engine, _, _, self.lr_scheduler = deepspeed.initialize(
                model=student,
                model_parameters=[p for _, p in self.trainable],
                optimizer=make_optimizer(config.optimizer),
                lr_scheduler=lambda optimizer: warmup_schedule(optimizer, config.optimizer.warmup),
                config=deepspeed_config(config, world.size),
                dist_init_required=False,
            )
        self.module = self.engine.module

    def __call__(self, *args, **kwargs):
        return self.engine(*args, **kwargs)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The network's parameters (their dtype tells its precision)."""
        return self.module.parameters()

    def gather(self, params: list[nn.Parameter], modify: bool = False) -> AbstractContextManager:
        """Makes ZeRO-3 parameters whole inside the context; with `modify`, rank 0's changes reach the shards."""
        if self.stage != 3:
            return no_gather(params)
        return self._deepspeed.zero.GatheredParameters(params, modifier_rank=0 if modify else None)

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of one micro-batch, reduced over ranks at the update's end."""
        self.engine.backward(loss)

    def step(self) -> torch.Tensor:
        """Close a micro-batch; at the update's end clip, update and return the gradient norm (scalar tensor)."""
        norm = None
        if self.stage == 0 and self.engine.is_gradient_accumulation_boundary():
            # Without ZeRO, DeepSpeed clips but keeps no norm.
            norm = nn.utils.get_total_norm([p.grad for _, p in self.trainable if p.grad is not None])
        self.engine.step()
        if norm is None:
            norm = self.engine.get_global_grad_norm()
        return torch.as_tensor(float("nan") if norm is None else norm)

    def set_lr_steps(self, steps: int) -> None:
        """Put the learning-rate schedule where it is after `steps` updates."""
        scheduler = self.lr_scheduler
        scheduler.load_state_dict(scheduler.state_dict() | {"last_epoch": steps, "_step_count": steps + 1})
        rates = [base * rule(steps) for base, rule in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        scheduler._last_lr = rates
        for group, rate in zip(self.engine.basic_optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    @property
    def lr(self) -> float:
        """The learning rate of the next update."""
        return self.lr_scheduler.get_last_lr()[0]

    def full_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole float32 tensor) of every trainable parameter; all ranks have to iterate together."""
        from deepspeed.utils import safe_get_full_fp32_param

        for name, param in self.trainable:
            whole = safe_get_full_fp32_param(param) if self.stage > 0 else None
            yield name, (param if whole is None else whole).detach().float()

    def frozen_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole tensor) of parameters that are not trained; all ranks have to iterate together."""
        for name, param in self.module.named_parameters():
            if not param.requires_grad:
                with self.gather([param]):
                    yield name, param.detach()

"""The student under DeepSpeed: configuration, initialisation, and the few things the trainer asks of it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn

from selfnpo_fast.config import OptimizerConfig, TrainConfig
from selfnpo_fast.runtime.console import logger, quiet_libraries
from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.runtime.world import World


def zero_stage(config: TrainConfig) -> int:
    """The ZeRO stage in force: half precision needs stage 1 at least, whose fp32 masters we can address by name."""
    stage = config.engine.zero_stage
    return max(stage, 1) if config.engine.precision != "fp32" else stage


BUCKETS, LEAST_BUCKET = 8, 2**20
"""Gradients are reduced in about so many buckets of at least so many elements: DeepSpeed's own size, half a billion,
would hold all of a UNet's, and no reduction could begin before the backward pass has ended."""


def deepspeed_config(config: TrainConfig, world_size: int, trained: int) -> dict:
    """The DeepSpeed configuration of a run that trains `trained` parameters."""
    engine = config.engine
    micro = engine.micro_batch(world_size)
    out = {
        "train_batch_size": engine.batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": engine.accumulation,
        "gradient_clipping": config.optimizer.clip if zero_stage(config) else 0,  # without ZeRO we clip ourselves
        "zero_optimization": {
            "stage": zero_stage(config),
            "overlap_comm": torch.cuda.is_available(),
            "contiguous_gradients": True,
            "reduce_bucket_size": max(LEAST_BUCKET, trained // BUCKETS),
        },
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
            return _eight_bit()(params, **arguments)
        return torch.optim.AdamW(params, fused=True, **arguments)

    return build


def _eight_bit() -> type[torch.optim.Optimizer]:
    import bitsandbytes

    class AdamW8bit(bitsandbytes.optim.AdamW8bit):
        """With `found_inf`, as torch's fused AdamW reads it, but on the host: its kernels know of none."""

        found_inf: torch.Tensor | None = None

        def step(self, closure=None):
            """Nothing, where the gradients are known to be useless."""
            return None if self.found_inf is not None and self.found_inf.item() else super().step(closure)

    return AdamW8bit


def clip(optimizer: torch.optim.Optimizer, most: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale the gradients to a norm of at most `most` (0: leave them); one that is not finite voids the next step.

    Returns scalar tensors, on which the host need not wait: the norm as it was, and whether it is finite.
    """
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in params])
    if most:
        nn.utils.clip_grads_with_norm_(params, most, norm)
    finite = norm.isfinite()
    optimizer.found_inf = finite.logical_not().float()
    return norm, finite


def warmup_schedule(optimizer: torch.optim.Optimizer, warmup: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over `warmup` updates, then constant."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(warmup, 1)))


def start_deepspeed(world: World):
    """The library, its communication set up; a second call does nothing more."""
    import deepspeed

    quiet_libraries()  # DeepSpeed sets its logger's level while it is imported
    # The shared-memory op takes a minute to compile and serves tensor-parallel inference alone.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, verbose=False, auto_mpi_discovery=False)
    return deepspeed


class _NetworkOfEngine(nn.Module):
    """The network as DeepSpeed sees it: hooks and timers of its engine go here.

    With LoRA the reference calls the network itself, perhaps in another thread, and must not meet them.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.train(network.training)

    def forward(self, *args, **kwargs):
        """The network's."""
        return self.network(*args, **kwargs)


class StudentEngine:
    """The trained network: a thin face over a DeepSpeed engine."""

    def __init__(self, config: TrainConfig, student: nn.Module, world: World) -> None:
        if config.engine.precision == "fp16" and world.device.type == "cpu":
            raise UserError("engine.precision: fp16 needs a GPU; use fp32 or bf16 on a CPU")
        self.stage, self.clip, self.device = zero_stage(config), config.optimizer.clip, world.device
        if self.stage != config.engine.zero_stage:
            logger.info("ZeRO: stage 1 instead of 0, since %s keeps fp32 masters", config.engine.precision)
        deepspeed = self._deepspeed = start_deepspeed(world)
        self.trainable = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
        # Its bf16 optimiser prints memory figures to standard output, whatever its log level.
        with contextlib.redirect_stdout(io.StringIO()):
            self.engine, _, _, self.lr_scheduler = deepspeed.initialize(
                model=_NetworkOfEngine(student),
                model_parameters=[p for _, p in self.trainable],
                optimizer=make_optimizer(config.optimizer),
                lr_scheduler=lambda optimizer: warmup_schedule(optimizer, config.optimizer.warmup),
                config=deepspeed_config(config, world.size, sum(p.numel() for _, p in self.trainable)),
                dist_init_required=False,
            )
        self.module = student

    def __call__(self, *args, **kwargs):
        return self.engine(*args, **kwargs)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The network's parameters (their dtype tells its precision)."""
        return self.module.parameters()

    def gather(self, params: list[nn.Parameter], modify: bool = False) -> AbstractContextManager:
        """Makes ZeRO-3 parameters whole inside the context; with `modify`, rank 0's changes reach the shards."""
        if self.stage != 3:
            return contextlib.nullcontext()
        return self._deepspeed.zero.GatheredParameters(params, modifier_rank=0 if modify else None)

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of one micro-batch, reduced over ranks at the update's end."""
        self.engine.backward(loss)

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Close a micro-batch; at the update's end clip and update.

        Returns scalar tensors: the gradient norm, and whether weights moved: a norm that is not finite skips the
        update. Without ZeRO, and with AdamW in float32, neither has to reach the host for that.
        """
        if self.stage or not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()
            norm = self.engine.get_global_grad_norm()
            return self._scalar(float("nan") if norm is None else norm), self._scalar(self.engine.was_step_applied())
        # DeepSpeed's own clipping reads the norm, and it would take any gradient.
        norm, finite = clip(self.engine.basic_optimizer, self.clip)
        self.engine.step()
        return norm, finite

    def _scalar(self, value: torch.Tensor | float | bool) -> torch.Tensor:
        """On the device by a kernel: a copy from the host would wait for all that the device has to do."""
        return value if isinstance(value, torch.Tensor) else torch.full((), value, device=self.device)

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

"""The student under DeepSpeed: configuration, optimiser, and the calls that the trainer needs."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn

from selfnpo_fast.config import OptimizerConfig, TrainConfig
from selfnpo_fast.runtime.console import logger, quiet_libraries, say_once
from selfnpo_fast.runtime.dtypes import network_dtype
from selfnpo_fast.runtime.errors import UserError, one_line
from selfnpo_fast.runtime.world import World


def zero_stage(config: TrainConfig) -> int:
    """The ZeRO stage in force.

    Half precision needs at least stage 1, whose fp32 masters can be addressed by name.
    """
    stage = config.engine.zero_stage
    return max(stage, 1) if config.engine.precision != "fp32" else stage


BUCKETS = 8
"""Gradients are reduced in about this many buckets.

A bucket of DeepSpeed's default size, half a billion elements, would hold all gradients of a UNet,
and no reduction could begin before the backward pass has ended.
"""
LEAST_BUCKET = 2**20
"""Elements of the smallest bucket."""


def deepspeed_config(config: TrainConfig, world_size: int, trained: int) -> dict:
    """The DeepSpeed configuration of a run that trains `trained` parameters."""
    engine = config.engine
    out = {
        "train_batch_size": engine.batch_size,
        "train_micro_batch_size_per_gpu": engine.micro_batch(world_size),
        "gradient_accumulation_steps": engine.accumulation,
        # Without ZeRO, `StudentEngine.step` clips.
        "gradient_clipping": config.optimizer.clip if zero_stage(config) else 0,
        "zero_optimization": {
            "stage": zero_stage(config),
            # With one rank there is nothing to reduce.
            "overlap_comm": torch.cuda.is_available() and world_size > 1,
            "contiguous_gradients": True,
            "reduce_bucket_size": max(LEAST_BUCKET, trained // BUCKETS),
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        # DeepSpeed's throughput timer waits for the whole device at every forward and every step,
        # and so for the rollout of the next update, which runs on a stream of its own.
        "timers": {"throughput": {"enabled": False}},
    }
    if engine.offload == "optimizer":
        out["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if engine.precision == "bf16":
        out["bf16"] = {"enabled": True}
        out["data_types"] = {"grad_accum_dtype": "fp32"}
    elif engine.precision == "fp16":
        out["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}
    return out


EIGHT_BIT_ELEMENTS = 2**31 - 1
"""Elements of one tensor that bitsandbytes' 8-bit optimisers can count; with more, the count wraps
and most of the tensor stays as it is."""


def parameter_groups(config: OptimizerConfig, params: list[nn.Parameter]) -> list[dict[str, list[nn.Parameter]]]:
    """`params` in groups, of each of which ZeRO makes one flat tensor that it shares out over
    ranks.

    All are one group, except where 8-bit AdamW could not count the flat tensor's elements, as those
    of SDXL on one rank (2,567,463,684).
    """
    groups, size = [[]], 0
    for p in params:
        size += p.numel()
        if config.name == "adamw8bit" and groups[-1] and size > EIGHT_BIT_ELEMENTS:
            groups.append([])
            size = p.numel()
        groups[-1].append(p)
    return [{"params": group} for group in groups]


def make_optimizer(config: OptimizerConfig, *, on_host: bool = False) -> Callable[[list[dict]], torch.optim.Optimizer]:
    """A factory of the optimiser; DeepSpeed calls it with the parameters that it manages.

    With `on_host` it is DeepSpeed's CPUAdam, which computes the same AdamW in host memory.
    """
    arguments = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps, "weight_decay": config.weight_decay}

    def build(params):
        """The optimiser over `params`."""
        params = list(params)
        if on_host:
            return _on_host(params, arguments)
        if config.name == "adamw8bit":
            return _eight_bit()(params, **arguments)
        return torch.optim.AdamW(params, fused=True, **arguments)

    return build


def _on_host(params: list[dict], arguments: dict) -> torch.optim.Optimizer:
    """DeepSpeed's CPUAdam. Raises UserError where it cannot be compiled, as it is at first use."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    logger.info("engine.offload: optimizer: DeepSpeed's CPUAdam is compiled at its first use, which takes minutes")
    try:
        return DeepSpeedCPUAdam(params, **arguments, adamw_mode=True)
    except Exception as error:
        raise UserError(
            f"engine.offload: optimizer: DeepSpeed cannot compile its CPUAdam: {one_line(error, 160)}; install ninja "
            "and a C++ compiler, or use none"
        ) from error


def _eight_bit() -> type[torch.optim.Optimizer]:
    import bitsandbytes

    class AdamW8bit(bitsandbytes.optim.AdamW8bit):
        """The 8-bit optimiser; skips a step where `found_inf` is set, as torch's fused AdamW does.

        Its kernels know nothing of `found_inf`, so the value is read on the host.
        """

        found_inf: torch.Tensor | None = None

        def step(self, closure=None):
            """One step, or nothing where the gradients are not finite."""
            return None if self.found_inf is not None and self.found_inf.item() else super().step(closure)

    return AdamW8bit


def clip(optimizer: torch.optim.Optimizer, max_norm: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale the gradients down to a norm of at most `max_norm`; 0 leaves them as they are.

    A norm that is not finite makes the optimiser skip its next step.

    Returns scalar tensors, for which the host need not wait: the norm before clipping, and whether
    it is finite.
    """
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in params])
    if max_norm:
        nn.utils.clip_grads_with_norm_(params, max_norm, norm)
    finite = norm.isfinite()
    optimizer.found_inf = finite.logical_not().float()
    return norm, finite


def warmup_schedule(optimizer: torch.optim.Optimizer, warmup: int) -> torch.optim.lr_scheduler.LambdaLR:
    """A learning rate that rises linearly over `warmup` updates and is constant after them."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(warmup, 1)))


def start_deepspeed(world: World):
    """Imports DeepSpeed, sets up its communication, and returns the module.

    A second call changes nothing.
    """
    import deepspeed

    quiet_libraries()  # DeepSpeed sets its logger's level while it is imported
    # The shared-memory op takes a minute to compile, and only tensor-parallel inference needs it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, verbose=False, auto_mpi_discovery=False)
    return deepspeed


def allow_tf32(config: TrainConfig, device: torch.device) -> None:
    """Set torch's switches for float32 arithmetic on a GPU as `engine.tf32` says, and log it.

    They hold for the process, which the run has to itself.
    """
    if device.type != "cuda" or config.engine.precision != "fp32":
        return
    tf32 = config.engine.tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = tf32
    chosen = "TF32, by the algorithms that cuDNN finds fastest" if tf32 else "float32 throughout"
    logger.info("fp32 on the GPU: %s (engine.tf32)", chosen)


class _EngineModule(nn.Module):
    """What DeepSpeed takes for its network: it calls the real one, and gets the hooks and timers.

    With full weights the network is a child, or of two experts the trained one. With LoRA the
    trained parameters are, and nothing else: what DeepSpeed does to all parameters of its network
    (it casts them to the run's precision, moves them, broadcasts them from rank 0, and shares them
    out with ZeRO 3) does not reach what is frozen, which every rank has read for itself and which
    may be quantised or offloaded. The reference calls the network directly, perhaps in another
    thread, and runs no hook of DeepSpeed.
    """

    def __init__(self, network: nn.Module, trained: list[nn.Parameter]) -> None:
        super().__init__()
        self.call: Callable = network.__call__  # bound to the network, which becomes no child by it
        whole = [part for part in (network, *network.children()) if all(p.requires_grad for p in part.parameters())]
        if whole and sum(1 for _ in whole[0].parameters()) == len(trained):
            self.network = whole[0]
        else:
            self.trained = nn.ParameterList(trained)
        self.train(network.training)

    def forward(self, *args, **kwargs):
        """The network's forward."""
        return self.call(*args, **kwargs)


class StudentEngine:
    """The trained network: a thin layer over a DeepSpeed engine."""

    def __init__(self, config: TrainConfig, student: nn.Module, world: World) -> None:
        """Hands `student` to DeepSpeed. Raises UserError for fp16 on a CPU."""
        if config.engine.precision == "fp16" and world.device.type == "cpu":
            raise UserError("engine.precision: fp16 needs a GPU; use fp32 or bf16 on a CPU")
        self.stage, self.clip, self.device = zero_stage(config), config.optimizer.clip, world.device
        if self.stage != config.engine.zero_stage:
            logger.info("ZeRO: stage 1 instead of 0, since %s keeps fp32 masters", config.engine.precision)
        deepspeed = self._deepspeed = start_deepspeed(world)
        self.trainable = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
        wide = [p for _, p in self.trainable if p.dtype == torch.float32]
        # DeepSpeed's bf16 optimiser prints memory figures to standard output at any log level.
        with contextlib.redirect_stdout(io.StringIO()):
            self.engine, _, _, self.lr_scheduler = deepspeed.initialize(
                model=_EngineModule(student, [p for _, p in self.trainable]),
                model_parameters=parameter_groups(config.optimizer, [p for _, p in self.trainable]),
                optimizer=make_optimizer(config.optimizer, on_host=config.engine.offload == "optimizer"),
                lr_scheduler=lambda optimizer: warmup_schedule(optimizer, config.optimizer.warmup),
                config=deepspeed_config(config, world.size, sum(p.numel() for _, p in self.trainable)),
                dist_init_required=False,
            )
        self.module = student
        cast = sum(p.dtype != torch.float32 for p in wide)
        if cast and len(wide) < len(self.trainable):
            say_once(
                f"engine.precision: {cast} of {len(self.trainable)} trained tensors, which the model keeps in float32, "
                f"are {config.engine.precision} in the student, as DeepSpeed casts them; their masters are float32"
            )

    def __call__(self, *args, **kwargs):
        return self.engine(*args, **kwargs)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the network computes in."""
        return network_dtype(self.module)

    def gather(self, params: list[nn.Parameter], modify: bool = False) -> AbstractContextManager:
        """A context in which ZeRO-3 parameters are whole.

        With `modify`, the changes that rank 0 makes in it reach the shards of all ranks.
        """
        if self.stage != 3:
            return contextlib.nullcontext()
        return self._deepspeed.zero.GatheredParameters(params, modifier_rank=0 if modify else None)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of one micro-batch; all ranks' are averaged by the update's end."""
        self.engine.backward(loss)

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """End a micro-batch; at the update's end, clip the gradients and update the weights.

        Returns two scalar tensors: the gradient norm, and whether the weights moved. A norm that is
        not finite skips the update. Without ZeRO, and with AdamW in float32, the host need not wait
        for either of them.
        """
        if self.stage or not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()
            norm = self.engine.get_global_grad_norm()
            return self._scalar(float("nan") if norm is None else norm), self._scalar(self.engine.was_step_applied())
        # DeepSpeed's own clipping reads the norm on the host, and would apply any gradient.
        norm, finite = clip(self.engine.basic_optimizer, self.clip)
        self.engine.step()
        return norm, finite

    def _scalar(self, value: torch.Tensor | float | bool) -> torch.Tensor:
        """A scalar tensor on the device.

        A kernel fills it: a copy from the host would wait for all work of the device.
        """
        return value if isinstance(value, torch.Tensor) else torch.full((), value, device=self.device)

    @property
    def lr(self) -> float:
        """The learning rate of the next update."""
        return self.lr_scheduler.get_last_lr()[0]

    def full_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole float32 tensor) of every trained parameter; all ranks iterate together."""
        from deepspeed.utils import safe_get_full_fp32_param

        for name, param in self.trainable:
            whole = safe_get_full_fp32_param(param) if self.stage > 0 else None
            yield name, (param if whole is None else whole).detach().float()

    def frozen_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole tensor) of every other parameter; all ranks iterate together."""
        for name, param in self.module.named_parameters():
            if not param.requires_grad:
                with self.gather([param]):
                    yield name, param.detach()

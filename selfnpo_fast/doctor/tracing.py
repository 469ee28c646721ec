"""What a network's forward and backward cost, found without its weights.

The real module runs on PyTorch's fake tensors: every operation works out shapes and computes nothing, so a network of
any size is traced in seconds. Two dispatch modes watch the operations: torch's FlopCounterMode counts what they
compute, `LiveBytes` follows which of their results are alive. FLOPs count a multiplication and an addition as two;
convolutions, matrix products and attention are counted, what is done element by element is not.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from selfnpo_fast.config import LoraConfig
from selfnpo_fast.models import StableDiffusionAdapter
from selfnpo_fast.training.lora import add_lora

PERSISTENT_ELEMENTS = 100_000
"""DeepSpeed's stage3_param_persistence_threshold: smaller parameters stay whole on every rank."""
SMALL_8BIT = 4096
"""bitsandbytes' min_8bit_size: the moments of smaller tensors stay float32."""

# torch counts the attention of GPUs alone; fake tensors take the CPU's, which keeps as little (output and logsumexp).
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
        sdpa_backward_flop_count(grad, q, k, v)
    ),
}


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensor storages that operations make inside the context, while they live.

    `now` is what lives at present and `peak` the most there was; what an operation needs for itself alone is not seen.
    `gradients` is for the caller to set; `peak_gradients` is what it was at the peak. Storages in `known`, such as
    those of weights, are not counted.
    """

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = self.gradients = self.peak_gradients = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        weakref.finalize(storage, self._gone, key, size)
        self.now += size
        if self.now > self.peak:
            self.peak, self.peak_gradients = self.now, self.gradients

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@dataclass(frozen=True, kw_only=True)
class Network:
    """A denoiser's parameters: counts of elements, and bytes in the dtypes that they are held in."""

    total: int
    trained: int
    weight_bytes: int
    trained_bytes: int
    largest_trained: int  # elements
    persistent: int  # trained elements that ZeRO 3 leaves whole
    small: int  # trained elements in tensors whose 8-bit moments stay float32

    @classmethod
    def of(cls, module: nn.Module) -> Network:
        """Counts a module's parameters; its buffers go with the weights."""
        parameters = list(module.parameters())
        trained = [p for p in parameters if p.requires_grad]
        return cls(
            total=sum(p.numel() for p in parameters),
            trained=sum(p.numel() for p in trained),
            weight_bytes=sum(t.nbytes for t in (*parameters, *module.buffers())),
            trained_bytes=sum(p.nbytes for p in trained),
            largest_trained=max(p.numel() for p in trained),
            persistent=sum(p.numel() for p in trained if p.numel() < PERSISTENT_ELEMENTS),
            small=sum(p.numel() for p in trained if p.numel() < SMALL_8BIT),
        )


@dataclass(frozen=True, kw_only=True)
class Student:
    """One micro-batch of the student. Bytes are beyond the weights."""

    kept: int  # activations and inputs that live between forward and backward
    peak: int  # the most that lives, gradients of the parameters included
    peak_gradients: int  # of which gradients


class FakeDenoiser:
    """A denoiser whose weights have shapes alone. Raises UserError as adapters do, and for unknown LoRA targets."""

    def __init__(
        self, adapter: StableDiffusionAdapter, dtype: torch.dtype, lora: LoraConfig, *, checkpointing: bool = False
    ) -> None:
        self.adapter, self.dtype = adapter, dtype
        self._mode = FakeTensorMode()
        with torch.device("meta"):
            self.module = adapter.new_denoiser(dtype)
            if lora.rank:
                add_lora(self.module, lora, seed=0)
            else:
                self.module.requires_grad_(True)
        # Fake tensors choose a CPU's operations, which meta tensors do not: attention would keep all its scores.
        with self._mode:
            _refill(self.module, dtype)
        if checkpointing:
            self.module.enable_gradient_checkpointing()
        self.network = Network.of(self.module)

    def _inputs(self, batch: int, one_row: bool):
        """Latents, timesteps and conditioning rows as a run has them; `one_row` is the empty prompt, not copied."""
        x = torch.empty(batch, *self.adapter.latent_shape)
        t = torch.empty(batch, dtype=torch.int64)
        rows = {
            name: torch.empty(1 if one_row else batch, *shape, dtype=self.dtype).expand(batch, *shape)
            for name, shape in self.adapter.conditioning_shapes.items()
        }
        return x, t, rows

    def _predict(self, batch: int, one_row: bool = False) -> torch.Tensor:
        return self.adapter.predict(self.module, *self._inputs(batch, one_row))

    def forward_peak(self, batch: int, *, one_row: bool = False) -> int:
        """Bytes, beyond the weights, of a forward of `batch` rows without gradients; with `one_row` all are given the
        empty prompt."""
        self.module.eval()
        live = self._live_bytes()
        with self._mode, torch.no_grad(), live:
            self._predict(batch, one_row)
        return live.peak

    def student(self, batch: int, *, keep_gradients: bool = True) -> Student:
        """Forward and backward of a micro-batch. Without `keep_gradients` each is dropped as soon as it is there."""
        self.module.train()
        live = self._live_bytes()
        handles = [
            p.register_post_accumulate_grad_hook(self._keep(live) if keep_gradients else _drop)
            for p in self.module.parameters()
            if p.requires_grad
        ]
        with self._mode, live:
            out = self._predict(batch)
            kept = live.now
            out.backward(torch.empty_like(out))
        for handle in handles:
            handle.remove()
        self._clear_gradients()
        return Student(kept=kept, peak=live.peak, peak_gradients=live.peak_gradients)

    # FLOPs are counted in passes of their own: the counter's hooks would keep what checkpointing frees.

    @functools.cached_property
    def forward_flops(self) -> int:
        """FLOPs of a forward of one sample; a batch is proportional."""
        self.module.eval()
        with self._mode, torch.no_grad(), _flop_counter() as flops:
            self._predict(1)
        return flops.get_total_flops()

    @functools.cached_property
    def student_flops(self) -> int:
        """FLOPs of forward and backward of one sample, recomputation included; a batch is proportional."""
        self.module.train()
        with self._mode, _flop_counter() as flops:
            out = self._predict(1)
            out.backward(torch.empty_like(out))
        self._clear_gradients()
        return flops.get_total_flops()

    def _clear_gradients(self) -> None:
        for parameter in self.module.parameters():
            parameter.grad = None

    def _live_bytes(self) -> LiveBytes:
        return LiveBytes([*self.module.parameters(), *self.module.buffers()])

    @staticmethod
    def _keep(live: LiveBytes):
        def count(parameter: nn.Parameter) -> None:
            live.gradients += parameter.grad.nbytes

        return count


def _flop_counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=_ATTENTION)


def _refill(module: nn.Module, dtype: torch.dtype) -> None:
    """Give every parameter and buffer a new, empty tensor of its shape on the CPU.

    PEFT casts its weights to `dtype` in real networks, but not on the meta device.
    """
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=dtype)
            part.register_parameter(name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            part.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _drop(parameter: nn.Parameter) -> None:
    parameter.grad = None

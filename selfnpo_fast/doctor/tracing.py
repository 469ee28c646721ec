"""Memory and FLOPs of a network's forward and backward pass, found without the network's weights.

The real module runs on PyTorch's fake tensors: every operation computes the shapes of its results
and nothing else, so a network of any size is traced in seconds. A dispatch mode, `Operations`,
observes the operations: it counts what they compute, by torch's formulas, and follows which of
their results are alive.

One multiplication and one addition are two FLOPs. Convolutions, matrix products and attention are
counted; element-wise operations are not.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from selfnpo_fast.config import LoraConfig
from selfnpo_fast.models import Adapter, Size
from selfnpo_fast.models.experts import networks_of
from selfnpo_fast.models.quantised import plan_quantised, quantised_elements
from selfnpo_fast.training.lora import make_trainable
from selfnpo_fast.training.offload import offloadable

PERSISTENT_ELEMENTS = 100_000
"""DeepSpeed's stage3_param_persistence_threshold: smaller parameters stay whole on every rank."""
MIN_8BIT_ELEMENTS = 4096
"""bitsandbytes' min_8bit_size: the moments of smaller tensors stay float32."""

# torch counts only the attention kernels of GPUs. Fake tensors take the kernel of the CPU, which
# keeps equally little for the backward pass: the output and the logsumexp of the scores.
_FLOPS = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(
        lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


class Operations(TorchDispatchMode):
    """Follows the bytes of the tensor storages that operations allocate inside the context, and
    counts the operations' FLOPs.

    `now` is what lives at present, `peak` the most that has lived. An operation's internal scratch
    memory is not seen. The caller keeps `gradients` up to date; `peak_gradients` is its value at
    the peak. Storages of the tensors in `known`, such as weights, are not counted.
    """

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = self.gradients = self.peak_gradients = self.flops = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        flops = _FLOPS.get(getattr(func, "_overloadpacket", None))
        if flops is not None:
            self.flops += flops(*args, **kwargs, out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._track(leaf.untyped_storage())
        return out

    def _track(self, storage: torch.UntypedStorage) -> None:
        """Counts a storage at its first appearance, until it is freed."""
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        weakref.finalize(storage, self._untrack, key, size)
        self.now += size
        if self.now > self.peak:
            self.peak, self.peak_gradients = self.now, self.gradients

    def _untrack(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """A denoiser's parameters: counts of elements, and bytes in the dtypes of the tensors."""

    total: int
    """Elements of all parameters, quantised weights among them."""
    trained: int
    """Elements of the parameters that have gradients."""
    weight_bytes: int
    """Bytes of all parameters and buffers."""
    trained_bytes: int
    """Bytes of the parameters that have gradients."""
    largest_trained: int
    """Elements of the largest trained parameter."""
    persistent: int
    """Trained elements that ZeRO 3 leaves whole on every rank."""
    small: int
    """Trained elements in tensors whose 8-bit moments stay float32."""

    @classmethod
    def of(cls, module: nn.Module) -> ParameterCounts:
        """Counts the parameters of a module that trains at least one of them."""
        parameters = list(module.parameters())
        trained = [p for p in parameters if p.requires_grad]
        return cls(
            total=sum(p.numel() for p in parameters) + quantised_elements(module),
            trained=sum(p.numel() for p in trained),
            weight_bytes=sum(t.nbytes for t in (*parameters, *module.buffers())),
            trained_bytes=sum(p.nbytes for p in trained),
            largest_trained=max(p.numel() for p in trained),
            persistent=sum(p.numel() for p in trained if p.numel() < PERSISTENT_ELEMENTS),
            small=sum(p.numel() for p in trained if p.numel() < MIN_8BIT_ELEMENTS),
        )


@dataclass(frozen=True, kw_only=True)
class ForwardTrace:
    """A forward pass without gradients."""

    peak: int
    """Most bytes that live at once, in addition to the weights."""
    flops: float
    """FLOPs of a sample."""


@dataclass(frozen=True, kw_only=True)
class StudentTrace:
    """The student's passes over one micro-batch. Its weights are not in the bytes."""

    kept: int
    """Bytes of activations and inputs that live between the forward and the backward pass."""
    peak: int
    """Most bytes that live at once, gradients of the parameters included."""
    peak_gradients: int
    """Bytes of the parameters' gradients at the peak."""
    flops: float
    """FLOPs of a sample, recomputation included."""


class FakeDenoiser:
    """A denoiser whose weights have shapes and dtypes but no values.

    Raises UserError where the adapter does, and for LoRA targets that match no layer.
    """

    def __init__(
        self,
        adapter: Adapter,
        dtype: torch.dtype,
        lora: LoraConfig,
        *,
        checkpointing: bool = False,
        quantization: str = "none",
    ) -> None:
        self.adapter, self.dtype = adapter, dtype
        self._fake_mode = FakeTensorMode()
        with torch.device("meta"):
            self.module = adapter.new_denoiser(dtype)
            if quantization != "none":
                plan_quantised(self.module, quantization)
            make_trainable(self.module, adapter.trained_denoisers, lora, seed=0)
        # Fake tensors on the CPU dispatch to the CPU's kernels. Meta tensors do not: their
        # attention would keep the whole matrix of scores.
        with self._fake_mode:
            _replace_tensors(self.module, dtype)
        if checkpointing:
            for network in networks_of(self.module).values():
                adapter.family.checkpoint_gradients(network)
        self.parameter_counts = ParameterCounts.of(self.module)

    def trace_forward(self, batch: int, *, one_row: bool = False, size: Size | None = None) -> ForwardTrace:
        """Traces a forward pass without gradients of `batch` samples, of the adapter's size by default.

        With `one_row` all of them share one row of conditioning, as those with the empty prompt do.
        """
        self.module.eval()
        trace = self._operations()
        with self._fake_mode, torch.no_grad(), trace:
            self._predict(batch, one_row, size)
        return ForwardTrace(peak=trace.peak, flops=trace.flops / batch)

    def trace_student(self, batch: int, *, keep_gradients: bool = True, size: Size | None = None) -> StudentTrace:
        """Traces the forward and backward pass of a micro-batch of `batch` samples.

        Without `keep_gradients` every gradient is dropped as soon as it is complete.
        """
        self.module.train()
        trace = self._operations()
        on_gradient = _gradient_counter(trace) if keep_gradients else _drop_gradient
        handles = [
            p.register_post_accumulate_grad_hook(on_gradient) for p in self.module.parameters() if p.requires_grad
        ]
        with self._fake_mode, trace:
            out = self._predict(batch, size=size)
            kept = trace.now
            out.backward(torch.empty_like(out))
        for handle in handles:
            handle.remove()
        for parameter in self.module.parameters():
            parameter.grad = None
        # A second expert that is trained computes one sample (`experts.Experts.forward`).
        flops = trace.flops / (batch + len(self.adapter.trained_denoisers) - 1)
        return StudentTrace(kept=kept, peak=trace.peak, peak_gradients=trace.peak_gradients, flops=flops)

    @functools.cached_property
    def frozen_blocks(self) -> list[int]:
        """Bytes of the frozen weights of each block, which `engine.offload: blocks` moves."""
        blocks = offloadable(self.module, self.adapter.family.repeated_blocks)
        return [sum(parameter.nbytes for _, _, parameter in frozen) for frozen in blocks.values()]

    def _predict(self, batch: int, one_row: bool = False, size: Size | None = None) -> torch.Tensor:
        """The network's output for latents, timesteps and conditioning of the shapes of a run.

        With `one_row` the conditioning is one row, expanded to the batch without a copy.
        """
        shape = self.adapter.latent_shape if size is None else self.adapter.latent_shape_of(size)
        x = torch.empty(batch, *shape)
        t = torch.empty(batch, dtype=self.adapter.family.time_dtype)
        rows = {
            name: torch.empty(1 if one_row else batch, *shape, dtype=self.dtype).expand(batch, *shape)
            for name, shape in self.adapter.conditioning_shapes.items()
        }
        return self.adapter.predict(self.module, x, t, rows, size)

    def _operations(self) -> Operations:
        return Operations([*self.module.parameters(), *self.module.buffers()])


def _gradient_counter(trace: Operations) -> Callable[[nn.Parameter], None]:
    """A hook that adds the bytes of a parameter's gradient to `trace.gradients`."""

    def count(parameter: nn.Parameter) -> None:
        trace.gradients += parameter.grad.nbytes

    return count


def _drop_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None


def _replace_tensors(module: nn.Module, dtype: torch.dtype) -> None:
    """Replaces every parameter and buffer by a new, empty CPU tensor of its shape.

    Parameters take `dtype`, because PEFT casts its weights to it in real networks but not on the
    meta device. Buffers keep their dtypes.
    """
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=dtype)
            part.register_parameter(name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            part.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype))

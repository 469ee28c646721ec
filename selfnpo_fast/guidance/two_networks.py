"""A negative with full weights: the rows of a classifier-free batch are parted between two networks."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

from selfnpo_fast.runtime.errors import UserError

# Its leading dimension counts image prompts, and may happen to equal the number of rows.
_NOT_ROWS = frozenset({"ip_adapter_masks"})


def rows_of(args: tuple, kwargs: dict) -> int:
    """How many rows a call of the denoiser has: those of `sample`, its first argument."""
    return len(args[0] if args else kwargs["sample"])


def take_rows(value: Any, rows: slice, batch: int) -> Any:
    """`value` with every tensor of `batch` rows, at any depth of lists, tuples and dicts, cut to `rows`.

    0-d tensors, tensors of other lengths and all else are left alone. Lists and dicts are new: the UNet pops from them.
    """
    if isinstance(value, torch.Tensor):
        return value[rows] if value.ndim and len(value) == batch else value
    if isinstance(value, dict):
        return {key: part if key in _NOT_ROWS else take_rows(part, rows, batch) for key, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [take_rows(part, rows, batch) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    return value


def join_rows(first: Any, second: Any) -> Any:
    """A denoiser's outputs of two halves as its output of the whole: a tuple, or a UNet2DConditionOutput."""
    if isinstance(first, tuple):
        return tuple(torch.cat(pair) for pair in zip(first, second, strict=True))
    return type(first)(sample=torch.cat([first.sample, second.sample]))


class Follower(nn.Module):
    """A child of the denoiser that moves another network wherever the denoiser is moved.

    It has no parameters and registers nothing, so state dicts, parameter counts and `save_pretrained` do not see the
    negative, while `to`, `half` and accelerate's offload, which all come down to `_apply`, take it along.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._held = (network,)  # in a tuple: nn.Module registers a bare one

    def _apply(self, fn, recurse: bool = True) -> Follower:
        self._held[0]._apply(fn, recurse)
        return self


_CHILD = "negative_follower"


class TwoNetworks:
    """The denoiser computes the positive rows, `network` the negative ones; `remove` undoes what this adds."""

    def __init__(self, denoiser: nn.Module, network: nn.Module) -> None:
        """Raises UserError where the network cannot run beside the denoiser; then neither has changed."""
        if network is denoiser:
            raise UserError("negative: it is the pipeline's own denoiser; give a network of its own")
        first = next(denoiser.parameters())
        nn.Module.to(network.requires_grad_(False).eval(), first.device, first.dtype)  # without ModelMixin's warning
        self._denoiser, self._network = denoiser, network
        self._own_image_prompt: tuple | None = None
        self._pending = threading.local()
        denoiser.add_module(_CHILD, Follower(network))

    def __str__(self) -> str:
        size = sum(p.nbytes for p in self._network.parameters()) / 2**20
        return f"full weights, {size:.1f} MiB: a second network computes the negative rows"

    def reset(self) -> None:
        """Forget this thread's negative rows."""
        self._pending.call = None

    def begin(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The positive rows' arguments, from those of a call with both; the negative rows, the first half, are kept."""
        batch = rows_of(args, kwargs)
        first, second = slice(0, batch // 2), slice(batch // 2, batch)
        self._pending.call = take_rows(args, first, batch), take_rows(kwargs, first, batch)
        return take_rows(args, second, batch), take_rows(kwargs, second, batch)

    def end(self, output: Any) -> Any:
        """The denoiser's output for both, from that for the positive rows; None where `begin` was not called."""
        call = getattr(self._pending, "call", None)
        self.reset()
        if call is None:
            return None
        here, there = next(self._network.parameters()).device, output[0].device
        if here != there:
            raise UserError(
                f"negative: it is on {here}, the denoiser computes on {there}: offload layer by layer does not take "
                "it along; use enable_model_cpu_offload(), or a LoRA as the negative"
            )
        self._share_image_prompt()
        args, kwargs = call
        return join_rows(self._network(*args, **kwargs), output)

    def _share_image_prompt(self) -> None:
        """IP-Adapter: the negative uses the positive's image projections and the attention processors beside them."""
        from diffusers.models.embeddings import MultiIPAdapterImageProjection

        network, denoiser = self._network, self._denoiser
        shared = denoiser.encoder_hid_proj
        if not isinstance(shared, MultiIPAdapterImageProjection):
            self._restore_image_prompt()
        elif network.encoder_hid_proj is not shared:
            own = network.encoder_hid_proj, network.config.encoder_hid_dim_type, network.attn_processors
            self._own_image_prompt = self._own_image_prompt or own
            _set_image_prompt(network, shared, denoiser.config.encoder_hid_dim_type, denoiser.attn_processors)

    def _restore_image_prompt(self) -> None:
        if self._own_image_prompt is not None:
            _set_image_prompt(self._network, *self._own_image_prompt)
            self._own_image_prompt = None

    def remove(self) -> None:
        """Leave the denoiser and the network as they were found."""
        self._restore_image_prompt()
        delattr(self._denoiser, _CHILD)


def _set_image_prompt(network: nn.Module, projection: nn.Module | None, kind: str | None, processors: dict) -> None:
    network.encoder_hid_proj = projection
    network.config.encoder_hid_dim_type = kind
    network.set_attn_processor(dict(processors))  # it empties the dict

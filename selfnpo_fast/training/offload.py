"""The frozen blocks of a LoRA run in host memory, each on the device only while it computes.

diffusers' group offload moves every parameter of a group, trained ones too, and swaps the storage
under tensors that autograd has saved. Training needs neither: here only frozen weights move, the
parameters stay where they are, and a forward computes with copies of them, which autograd keeps for
as long as a backward pass needs them. Gradient checkpointing keeps that to one block.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from selfnpo_fast.runtime.compiling import block_kinds, repeated_blocks
from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.errors import UserError

Frozen = list[tuple[nn.Module, str, nn.Parameter]]
"""(the module that owns it, its name there, the parameter in host memory)."""


def offloadable(network: nn.Module, names: Iterable[str]) -> dict[nn.Module, Frozen]:
    """The frozen weights of each block of a network with low-rank layers.

    `names` are the blocks' classes, to which diffusers' own list is added. A block within another
    belongs to the outer one. The moving average of the trained weights is no weight of the base.
    """
    out: dict[nn.Module, Frozen] = {}
    inner: set[nn.Module] = set()
    for block in repeated_blocks(network, block_kinds(network, names)):
        if block not in inner:
            inner.update(block.modules())
            frozen = [
                (owner, name, parameter)
                for path, owner in block.named_modules()
                for name, parameter in owner.named_parameters(recurse=False)
                if not parameter.requires_grad and "lora_" not in path
            ]
            if frozen:
                out[block] = frozen
    return out


def offload_blocks(network: nn.Module, names: Iterable[str], device: torch.device) -> int:
    """Move the frozen weights of all blocks to host memory; returns their bytes.

    Raises UserError where the network has no such block.
    """
    blocks = offloadable(network, names)
    if not blocks:
        raise UserError(f"engine.offload: blocks finds no repeated block in {type(network).__name__}; use none")
    size = 0
    for block, frozen in blocks.items():
        for _, _, parameter in frozen:
            host = parameter.data.to("cpu")
            parameter.data = host.pin_memory() if device.type == "cuda" else host
            size += parameter.nbytes
        _compute_on(block, frozen, device)
    logger.info("engine.offload: %.2f GiB of %d blocks are in host memory", size / 2**30, len(blocks))
    return size


def _compute_on(block: nn.Module, frozen: Frozen, device: torch.device) -> None:
    """Let forwards of a block compute with copies of its frozen weights on the device."""

    def load(*_) -> None:
        for owner, name, parameter in frozen:
            # On the stream that computes, so that neither has to wait for the host.
            owner._parameters[name] = parameter.to(device, non_blocking=True, copy=True)

    def unload(*_) -> None:
        for owner, name, parameter in frozen:
            owner._parameters[name] = parameter

    block.register_forward_pre_hook(load)
    # Also where recomputation stops early, which torch does by an error.
    block.register_forward_hook(unload, always_call=True)

"""Low-rank training through PEFT, and networks that share a frozen backbone.

A reference that differs from the student only in its low-rank weights is a second module tree over the same backbone
tensors: no adapter is ever switched, which would be module state and break checkpointed backwards.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from selfnpo_fast.config import LoraConfig
from selfnpo_fast.errors import UserError


def add_lora(denoiser: nn.Module, config: LoraConfig, seed: int) -> None:
    """Freeze a diffusers denoiser and give its target layers a low-rank update that starts at zero (B = 0)."""
    from peft import LoraConfig as PeftConfig

    denoiser.requires_grad_(False)
    peft_config = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha if config.alpha is not None else config.rank,
        target_modules=config.targets,
        init_lora_weights="gaussian",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            denoiser.add_adapter(peft_config)
        except ValueError as error:
            raise UserError(f"lora.targets: {config.targets} match no layer of the model: {error}") from error


def share_frozen(module: nn.Module) -> nn.Module:
    """A copy of the module tree whose frozen parameters and buffers are the very same tensors, all without gradients.

    Trainable parameters are cloned; nothing else costs memory.
    """
    frozen = (p for p in module.parameters() if not p.requires_grad)
    return _copy_around(module, [*frozen, *module.buffers()]).requires_grad_(False).eval()


def share(module: nn.Module) -> nn.Module:
    """A copy of the module tree over the very same tensors, in evaluation mode: layers can be changed in it alone."""
    return _copy_around(module, [*module.parameters(), *module.buffers()]).eval()


def _copy_around(module: nn.Module, tensors: list[torch.Tensor]) -> nn.Module:
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})

"""A negative model on a stock diffusers pipeline: the rows of its negative branch go through the negative.

The pipeline keeps its denoiser, its forward and its components; two hooks on the denoiser do everything.
"""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from selfnpo_fast.guidance.lora_layers import LowRankBackbone, install
from selfnpo_fast.guidance.pipelines import calling_pipeline, guided_family
from selfnpo_fast.guidance.two_networks import Follower, TwoNetworks, rows_of
from selfnpo_fast.models import Family
from selfnpo_fast.negatives.load import Negative, load_negative
from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.errors import UserError

if TYPE_CHECKING:  # diffusers' models import bitsandbytes where it is installed
    from diffusers import DiffusionPipeline


class AttachedNegative:
    """What `attach_negative` returns; a context manager that detaches at its end.

    It owns the negative's placement: the negative moves with the denoiser, also under model offload. A denoiser that is
    called outside of a pipeline's call is the positive model alone, which is said once.
    """

    def __init__(self, called: nn.Module, branch: LowRankBackbone | TwoNetworks, family: Family) -> None:
        self._branch, self._family = branch, family
        self._warned = False
        self._hooks = [
            called.register_forward_pre_hook(self._before, with_kwargs=True),
            called.register_forward_hook(self._after, prepend=True, always_call=True),
        ]

    @property
    def attached(self) -> bool:
        """False once it is detached."""
        return bool(self._hooks)

    def detach(self) -> None:
        """Leave the pipeline as it was found. A second call does nothing.

        UserError, and still attached, where a LoRA's layers have been offloaded one by one meanwhile.
        """
        if not self._hooks:
            return
        self._branch.remove()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> AttachedNegative:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    @torch.compiler.disable
    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self._branch.reset()  # an interrupt may have ended the last call without its `_after`
        if not self._is_guided():
            return None
        rows = rows_of(args, kwargs, self._family)
        if rows % 2:
            raise UserError(f"negative: guidance is on, but the denoiser was given {rows} rows")
        return self._branch.begin(args, kwargs)

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if output is None:  # the forward has failed
            self._branch.reset()
            return None
        return self._branch.end(output)

    def _is_guided(self) -> bool:
        pipe = calling_pipeline()
        if pipe is not None:
            return guided_family(pipe).is_guided(pipe)
        if not self._warned:
            self._warned = True
            logger.warning("the denoiser is called outside of a pipeline's call: its negative is not used there")
        return False


def attach_negative(
    pipe: DiffusionPipeline,
    negative: str | PathLike | Negative,
    alpha: float = 1.0,
    beta: float = 1.0,
    *,
    base: str | PathLike | None = None,
) -> AttachedNegative:
    """Guide a diffusers pipeline away from a negative model instead of from its own unconditional prediction.

    The rows of the negative branch, under the negative prompt, go through the negative from here on; where a call has
    no guidance nothing changes and the negative costs nothing. `negative`, `alpha`, `beta` and `base` are as in
    `load_negative` (Eq. 7). Pipelines that share the denoiser (`from_pipe`) share the negative. UserError, and nothing
    attached, for a pipeline class that is not known, a negative that does not fit, or a denoiser that has one already.
    """
    family = guided_family(pipe)
    name = family.denoiser_name
    called = getattr(pipe, name)
    if called is None:
        raise UserError(f"pipe: it has no {name}; load it with its denoiser")
    denoiser = getattr(called, "_orig_mod", called)  # under torch.compile, which leaves hooks outside of its graph
    _check_denoiser(denoiser, family)
    loaded = load_negative(denoiser, negative, alpha=alpha, beta=beta, base=base)
    if loaded.deltas is not None:
        branch = install(denoiser, loaded.deltas)
    else:
        branch = TwoNetworks(denoiser, loaded.network, family)
    logger.info("negative %s (alpha %g, beta %g) on %s: %s", loaded.source, alpha, beta, type(pipe).__name__, branch)
    return AttachedNegative(called, branch, family)


def has_negative(denoiser: nn.Module) -> bool:
    """Whether a negative is attached to it."""
    return any(isinstance(module, Follower) or hasattr(module, "low_rank_down") for module in denoiser.modules())


def _check_denoiser(denoiser: nn.Module, family: Family) -> None:
    """UserError where the denoiser cannot take any negative."""
    name = family.denoiser_name
    if has_negative(denoiser):
        raise UserError(
            f"pipe: its {name} has a negative already, perhaps by a pipeline that shares it; detach it first"
        )
    reason = family.why_unguided(denoiser.config)
    if reason is not None:
        raise UserError(f"pipe: its {name} {reason}, so it has no negative branch")
    children = [module for module in denoiser.modules() if module is not denoiser]
    if any(hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook") for module in children):
        raise UserError(
            f"pipe: the layers of its {name} are offloaded or cast one by one; attach first, then turn that on"
        )

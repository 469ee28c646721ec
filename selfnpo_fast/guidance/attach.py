"""A negative model on a stock diffusers pipeline, which computes the negative branch's rows.

The pipeline keeps its denoiser, that denoiser's forward and its components. Two hooks on the
denoiser do all the work.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from selfnpo_fast.guidance.lora_backbone import LowRankBackbone, install
from selfnpo_fast.guidance.pipelines import calling_pipeline, guided_family
from selfnpo_fast.guidance.two_networks import Follower, TwoNetworks, rows_of
from selfnpo_fast.models import Family
from selfnpo_fast.negatives.load import Negative, load_negative
from selfnpo_fast.negatives.weights import config_of
from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.errors import UserError

if TYPE_CHECKING:  # diffusers' models import bitsandbytes where it is installed
    from diffusers import DiffusionPipeline


class AttachedNegative:
    """A negative on a denoiser, as `attach_negative` returns it; a context manager that detaches.

    The negative moves with the denoiser, also under model offload. A denoiser that is called
    outside of a pipeline's call computes the positive model only; the first such call is logged.
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
        """Whether the negative is still attached."""
        return bool(self._hooks)

    def detach(self) -> None:
        """Undo all changes to the pipeline. A second call does nothing.

        Raises UserError where a LoRA's layers were offloaded one by one after attaching; the
        negative stays attached then.
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
        """The hook before a forward: lets the branch prepare a guided call.

        Returns arguments that replace those of the call, or None to keep them.
        """
        self._branch.reset()  # an interrupt may have ended the last call before `_after`
        if not self._is_guided():
            return None
        rows = rows_of(args, kwargs, self._family)
        if rows % 2:
            raise UserError(f"negative: guidance is on, but the denoiser was given {rows} rows")
        return self._branch.begin(args, kwargs)

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """The hook after a forward, with output None where it has failed.

        Returns an output that replaces that of the call, or None to keep it.
        """
        if output is None:
            self._branch.reset()
            return None
        return self._branch.end(output)

    def _is_guided(self) -> bool:
        """Whether the calling pipeline guides, so that the rows are those of both branches."""
        pipe = calling_pipeline()
        if pipe is not None:
            return guided_family(pipe).is_guided(pipe)
        if not self._warned:
            self._warned = True
            logger.warning("the denoiser is called outside of a pipeline's call: its negative is not used there")
        return False


def attach_negative(
    pipe: DiffusionPipeline,
    negative: str | Path | nn.Module | Negative,
    alpha: float = 1.0,
    beta: float = 1.0,
    *,
    base: str | Path | None = None,
) -> AttachedNegative:
    """Guide a diffusers pipeline away from a negative model, not from its unconditional prediction.

    From now on the negative computes the rows of the negative branch, under the negative prompt. A
    call without guidance does not change, and the negative costs nothing there. Pipelines that
    share the denoiser (`from_pipe`) share the negative.

    `negative`, `alpha`, `beta` and `base` are those of `load_negative` (Eq. 7).

    Raises UserError where the pipeline's class is not known, the negative does not fit, or the
    denoiser has a negative already. Nothing is attached then.
    """
    # Find the denoiser. Hooks go on torch.compile's wrapper, which leaves them out of its graph.
    family = guided_family(pipe)
    name = family.denoiser_name
    called = getattr(pipe, name)
    if called is None:
        raise UserError(f"pipe: it has no {name}; load it with its denoiser")
    denoiser = getattr(called, "_orig_mod", called)
    _check_denoiser(denoiser, family)
    # Load the negative, and give the denoiser its updates or a second network.
    loaded = load_negative(denoiser, negative, alpha=alpha, beta=beta, base=base)
    branch: LowRankBackbone | TwoNetworks
    if loaded.network is not None:
        branch = TwoNetworks(denoiser, loaded.network, family)
    else:
        branch = install(denoiser, loaded.deltas or {})
    logger.info("negative %s (alpha %g, beta %g) on %s: %s", loaded.source, alpha, beta, type(pipe).__name__, branch)
    # Register the hooks.
    return AttachedNegative(called, branch, family)


def has_negative(denoiser: nn.Module) -> bool:
    """Whether a negative is attached to the denoiser."""
    return any(isinstance(module, Follower) or hasattr(module, "low_rank") for module in denoiser.modules())


def _check_denoiser(denoiser: nn.Module, family: Family) -> None:
    """Raise UserError where no negative can be attached to the denoiser."""
    name = family.denoiser_name
    if has_negative(denoiser):
        raise UserError(
            f"pipe: its {name} has a negative already, perhaps by a pipeline that shares it; detach it first"
        )
    reason = family.why_unguided(config_of(denoiser))
    if reason is not None:
        raise UserError(f"pipe: its {name} {reason}, so it has no negative branch")
    children = [module for module in denoiser.modules() if module is not denoiser]
    if any(hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook") for module in children):
        raise UserError(
            f"pipe: the layers of its {name} are offloaded or cast one by one; attach first, then turn that on"
        )

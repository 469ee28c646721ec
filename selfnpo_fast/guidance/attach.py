"""A negative model on a stock diffusers pipeline, which computes the negative branch.

The pipeline keeps its denoisers, their forwards and its components. Hooks on the denoisers do all
the work.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from selfnpo_fast.diffusion.schedule_facts import ScheduleFacts
from selfnpo_fast.guidance.attached import HANDLE, AttachedNegative, Part, unwrapped
from selfnpo_fast.guidance.lora_backbone import LowRankBackbone, install, is_offloaded
from selfnpo_fast.guidance.pipelines import guided_family, say_unread_release
from selfnpo_fast.guidance.two_networks import TwoNetworks
from selfnpo_fast.guidance.watch import CallWatch
from selfnpo_fast.models import Family, denoiser_names
from selfnpo_fast.negatives.experts import Source, bases_by_expert, by_expert
from selfnpo_fast.negatives.load import Negative, load_negative
from selfnpo_fast.negatives.weights import config_of
from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.errors import UserError

if TYPE_CHECKING:  # diffusers' models import bitsandbytes where it is installed
    from diffusers import DiffusionPipeline

_ATTACHING = threading.Lock()
"""Held while a denoiser gets its negative, so that it gets one only."""


def attach_negative(
    pipe: DiffusionPipeline,
    negative: Source | Mapping[str, Source],
    alpha: float = 1.0,
    beta: float = 1.0,
    *,
    base: str | Path | None = None,
) -> AttachedNegative:
    """Guide a diffusers pipeline away from a negative model, not from its unconditional prediction.

    From now on the negative computes the rows or calls of the negative branch, under the negative
    prompt. Calls that are under way in other threads finish without it. A call without guidance
    does not change, and the negative costs nothing there. Pipelines that share the denoiser
    (`from_pipe`) share the negative.

    `negative`, `alpha`, `beta` and `base` are those of `load_negative` (Eq. 7). For a pipeline of
    two denoisers `negative` is a mapping by the pipeline's attributes, or says itself which one it
    is for, as the output of a run does (`negatives.experts.by_expert`); a denoiser without one
    guides as in the stock pipeline.

    Raises UserError where the pipeline's class is not known, the negative does not fit, or a
    denoiser has a negative already. Nothing is attached then.
    """
    # Find the denoisers, perhaps in torch.compile's wrappers.
    family = guided_family(pipe)
    say_unread_release()
    present = _present(pipe, family)
    sources = by_expert(negative, present)
    bases: dict[str, Any] = {} if base is None else bases_by_expert(base, present, sources)
    called = {name: getattr(pipe, name) for name in sources}
    for name, each in called.items():
        _check_denoiser(unwrapped(each), name, family)
    # Load the negatives, give each denoiser its updates or a second network, and register the hooks.
    schedule = ScheduleFacts.of_scheduler(getattr(pipe, "scheduler", None), "the pipeline")
    loaded: dict[str, Negative] = {}
    try:
        for name, source in sources.items():
            loaded[name] = load_negative(
                unwrapped(called[name]), source, alpha=alpha, beta=beta, base=bases.get(name), schedule=schedule
            )
    except RuntimeError:  # of a dictionary that changes: another thread gives the denoiser a negative
        with _ATTACHING:
            for name, each in called.items():
                _check_denoiser(unwrapped(each), name, family)
        raise
    for each in loaded.values():
        _check_layers(each, family)
    with _ATTACHING:
        for name, each in called.items():  # loading takes its time, in which another may have come
            _check_denoiser(unwrapped(each), name, family)
        branches: dict[str, LowRankBackbone | TwoNetworks] = {}
        try:
            for name, model in loaded.items():
                branches[name] = _branch(unwrapped(called[name]), model, family)
        except BaseException:
            for branch in branches.values():
                branch.remove()
            raise
        parts = [Part(name, called[name], branch, family) for name, branch in branches.items()]
        handle = AttachedNegative(pipe, parts, family)
    for name, model in loaded.items():
        kind, of = type(pipe).__name__, f" ({name})" if len(present) > 1 else ""
        logger.info(
            "negative %s (alpha %g, beta %g) on %s%s: %s", model.source, alpha, beta, kind, of, branches[name]
        )  # fmt: skip
    return handle


def _branch(denoiser: nn.Module, model: Negative, family: Family) -> LowRankBackbone | TwoNetworks:
    """A second network next to the denoiser, or updates on its layers."""
    if model.network is not None:
        return TwoNetworks(denoiser, model.network, family)
    return install(denoiser, model.deltas or {})


def _present(pipe: DiffusionPipeline, family: Family) -> list[str]:
    """The pipeline's attributes that hold denoisers. Raises UserError where none does."""
    present = [name for name in family.denoiser_names if getattr(pipe, name, None) is not None]
    if not present:
        raise UserError(f"pipe: it has no {family.denoiser_name}; load it with its denoiser")
    return present


def _check_layers(model: Negative, family: Family) -> None:
    """Raise UserError where a LoRA changes a layer that has no rows of its own for each branch."""
    if not family.call_rule.shares_calls:
        return
    flat = [path for path in model.deltas or {} if path.startswith(family.flat_layers)]
    if flat:
        raise UserError(
            f"negative: the LoRA changes {flat[0]}, whose input has no rows of its own for each branch, so that its "
            "part could not be kept to the negative; give full weights, or a LoRA without that layer"
        )


def detach_negative(pipe: DiffusionPipeline) -> bool:
    """Detach the negative that is attached to a pipeline, by whichever handle or notebook cell.

    Also where the pipeline's denoiser was replaced since. Returns whether there was one. Raises
    UserError for what is no pipeline of diffusers.
    """
    from diffusers import DiffusionPipeline

    if not isinstance(pipe, DiffusionPipeline):
        raise UserError(f"pipe: a {type(pipe).__name__} is no diffusers pipeline; give the one with the negative")
    handles = [value.negative for value in vars(pipe).values() if isinstance(value, CallWatch)]
    for name in denoiser_names():
        denoiser = getattr(pipe, name, None)
        if isinstance(denoiser, nn.Module):
            handles += [vars(module)[HANDLE] for module in denoiser.modules() if HANDLE in vars(module)]
    attached = [handle for handle in handles if handle.attached]
    for handle in attached:
        handle.detach()
    return bool(attached)


def has_negative(denoiser: nn.Module) -> bool:
    """Whether a negative is attached to the denoiser, or a call under way still uses one."""
    for module in denoiser.modules():
        if HANDLE in vars(module):
            vars(module)[HANDLE].settle()
    return any(HANDLE in vars(module) for module in denoiser.modules())


def _check_denoiser(denoiser: nn.Module, name: str, family: Family) -> None:
    """Raise UserError where no negative can be attached to the denoiser, the pipeline's `name`."""
    if has_negative(denoiser):
        raise UserError(
            f"pipe: its {name} has a negative already, perhaps by a pipeline that shares it; call "
            "detach_negative(pipe) first, and let calls that are under way finish"
        )
    reason = family.why_unguided(config_of(denoiser))
    if reason is not None:
        raise UserError(f"pipe: its {name} {reason}, so it has no negative branch")
    children = [module for module in denoiser.modules() if module is not denoiser]
    if any(map(is_offloaded, children)):
        raise UserError(
            f"pipe: the layers of its {name} are offloaded or cast one by one; attach first, then turn that on (a "
            "cast cannot be undone: load the pipeline again)"
        )

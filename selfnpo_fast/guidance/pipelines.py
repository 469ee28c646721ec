"""Which diffusers pipelines a negative can be attached to, and which one is calling; the families
name the classes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

from selfnpo_fast.models import Family, guided_family_of
from selfnpo_fast.runtime.errors import UserError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


# Why a class is refused, by a part of its name; the first that fits is told.
_ONCE_PER_BRANCH = "it calls its denoiser once per branch, so there is no batch whose negative rows could be told apart"
_REASONS = (
    ("InstructPix2Pix", "it guides three ways, with two kinds of negative rows"),
    ("LatentConsistency", "it has no negative branch: its guidance scale is an input of the network"),
    ("PAG", "its batch holds rows of perturbed attention besides the negative ones"),
    ("SAG", "it calls its denoiser a second time in each step for self-attention guidance"),
    ("LEdits", "it guides by a list of edits"),
    *((name, _ONCE_PER_BRANCH) for name in ("Flux", "Wan", "QwenImage", "HunyuanVideo")),
    ("StableDiffusion3", "its denoiser is a transformer, which it calls again to skip layers"),
)
_SUPPORTED = (
    "supported are the stock StableDiffusion and StableDiffusionXL pipelines, their Img2Img, Inpaint, ControlNet and "
    "Adapter kin"
)


def guided_family(pipe: object) -> Family:
    """The family that guides pipelines of this class; UserError with the reason where there is
    none.

    A subclass of a listed class is not listed: it may order its rows in another way.
    """
    name = type(pipe).__name__
    family = guided_family_of(name)
    if family is not None and type(pipe) is family.load_class(name):
        return family
    listed = next((base.__name__ for base in type(pipe).__mro__[1:] if guided_family_of(base.__name__)), None)
    reason = next((reason for part, reason in _REASONS if part in name), None)
    if reason is None and listed is not None:
        reason = f"it is a class of its own, made from {listed}, and may order its rows in another way"
    raise UserError(f"pipe: {name} is not supported: {reason or 'its rows are not known here'}; {_SUPPORTED}")


@dataclass(frozen=True)
class PipelineCall:
    """A call of a pipeline that is under way in some thread."""

    frame: FrameType
    """The call itself: each call has a frame of its own."""
    pipe: DiffusionPipeline


def calling_pipeline() -> DiffusionPipeline | None:
    """The pipeline in whose call this thread is, read off the stack; None where there is none.

    Pipelines share denoisers (`from_pipe`, `components`), and each keeps its last call's guidance
    scale: only the one that is being called can say whether these rows are guided.
    """
    call = this_call()
    return None if call is None else call.pipe


def this_call() -> PipelineCall | None:
    """The innermost call of a pipeline that this thread is in, or None."""
    return next(_calls(sys._getframe(1)), None)


@dataclass(frozen=True)
class Stack:
    """What a thread is doing."""

    calls: list[PipelineCall]
    """The calls of pipelines that the thread is in."""
    modules: list[object]
    """The modules in whose forward the thread is."""


def stacks() -> dict[int, Stack]:
    """What every thread is doing at this moment, by the thread's identifier."""
    return {thread: _stack(top) for thread, top in sys._current_frames().items()}


def this_stack() -> Stack:
    """What this thread is doing."""
    return _stack(sys._getframe(1))


def _stack(top: FrameType) -> Stack:
    # Module.__call__ is _wrapped_call_impl.
    modules = [frame.f_locals.get("self") for frame in _outward(top) if frame.f_code.co_name == "_wrapped_call_impl"]
    return Stack(list(_calls(top)), modules)


def _calls(top: FrameType) -> Iterator[PipelineCall]:
    """The pipelines' calls on a stack, the innermost first."""
    from diffusers import DiffusionPipeline

    for frame in _outward(top):
        if frame.f_code.co_name == "__call__" and isinstance(caller := frame.f_locals.get("self"), DiffusionPipeline):
            yield PipelineCall(frame, caller)


def _outward(top: FrameType) -> Iterator[FrameType]:
    """The frames of a stack, the innermost first."""
    frame: FrameType | None = top
    while frame is not None:
        yield frame
        frame = frame.f_back

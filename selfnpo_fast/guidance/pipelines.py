"""Which diffusers pipelines a negative can be attached to, and which one is calling; the families
name the classes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from selfnpo_fast.models import Family, guided_family_of
from selfnpo_fast.models.call_rules import READ_RELEASES
from selfnpo_fast.models.refused import why_unlisted
from selfnpo_fast.runtime.console import say_once
from selfnpo_fast.runtime.errors import UserError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


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
    reason = why_unlisted(name)
    if reason is None and listed is not None:
        reason = f"it is a class of its own, made from {listed}, and may order its rows in another way"
    raise UserError(
        f"pipe: {name} is not supported: {reason or 'its rows are not known here'}; docs/inference.md lists the "
        "classes that take a negative"
    )


def say_unread_release() -> None:
    """Say once where the pipelines of the installed diffusers were not read."""
    import diffusers

    if diffusers.__version__ not in READ_RELEASES:
        say_once(
            f"diffusers {diffusers.__version__}: its pipelines were read in {', '.join(READ_RELEASES)}, and this "
            "release may guide in another way; where in doubt, install that one"
        )


@dataclass(frozen=True)
class PipelineCall:
    """A call of a pipeline that is under way in some thread."""

    frame: FrameType
    """The call itself: each call has a frame of its own."""
    pipe: DiffusionPipeline

    @property
    def locals(self) -> Mapping[str, Any]:
        """The locals of the call as they are now."""
        return self.frame.f_locals


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

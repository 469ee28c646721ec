"""A negative on a pipeline's denoisers: hooks that give it its rows or calls, and what looks after
them."""

from __future__ import annotations

import inspect
import threading
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import nn

from selfnpo_fast.guidance.cache_context import ContextReader
from selfnpo_fast.guidance.lora_backbone import LowRankBackbone
from selfnpo_fast.guidance.lora_layers import NO_COPY
from selfnpo_fast.guidance.pipelines import PipelineCall, guided_family, stacks, this_call, this_stack
from selfnpo_fast.guidance.two_networks import TwoNetworks
from selfnpo_fast.guidance.watch import CallWatch, Substitute, contains
from selfnpo_fast.models import Family
from selfnpo_fast.models.batch_rows import rows_of
from selfnpo_fast.models.call_rules import Branch, DenoiserCall, TwoCalls
from selfnpo_fast.runtime.console import logger, say_once
from selfnpo_fast.runtime.errors import UserError

if TYPE_CHECKING:  # diffusers' models import bitsandbytes where it is installed
    from diffusers import DiffusionPipeline


class Part:
    """One denoiser of a pipeline, and the branch that a negative computes for it."""

    def __init__(self, name: str, called: nn.Module, branch: LowRankBackbone | TwoNetworks, family: Family) -> None:
        """`called` is what the pipeline has for its denoiser, perhaps torch.compile's wrapper."""
        self.name, self.called, self.branch = name, called, branch
        self.denoiser = unwrapped(called)
        self.names = list(inspect.signature(type(self.denoiser).forward).parameters)[1:]
        self._hooks: list[Any] = []
        two_calls = isinstance(family.call_rule, TwoCalls)
        self.takes_calls = two_calls and isinstance(branch, TwoNetworks)
        """Whether the negative takes whole calls in the denoiser's place."""
        with_context = two_calls and hasattr(self.denoiser, "cache_context")
        self._context = ContextReader(self.denoiser) if with_context else None

    @property
    def context(self) -> str | None:
        """The name of the `cache_context` that the denoiser is called in."""
        return None if self._context is None else self._context.name

    def install(self, handle: AttachedNegative) -> None:
        """Register the hooks of `handle` on the denoiser.

        Those on torch.compile's wrapper stay out of its graph. Pipelines that share the denoiser
        may call it without the wrapper.
        """
        called, denoiser = self.called, self.denoiser
        vars(denoiser)[HANDLE] = handle
        before, after = partial(handle.before, self), partial(handle.after, self)
        self._hooks = [
            called.register_forward_pre_hook(before, with_kwargs=True),
            called.register_forward_hook(after, prepend=True, always_call=True),
        ]
        if denoiser is not called:
            before, after = partial(handle.before_unwrapped, self), partial(handle.after_unwrapped, self)
            self._hooks += [
                denoiser.register_forward_pre_hook(before, with_kwargs=True),
                denoiser.register_forward_hook(after, prepend=True, always_call=True),
            ]
        if self.takes_calls:
            # Hooks alone would let the denoiser compute what the negative computes again. torch
            # calls this method for a module's call, around its hooks and a forward of any offload.
            vars(called)[_CALL] = partial(handle.call, self)

    def remove(self) -> None:
        """Leave the denoiser as it was."""
        vars(self.called).pop(_CALL, None)
        self.branch.remove()
        for hook in self._hooks:
            hook.remove()
        if self._context is not None:
            self._context.remove()
        del vars(self.denoiser)[HANDLE]


class AttachedNegative:
    """A negative on a pipeline's denoisers, as `attach_negative` returns it; a context manager that
    detaches.

    The negative moves with the denoisers, also under model offload. A denoiser that is called
    outside of a pipeline's call computes the positive model only; the first such call is logged.
    """

    def __init__(self, pipe: DiffusionPipeline, parts: list[Part], family: Family) -> None:
        """`parts` are the denoisers that get a negative."""
        self._parts, self._family = parts, family
        self._lock = threading.RLock()
        self._attached, self._warned = True, False
        # Pipelines' calls that were under way in other threads: when the negative came, which finish
        # without it, and when it was detached, which finish with it.
        self._earlier = [call for call in _calls_elsewhere() if self._may_use(call.pipe)]
        self._finishing: list[PipelineCall] = []
        self._ends: list[CallWatch] = []  # on the pipelines of the calls that finish with it
        self._local = threading.local()  # whether a substitute's forward has reached the denoiser
        # Pipelines and modules that are looked after; not kept alive.
        self._watches: WeakKeyDictionary[DiffusionPipeline, CallWatch | None] = WeakKeyDictionary()
        self._substitutes: WeakKeyDictionary[nn.Module, Substitute] = WeakKeyDictionary()
        self._installed = True
        for part in parts:
            part.install(self)
        self._watch(pipe)

    @property
    def attached(self) -> bool:
        """Whether the negative is still attached."""
        return self._attached

    def detach(self) -> None:
        """Undo all changes to the pipeline. A second call does nothing.

        Calls of pipelines that are under way in other threads finish with the negative, and the
        last of them undoes the changes; where it fails, the denoiser's next use does. A call of
        this thread, as from a callback, goes on without the negative.
        """
        with self._lock:
            if self._attached:
                self._attached = False
                elsewhere = [call for call in _calls_elsewhere() if call.pipe in self._watches]
                self._finishing = [call for call in elsewhere if not _among(call, self._earlier)]
                self._ends = [CallWatch(c.pipe, LAST_METHOD, self, self._end_call) for c in self._finishing]
            self.settle()

    def settle(self, *, inside: bool = False) -> None:
        """Remove what is left of a detached negative that no call uses any more.

        `inside` is for the hooks, which are called in a forward of their own thread.
        """
        with self._lock:
            if self._attached or not self._installed:
                return
            # A forward of another thread that begins now waits for this lock in `_before`.
            now = stacks()
            running = [call for stack in now.values() for call in stack.calls]
            self._finishing = [call for call in self._finishing if _among(call, running)]
            own = threading.get_ident() if inside else None
            modules = [module for thread, stack in now.items() if thread != own for module in stack.modules]
            own_modules = [module for part in self._parts for module in (part.called, part.denoiser)]
            if self._finishing or any(module is own for module in modules for own in own_modules):
                return
            self._installed = False
            for part in self._parts:
                part.remove()
            for watch in (*self._watches.values(), *self._substitutes.values(), *self._ends):
                if watch is not None:
                    watch.remove()

    def __enter__(self) -> AttachedNegative:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Called by copy and pickle, also of the pipeline. Raises UserError."""
        raise UserError(NO_COPY)

    # What the hooks of a part call.

    @torch.compiler.disable
    def before(self, part: Part, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """The hook before a forward: lets the negative prepare for a call with negative rows.

        Returns arguments that replace those of the call, or None to keep them.
        """
        self._local.reached = True
        part.branch.reset()  # an interrupt may have ended the last call before `after`
        branch = self._branch_of(part, args, kwargs)
        if not branch.has_negative:
            return None
        if branch.is_half:
            rows = rows_of(args, kwargs, self._family)
            if rows % 2:
                raise UserError(f"negative: guidance is on, but the denoiser was given {rows} rows")
        return part.branch.begin(args, kwargs, branch)

    @torch.compiler.disable
    def after(self, part: Part, module: nn.Module, args: tuple, output: Any) -> Any:
        """The hook after a forward, with output None where it has failed.

        Returns an output that replaces that of the call, or None to keep it.
        """
        if output is None:
            part.branch.reset()
            return None
        result = part.branch.end(output)
        self.settle(inside=True)
        return result

    def before_unwrapped(self, part: Part, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """`before`, for a forward of the denoiser that is not inside of its wrapper's."""
        if torch.compiler.is_compiling() or part.called in this_stack().modules:
            return None
        return self.before(part, module, args, kwargs)

    def after_unwrapped(self, part: Part, module: nn.Module, args: tuple, output: Any) -> Any:
        """`after`, for that forward."""
        if torch.compiler.is_compiling() or part.called in this_stack().modules:
            return None
        return self.after(part, module, args, output)

    def call(self, part: Part, *args: Any, **kwargs: Any) -> Any:
        """A call of the denoiser, which a second network takes over where all rows are negative."""
        if self._branch_of(part, args, kwargs) is not Branch.NEGATIVE:
            return getattr(type(part.called), _CALL)(part.called, *args, **kwargs)
        self._local.reached = True
        assert isinstance(part.branch, TwoNetworks)
        result = part.branch.compute(args, kwargs)
        self.settle(inside=True)
        return result

    def _branch_of(self, part: Part, args: tuple, kwargs: dict) -> Branch:
        """Which rows of a forward that begins are negative, by the pipeline that is calling; none
        where the negative is not attached."""
        call = this_call()
        with self._lock:
            if self._earlier:
                running = [each for stack in stacks().values() for each in stack.calls]
                self._earlier = [each for each in self._earlier if _among(each, running)]
                if call is not None and _among(call, self._earlier):
                    return Branch.UNGUIDED
            if not self._attached:
                self.settle(inside=True)
                if call is None or not _among(call, self._finishing):
                    return Branch.UNGUIDED
        if call is None:
            if not self._warned:
                self._warned = True
                logger.warning("the denoiser is called outside of a pipeline's call: its negative is not used there")
            return Branch.UNGUIDED
        self._watch(call.pipe)
        rule, local = guided_family(call.pipe).call_rule, call.locals
        arguments = dict(zip(part.names, args, strict=False)) | kwargs
        branch = rule.branch(DenoiserCall(call.pipe, local, arguments, lambda: part.context))
        if branch is Branch.UNGUIDED and (why := rule.why_off(local)) is not None:
            say_once(f"negative: {why}")
        return branch

    # The pipelines that use the denoisers.

    def _may_use(self, pipe: DiffusionPipeline) -> bool:
        """Whether the pipeline has one of the denoisers, or a module of another kind, which may
        call it."""
        used = [getattr(pipe, part.name, None) for part in self._parts]
        return any(self._holds(each) or type(each).__name__ != self._family.denoiser_class for each in used)

    def _holds(self, used: object) -> bool:
        """Whether the module is one of the denoisers, or a wrapper that holds one as a child."""
        return any(contains(used, part.denoiser) for part in self._parts)

    def _watch(self, pipe: DiffusionPipeline) -> None:
        """Look after a pipeline that uses a denoiser."""
        name = self._family.first_method
        watch = self._watches.get(pipe)
        if self._attached and (watch is None or not watch.is_on(pipe)):
            self._watches[pipe] = CallWatch(pipe, name, self, self._begin_call) if hasattr(pipe, name) else None

    def _begin_call(self, pipe: DiffusionPipeline) -> None:
        """Called at the start of a call of a pipeline that is looked after.

        Raises UserError where the negative would be lost in it.
        """
        if not self._attached:
            self.settle()
            return
        for part in self._parts:
            if not hasattr(pipe, part.name):  # another class, with which one of the denoisers is shared
                continue
            used = getattr(pipe, part.name)
            if not isinstance(used, nn.Module):
                raise UserError(_replaced(part, used))
            if not self._holds(used) and used not in self._substitutes:
                check = partial(self._check_substitute, part)
                self._substitutes[used] = Substitute(used, self._begin_substitute, check)
            part.branch.check()

    def _end_call(self, pipe: DiffusionPipeline) -> None:
        """Called at the end of a call that may have finished with a negative that was detached."""
        call = this_call()
        with self._lock:
            self._finishing = [other for other in self._finishing if call is None or not _among(call, [other])]
            self.settle(inside=True)

    def _begin_substitute(self) -> None:
        """Called before a forward of a module in the denoiser's place."""
        self._local.reached = False

    def _check_substitute(self, part: Part) -> None:
        """Called after that forward: raise UserError where it was guided and the denoiser was not
        called in it."""
        call = this_call()
        if self._attached and call is not None and not self._local.reached:
            if guided_family(call.pipe).call_rule.is_guided(call.pipe, call.locals):
                raise UserError(_replaced(part, getattr(call.pipe, part.name)))


def _replaced(part: Part, used: object) -> str:
    return (
        f"pipe: its {part.name} was replaced, by a {type(used).__name__}, after the negative was attached, so the "
        "negative would be lost; call detach_negative(pipe), and attach it again"
    )


def unwrapped(called: nn.Module) -> nn.Module:
    """The denoiser in torch.compile's wrapper, or itself where there is none."""
    return getattr(called, "_orig_mod", called)


def _calls_elsewhere() -> list[PipelineCall]:
    """The calls of pipelines that are under way in other threads."""
    own = threading.get_ident()
    return [call for thread, stack in stacks().items() if thread != own for call in stack.calls]


def _among(call: PipelineCall, calls: list[PipelineCall]) -> bool:
    """Whether a call is one of these: each has a frame of its own."""
    return any(call.frame is other.frame for other in calls)


LAST_METHOD = "maybe_free_model_hooks"
"""The method of diffusers' pipelines that their calls end with."""
_CALL = "_call_impl"
"""The method by which torch calls a module's hooks and its forward."""
HANDLE = "_selfnpo_negative"
"""The denoiser's attribute that holds the negative attached to it."""

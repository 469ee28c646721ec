"""A negative model on a stock diffusers pipeline, which computes the negative branch's rows.

The pipeline keeps its denoiser, that denoiser's forward and its components. Two hooks on the
denoiser do all the work.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import nn

from selfnpo_fast.diffusion.schedule_facts import ScheduleFacts
from selfnpo_fast.guidance.lora_backbone import LowRankBackbone, install, is_offloaded
from selfnpo_fast.guidance.lora_layers import NO_COPY
from selfnpo_fast.guidance.pipelines import PipelineCall, calling_pipeline, guided_family, stacks, this_call, this_stack
from selfnpo_fast.guidance.two_networks import TwoNetworks, rows_of
from selfnpo_fast.guidance.watch import CallWatch, Substitute, contains
from selfnpo_fast.models import Family, denoiser_names
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

    def __init__(
        self, pipe: DiffusionPipeline, called: nn.Module, branch: LowRankBackbone | TwoNetworks, family: Family
    ) -> None:
        """`called` is what the pipeline has for its denoiser, perhaps torch.compile's wrapper."""
        self._called, self._denoiser = called, denoiser = called, _unwrapped(called)
        self._branch, self._family = branch, family
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
        vars(denoiser)[_HANDLE] = self
        # Hooks on torch.compile's wrapper stay out of its graph. Pipelines that share the denoiser
        # may call it without the wrapper.
        self._hooks = [
            self._called.register_forward_pre_hook(self._before, with_kwargs=True),
            self._called.register_forward_hook(self._after, prepend=True, always_call=True),
        ]
        if denoiser is not self._called:
            self._hooks += [
                denoiser.register_forward_pre_hook(self._before_unwrapped, with_kwargs=True),
                denoiser.register_forward_hook(self._after_unwrapped, prepend=True, always_call=True),
            ]
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
            if self._attached or not self._hooks:
                return
            # A forward of another thread that begins now waits for this lock in `_before`.
            now = stacks()
            running = [call for stack in now.values() for call in stack.calls]
            self._finishing = [call for call in self._finishing if _among(call, running)]
            own = threading.get_ident() if inside else None
            modules = [module for thread, stack in now.items() if thread != own for module in stack.modules]
            if self._finishing or any(module in (self._called, self._denoiser) for module in modules):
                return
            self._branch.remove()
            for hook in self._hooks:
                hook.remove()
            for watch in (*self._watches.values(), *self._substitutes.values(), *self._ends):
                if watch is not None:
                    watch.remove()
            self._hooks = []
            del vars(self._denoiser)[_HANDLE]

    def __enter__(self) -> AttachedNegative:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Called by copy and pickle, also of the pipeline. Raises UserError."""
        raise UserError(NO_COPY)

    @torch.compiler.disable
    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """The hook before a forward: lets the branch prepare a guided call.

        Returns arguments that replace those of the call, or None to keep them.
        """
        self._local.reached = True
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
        result = self._branch.end(output)
        self.settle(inside=True)
        return result

    def _before_unwrapped(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """`_before`, for a forward of the denoiser that is not inside of its wrapper's."""
        if torch.compiler.is_compiling() or self._called in this_stack().modules:
            return None
        return self._before(module, args, kwargs)

    def _after_unwrapped(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """`_after`, for that forward."""
        if torch.compiler.is_compiling() or self._called in this_stack().modules:
            return None
        return self._after(module, args, output)

    def _is_guided(self) -> bool:
        """Whether the negative takes part in a forward that begins: whether the calling pipeline
        guides, so that the rows are those of both branches, and the negative is attached."""
        call = this_call()
        with self._lock:
            if self._earlier:
                running = [each for stack in stacks().values() for each in stack.calls]
                self._earlier = [each for each in self._earlier if _among(each, running)]
                if call is not None and _among(call, self._earlier):
                    return False
            if not self._attached:
                self.settle(inside=True)
                if call is None or not _among(call, self._finishing):
                    return False
        if call is not None:
            self._watch(call.pipe)
            return guided_family(call.pipe).is_guided(call.pipe)
        if not self._warned:
            self._warned = True
            logger.warning("the denoiser is called outside of a pipeline's call: its negative is not used there")
        return False

    def _may_use(self, pipe: DiffusionPipeline) -> bool:
        """Whether the pipeline has the denoiser, or a module of another kind, which may call it."""
        used = getattr(pipe, self._family.denoiser_name, None)
        return contains(used, self._denoiser) or type(used).__name__ != self._family.denoiser_class

    def _watch(self, pipe: DiffusionPipeline) -> None:
        """Look after a pipeline that uses the denoiser."""
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
        used = getattr(pipe, self._family.denoiser_name)
        if not isinstance(used, nn.Module):
            raise UserError(self._replaced(used))
        if not contains(used, self._denoiser) and used not in self._substitutes:
            self._substitutes[used] = Substitute(used, self._begin_substitute, self._check_substitute)
        self._branch.check()

    def _end_call(self, pipe: DiffusionPipeline) -> None:
        """Called at the end of a call that may have finished with a negative that was detached."""
        call = this_call()
        with self._lock:
            self._finishing = [other for other in self._finishing if call is None or not _among(call, [other])]
            self.settle(inside=True)

    def _begin_substitute(self) -> None:
        """Called before a forward of a module in the denoiser's place."""
        self._local.reached = False

    def _check_substitute(self) -> None:
        """Called after that forward: raise UserError where it was guided and the denoiser was not
        called in it."""
        pipe = calling_pipeline()
        if self._attached and pipe is not None and not self._local.reached:
            if guided_family(pipe).is_guided(pipe):
                raise UserError(self._replaced(getattr(pipe, self._family.denoiser_name)))

    def _replaced(self, used: object) -> str:
        name = self._family.denoiser_name
        return (
            f"pipe: its {name} was replaced, by a {type(used).__name__}, after the negative was attached, so the "
            "negative would be lost; call detach_negative(pipe), and attach it again"
        )


def _calls_elsewhere() -> list[PipelineCall]:
    """The calls of pipelines that are under way in other threads."""
    own = threading.get_ident()
    return [call for thread, stack in stacks().items() if thread != own for call in stack.calls]


def _among(call: PipelineCall, calls: list[PipelineCall]) -> bool:
    """Whether a call is one of these: each has a frame of its own."""
    return any(call.frame is other.frame for other in calls)


LAST_METHOD = "maybe_free_model_hooks"
"""The method of diffusers' pipelines that their calls end with."""
_ATTACHING = threading.Lock()
"""Held while a denoiser gets its negative, so that it gets one only."""
_HANDLE = "_selfnpo_negative"
"""The denoiser's attribute that holds the negative attached to it."""


def attach_negative(
    pipe: DiffusionPipeline,
    negative: str | Path | nn.Module | Negative,
    alpha: float = 1.0,
    beta: float = 1.0,
    *,
    base: str | Path | None = None,
) -> AttachedNegative:
    """Guide a diffusers pipeline away from a negative model, not from its unconditional prediction.

    From now on the negative computes the rows of the negative branch, under the negative prompt.
    Calls that are under way in other threads finish without it. A call without guidance does not
    change, and the negative costs nothing there. Pipelines that share the denoiser (`from_pipe`)
    share the negative.

    `negative`, `alpha`, `beta` and `base` are those of `load_negative` (Eq. 7).

    Raises UserError where the pipeline's class is not known, the negative does not fit, or the
    denoiser has a negative already. Nothing is attached then.
    """
    # Find the denoiser, perhaps in torch.compile's wrapper.
    family = guided_family(pipe)
    name = family.denoiser_name
    called = getattr(pipe, name)
    if called is None:
        raise UserError(f"pipe: it has no {name}; load it with its denoiser")
    denoiser = _unwrapped(called)
    _check_denoiser(denoiser, family)
    # Load the negative, give the denoiser its updates or a second network, and register the hooks.
    schedule = ScheduleFacts.of_scheduler(getattr(pipe, "scheduler", None), "the pipeline")
    loaded = load_negative(denoiser, negative, alpha=alpha, beta=beta, base=base, schedule=schedule)
    branch: LowRankBackbone | TwoNetworks
    with _ATTACHING:
        _check_denoiser(denoiser, family)  # loading takes its time, in which another may have come
        if loaded.network is not None:
            branch = TwoNetworks(denoiser, loaded.network, family)
        else:
            branch = install(denoiser, loaded.deltas or {})
        handle = AttachedNegative(pipe, called, branch, family)
    logger.info("negative %s (alpha %g, beta %g) on %s: %s", loaded.source, alpha, beta, type(pipe).__name__, branch)
    return handle


def _unwrapped(called: nn.Module) -> nn.Module:
    """The denoiser in torch.compile's wrapper, or itself where there is none."""
    return getattr(called, "_orig_mod", called)


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
            handles += [vars(module)[_HANDLE] for module in denoiser.modules() if _HANDLE in vars(module)]
    attached = [handle for handle in handles if handle.attached]
    for handle in attached:
        handle.detach()
    return bool(attached)


def has_negative(denoiser: nn.Module) -> bool:
    """Whether a negative is attached to the denoiser, or a call under way still uses one."""
    for module in denoiser.modules():
        if _HANDLE in vars(module):
            vars(module)[_HANDLE].settle()
    return any(_HANDLE in vars(module) for module in denoiser.modules())


def _check_denoiser(denoiser: nn.Module, family: Family) -> None:
    """Raise UserError where no negative can be attached to the denoiser."""
    name = family.denoiser_name
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

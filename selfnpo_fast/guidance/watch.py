"""What tells an attached negative that a pipeline is called, and that its denoiser was replaced."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn

from selfnpo_fast.guidance.lora_layers import NO_COPY
from selfnpo_fast.guidance.pipelines import calling_pipeline
from selfnpo_fast.runtime.errors import UserError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from selfnpo_fast.guidance.attached import AttachedNegative


class CallWatch:
    """Tells the negative that is attached to a pipeline of the start or the end of each call.

    It stands on the pipeline in place of a method that all its calls begin or end with
    (`Family.first_method`), as an attribute of that one object, and calls the method itself then. A
    hook on the denoiser would not be called any more once the denoiser was replaced.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        name: str,
        negative: AttachedNegative,
        tell: Callable[[DiffusionPipeline], None],
    ) -> None:
        self.negative = negative
        self._name, self._tell, self._pipe = name, tell, weakref.ref(pipe)
        before = vars(pipe).get(name)  # somebody else's, on this pipeline alone
        self._before: Callable[..., Any] | None = before._before if isinstance(before, CallWatch) else before
        setattr(pipe, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The method's own result."""
        pipe = calling_pipeline() or self._pipe()
        assert pipe is not None
        self._tell(pipe)
        if self._before is not None:
            return self._before(*args, **kwargs)
        return getattr(type(pipe), self._name)(pipe, *args, **kwargs)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Called by copy and pickle. Raises UserError."""
        raise UserError(NO_COPY)

    def is_on(self, pipe: DiffusionPipeline) -> bool:
        """Whether it still stands on the pipeline."""
        return vars(pipe).get(self._name) is self

    def remove(self) -> None:
        """Leave the pipeline as it was."""
        pipe = self._pipe()
        if pipe is not None and self.is_on(pipe):
            delattr(pipe, self._name)
            if self._before is not None:
                setattr(pipe, self._name, self._before)


def contains(module: object, denoiser: nn.Module) -> bool:
    """Whether the module is the denoiser, or a wrapper that holds it as a child."""
    return isinstance(module, nn.Module) and any(part is denoiser for part in module.modules())


class Substitute:
    """Hooks on a module that stands in the denoiser's place and does not hold it as a child.

    It may be a wrapper that calls the denoiser all the same. `check` is called after each forward.
    """

    def __init__(self, module: nn.Module, begin: Callable[[], None], check: Callable[[], None]) -> None:
        self._hooks = [
            module.register_forward_pre_hook(lambda module, args: begin()),
            module.register_forward_hook(lambda module, args, output: check()),
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

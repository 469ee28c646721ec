"""The name of the `cache_context` in which a pipeline calls its denoiser.

diffusers tells it to stateful hooks of the denoiser's modules and to nobody else, so that a child
without a function has one.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_CHILD = "negative_context"
"""The name of the denoiser's child."""


class ContextReader:
    """Reads the context of a denoiser that has contexts; it adds a child to the denoiser."""

    def __init__(self, denoiser: nn.Module) -> None:
        from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager

        class Reader(ModelHook):
            """Remembers the context that it is told."""

            _is_stateful = True

            def __init__(self) -> None:
                super().__init__()
                self.manager = StateManager(BaseState)  # type: ignore[arg-type]

            def reset_state(self, module: nn.Module) -> None:
                """The end of a pipeline's call: no context."""
                self.manager.reset()

        self._denoiser, self._hook = denoiser, Reader()
        child = nn.Module()
        HookRegistry.check_if_exists_or_initialize(child).register_hook(self._hook, _CHILD)
        denoiser.add_module(_CHILD, child)
        self._forget()

    @property
    def name(self) -> str | None:
        """The name of the context that the denoiser is called in; None without one."""
        return getattr(self._hook.manager._context, "name", None)

    def remove(self) -> None:
        """Remove the child."""
        delattr(self._denoiser, _CHILD)
        self._forget()

    def _forget(self) -> None:
        """Let the denoiser's registry, where it has one, look for its children's again."""
        registry: Any = getattr(self._denoiser, "_diffusers_hook", None)
        if registry is not None:
            registry.invalidate_child_registries_cache()

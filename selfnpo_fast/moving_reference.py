"""The model that runs the rollouts: the frozen original, or a moving average of the student."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import nn

from selfnpo_kernels import ema_update

Gather = Callable[[list[nn.Parameter]], AbstractContextManager]
"""Makes sharded parameters whole inside the context (ZeRO 3)."""


class Reference:
    """A network without gradients. `version` counts how often it has moved."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module.requires_grad_(False).eval()
        self.version = 0

    def update(self) -> None:
        """Called once per optimiser update; a frozen reference stays."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What has to be saved beyond the original weights."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from `state_dict()`."""


class MovingReference(Reference):
    """An exponential moving average of the student's trainable parameters with float32 masters.

    In a low-precision module the masters are separate tensors and the module is their shadow; a float32 module is its
    own master. (In bf16 an average with decay .999 would stand still.)
    """

    def __init__(
        self,
        module: nn.Module,
        live: Iterable[tuple[str, nn.Parameter]],
        decay: float,
        gather: Gather | None = None,
    ) -> None:
        super().__init__(module)
        self.decay, self.gather = decay, gather
        shadows = dict(self.module.named_parameters())
        self._live = dict(live)
        self._shadow = {name: shadows[name] for name in self._live}
        self._master = {name: p if p.dtype == torch.float32 else p.float() for name, p in self._shadow.items()}

    def update(self) -> None:
        """master <- decay master + (1 - decay) student, then the shadow is rewritten."""
        if self.gather is None:
            self._move(list(self._live))
        else:
            # Parameter by parameter: never more than one whole tensor beyond the shards.
            for name, live in self._live.items():
                with self.gather([live]):
                    self._move([name])
        self.version += 1

    def _move(self, names: list[str]) -> None:
        # A float32 parameter is its own master; a module may hold both kinds.
        for own in (True, False):
            part = [name for name in names if (self._master[name] is self._shadow[name]) == own]
            if part:
                masters, live = [self._master[name] for name in part], [self._live[name] for name in part]
                ema_update(masters, live, [] if own else [self._shadow[name] for name in part], self.decay)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The float32 masters by parameter name, and the version."""
        state = {name: master.detach() for name, master in self._master.items()}
        return {**state, "version": torch.tensor(self.version)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore masters and rewrite the shadows."""
        for name, master in self._master.items():
            master.data.copy_(state[name])
            if master is not self._shadow[name]:
                self._shadow[name].data.copy_(master)
        self.version = int(state["version"])

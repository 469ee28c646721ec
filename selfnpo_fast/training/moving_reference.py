"""The model that runs the rollouts: the frozen original, or a moving average of the student."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn

from selfnpo_fast.runtime.world import World
from selfnpo_fast.training.lora import Variant
from selfnpo_kernels import ema_update

Gather = Callable[[list[nn.Parameter]], AbstractContextManager]
"""Makes sharded parameters whole inside the context (ZeRO 3)."""

ALIGN = 8
"""Elements at a multiple of which every shadow begins in the common buffer: 16 bytes of half precision."""


class Reference:
    """What runs the rollouts: a network, or one choice of its low-rank weights; `version` counts its moves."""

    def __init__(self, module: nn.Module | Variant) -> None:
        self.module, self.version = module, 0

    def update(self) -> None:
        """Called once per optimiser update; a frozen reference stays."""

    def state_dict(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of what has to be saved beyond the original weights; all ranks have to iterate together."""
        return iter(())

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from what `state_dict()` gave."""


class Shards:
    """Which rank keeps the float32 master of which low-precision parameter, and one buffer that holds all of these.

    The buffer is cut into one equal part per rank; each parameter becomes a view into its owner's part, so that one
    all-gather brings what the ranks have moved to all of them.
    """

    def __init__(self, params: dict[str, nn.Parameter], world: World) -> None:
        self.world, self.owner = world, {}
        loads, places = [0] * world.size, {}
        for name, p in sorted(params.items(), key=lambda pair: (-pair[1].numel(), pair[0])):
            rank = loads.index(min(loads))
            self.owner[name], places[name] = rank, loads[rank]
            loads[rank] += -(-p.numel() // ALIGN) * ALIGN
        self.part, first = max(loads, default=0), next(iter(params.values()), None)
        if world.size == 1 or first is None:
            self.buffer = None
            return
        self.buffer = first.new_zeros(world.size * self.part)
        for name, p in params.items():
            view = self.buffer[self.owner[name] * self.part + places[name] :][: p.numel()]
            p.data = view.as_strided(p.shape, p.stride()).copy_(p.data)

    def mine(self, name: str) -> bool:
        """Whether this rank keeps the master."""
        return self.owner[name] == self.world.rank

    def exchange(self) -> None:
        """Bring every rank's part to all ranks."""
        if self.buffer is not None:
            own = self.buffer[self.world.rank * self.part :][: self.part].clone()
            torch.distributed.all_gather_into_tensor(self.buffer, own)


def _in_order_of(master: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """The live parameter, copied where ZeRO keeps it row-major and the reference is channels_last."""
    return live if live.stride() == master.stride() else torch.empty_like(master, dtype=live.dtype).copy_(live.detach())


class MovingReference(Reference):
    """An exponential moving average of the student's trainable parameters with float32 masters.

    A float32 module is its own master on every rank. In a low-precision module the parameters are shadows, written by
    the kernel that moves the masters, and the masters lie apart, each on one rank. (In bf16 an average with decay .999
    would stand still.) It moves at every `every`-th update, with decay to that power.
    """

    def __init__(
        self,
        module: nn.Module | Variant,
        live: Iterable[tuple[str, nn.Parameter]],
        decay: float,
        gather: Gather | None = None,
        *,
        average: dict[str, nn.Parameter] | None = None,
        every: int = 1,
        world: World | None = None,
    ) -> None:
        """`average` holds the parameter that follows each live one; by default the module's own of the same name."""
        super().__init__(module)
        self.decay, self.gather, self.every, self.updates = decay, gather, every, 0
        self.world = world or World(0, 1, next(module.parameters()).device)
        self._live, params = dict(live), dict(module.named_parameters()) if average is None else average
        self._shadow = {name: params[name].requires_grad_(False) for name in self._live}
        low = {name: p for name, p in self._shadow.items() if p.dtype != torch.float32}
        self._shards = Shards(low, self.world)
        self._master = {name: p for name, p in self._shadow.items() if name not in low}
        self._master |= {name: p.detach().float() for name, p in low.items() if self._shards.mine(name)}

    def update(self) -> None:
        """Every `every` updates: master <- decay^every master + (1 - decay^every) student; the shadows follow."""
        self.updates += 1
        if self.updates % self.every:
            return
        if self.gather is None:
            self._move(list(self._master))
        else:
            # Parameter by parameter: never more than one whole tensor beyond the shards.
            for name, live in self._live.items():
                with self.gather([live]):
                    self._move([name] if name in self._master else [])
        self._shards.exchange()
        self.version += 1

    def _move(self, names: list[str]) -> None:
        # A float32 parameter is its own master; a module may hold both kinds.
        for own in (True, False):
            part = [name for name in names if (self._master[name] is self._shadow[name]) == own]
            if part:
                masters = [self._master[name] for name in part]
                live = [_in_order_of(self._master[name], self._live[name]) for name in part]
                shadows = [] if own else [self._shadow[name] for name in part]
                ema_update(masters, live, shadows, self.decay**self.every)

    def state_dict(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The float32 masters by parameter name, from whichever rank has them, and the counters."""
        for name, shadow in self._shadow.items():
            master = self._master.get(name)
            if name in self._shards.owner and self.world.size > 1:
                master = torch.empty_like(shadow, dtype=torch.float32) if master is None else master
                torch.distributed.broadcast(master, self._shards.owner[name])
            yield name, master.detach()
        yield "version", torch.tensor(self.version)
        yield "updates", torch.tensor(self.updates)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore masters and rewrite the shadows."""
        for name, shadow in self._shadow.items():
            shadow.data.copy_(state[name])
            if name in self._master and self._master[name] is not shadow:
                self._master[name].copy_(state[name])
        self.version, self.updates = int(state["version"]), int(state["updates"])

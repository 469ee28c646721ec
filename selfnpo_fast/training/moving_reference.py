"""The model that runs the rollouts: the frozen original, or a moving average of the student."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn

from selfnpo_fast.runtime.layout import Layout, check_range
from selfnpo_fast.runtime.world import World
from selfnpo_fast.training.lora import Variant
from selfnpo_kernels import ema_update

Gather = Callable[[list[nn.Parameter]], AbstractContextManager]
"""Makes sharded parameters whole inside the context (ZeRO 3)."""

ALIGN = 8
"""Every shadow begins at a multiple of this many elements: 16 bytes of half precision."""


class Reference:
    """A frozen reference: the network that runs rollouts, or one choice of its low-rank weights.

    `version` counts its moves.
    """

    required = True
    """A checkpoint holds a file of the reference, though one without tensors where it is frozen."""

    def __init__(self, module: nn.Module | Variant) -> None:
        self.module, self.version = module, 0

    def update(self) -> None:
        """Called once per optimiser update; a frozen reference does not move."""

    def state_dict(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of what the base's weights do not hold; all ranks iterate together."""
        return iter(())

    def layout(self) -> Layout:
        """dtype and shape of each tensor of `state_dict()`; nothing is exchanged among ranks."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from `state_dict()`."""


class Shards:
    """The shards of a low-precision module: which rank keeps the float32 master of which parameter.

    One buffer holds all parameters, with a shard of equal size for each rank. Every parameter
    becomes a view into the shard of its owner, so that one all-gather brings the moved parameters
    of each rank to all ranks.
    """

    def __init__(self, params: dict[str, nn.Parameter], world: World) -> None:
        """Shares `params` out, and moves their data into the buffer if there are several ranks."""
        self.world, self.owner = world, {}
        # The largest parameters first, each to the rank with the fewest elements so far.
        loads, offsets = [0] * world.size, {}
        for name, p in sorted(params.items(), key=lambda item: (-item[1].numel(), item[0])):
            rank = loads.index(min(loads))
            self.owner[name], offsets[name] = rank, loads[rank]
            loads[rank] += -(-p.numel() // ALIGN) * ALIGN
        self.shard_size, first = max(loads, default=0), next(iter(params.values()), None)
        if world.size == 1 or first is None:
            self.buffer = None
            return
        # Each parameter keeps its strides, and its values in the buffer.
        self.buffer = first.new_zeros(world.size * self.shard_size)
        for name, p in params.items():
            view = self.buffer[self.owner[name] * self.shard_size + offsets[name] :][: p.numel()]
            p.data = view.as_strided(p.shape, p.stride()).copy_(p.data)

    def is_owner(self, name: str) -> bool:
        """Whether this rank keeps the master of a parameter."""
        return self.owner[name] == self.world.rank

    def exchange(self) -> None:
        """Bring every rank's shard to all ranks."""
        if self.buffer is not None:
            shard = self.buffer[self.world.rank * self.shard_size :][: self.shard_size].clone()
            torch.distributed.all_gather_into_tensor(self.buffer, shard)


def _in_order_of(master: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """The live parameter with the memory order of its master.

    A copy is made where ZeRO keeps the parameter row-major and the reference is channels_last.
    """
    return live if live.stride() == master.stride() else torch.empty_like(master, dtype=live.dtype).copy_(live.detach())


class MovingReference(Reference):
    """An exponential moving average of the student's trained parameters, with float32 masters.

    A float32 parameter is its own master on every rank. A low-precision parameter is the shadow of
    a float32 master, which one rank keeps and which the same kernel moves: in bf16 an average with
    decay 0.999 would not move.

    The average moves at every `every`-th update, with the decay to the power `every`.
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
        """The average of `live`, the student's trained parameters by name.

        gather     makes sharded live parameters whole (ZeRO 3)
        average    the parameter that follows each live one, by the live one's name; by default the
                   parameters of `module` with the same names
        world      shares the masters out among ranks; by default each process keeps all of them
        """
        super().__init__(module)
        self.decay, self.gather, self.every, self.updates = decay, gather, every, 0
        self.world = world or World(0, 1, next(module.parameters()).device)
        self._live, params = dict(live), dict(module.named_parameters()) if average is None else average
        self._shadow = {name: params[name].requires_grad_(False) for name in self._live}
        low = {name: p for name, p in self._shadow.items() if p.dtype != torch.float32}
        self._shards = Shards(low, self.world)
        self._master = {name: p for name, p in self._shadow.items() if name not in low}
        self._master |= {name: p.detach().float() for name, p in low.items() if self._shards.is_owner(name)}

    def update(self) -> None:
        """master <- decay^every master + (1 - decay^every) student, at every `every`-th call.

        The shadows follow.
        """
        self.updates += 1
        if self.updates % self.every:
            return
        if self.gather is None:
            self._move(list(self._master))
        else:
            # One parameter at a time, so that only one whole tensor is in memory.
            for name, live in self._live.items():
                with self.gather([live]):
                    self._move([name] if name in self._master else [])
        self._shards.exchange()
        self.version += 1

    def _move(self, names: list[str]) -> None:
        """Move the masters of some parameters, with their shadows where they have some."""
        shadowless = [name for name in names if self._master[name] is self._shadow[name]]
        shadowed = [name for name in names if self._master[name] is not self._shadow[name]]
        # One call for each kind; a module may hold both.
        for group in (shadowless, shadowed):
            if group:
                masters = [self._master[name] for name in group]
                live = [_in_order_of(self._master[name], self._live[name]) for name in group]
                shadows = [self._shadow[name] for name in group] if group is shadowed else []
                ema_update(masters, live, shadows, self.decay**self.every)

    def state_dict(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The float32 masters by parameter name, each from its owner's rank, and the counters."""
        for name, shadow in self._shadow.items():
            master = self._master.get(name)
            if name in self._shards.owner and self.world.size > 1:
                master = torch.empty_like(shadow, dtype=torch.float32) if master is None else master
                torch.distributed.broadcast(master, self._shards.owner[name])
            yield name, master.detach()
        yield "version", torch.tensor(self.version)
        yield "updates", torch.tensor(self.updates)

    def layout(self) -> Layout:
        """dtype and shape of each tensor of `state_dict()`; nothing is exchanged among ranks."""
        masters = {name: (torch.float32, tuple(shadow.shape)) for name, shadow in self._shadow.items()}
        return masters | {"version": (torch.int64, ()), "updates": (torch.int64, ())}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore masters and rewrite the shadows. Raises ValueError for impossible counters."""
        check_range("version", state["version"], 0, 2**53)
        check_range("updates", state["updates"], 0, 2**53)
        for name, shadow in self._shadow.items():
            shadow.data.copy_(state[name])
            if name in self._master and self._master[name] is not shadow:
                self._master[name].copy_(state[name])
        self.version, self.updates = int(state["version"]), int(state["updates"])

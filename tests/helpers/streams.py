"""A checker of CUDA streams on the CPU: is every access ordered after what it depends on?

Fake streams and events keep vector clocks, as a race detector does for threads. Every op that torch
dispatches is an access of the present stream to the storages of its tensors. Two accesses to one
storage, one of which writes, have to be ordered by the events of the program.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Clock = dict[str, int]


def join(clock: Clock, other: Clock) -> None:
    """Make `clock` later than both."""
    for name, time in other.items():
        clock[name] = max(clock.get(name, 0), time)


class Streams(TorchDispatchMode):
    """Stands in for torch.cuda's streams while it is active; `races` are the unordered accesses."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.clocks: dict[str, Clock] = {"main": {"main": 1}}
        self.present, self.races = "main", []
        self.accesses = defaultdict(int)
        """Number of accesses by stream."""
        # By storage: the time of the last write, and of the last reads, on each stream.
        self._writes: dict[int, Clock] = defaultdict(dict)
        self._reads: dict[int, Clock] = defaultdict(dict)
        self._alive: list[torch.Tensor] = []  # so that no storage gets the name of another one
        checker = self

        class Stream:
            """A fake of torch.cuda.Stream."""

            def __init__(self, device=None, name: str = "") -> None:
                self.name = name or f"side {len(checker.clocks)}"
                checker.clocks.setdefault(self.name, {self.name: 1})

            def wait_stream(self, other: Stream) -> None:
                self.wait_event(checker.recorded(other.name))

            def wait_event(self, event: Event) -> None:
                join(checker.clocks[self.name], event.clock)

        class Event:
            """A fake of torch.cuda.Event."""

            def __init__(self) -> None:
                self.clock: Clock = {}

            def record(self) -> None:
                self.clock = checker.recorded(checker.present).clock

        @contextlib.contextmanager
        def stream(chosen: Stream):
            before, checker.present = checker.present, chosen.name
            try:
                yield
            finally:
                checker.present = before

        self.Stream, self.Event = Stream, Event
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "stream", stream)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: Stream(name=checker.present))

    def recorded(self, stream: str):
        """An event after all that a stream has been given; what follows is later."""
        event = self.Event()
        event.clock = dict(self.clocks[stream])
        self.clocks[stream][stream] += 1
        return event

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        arguments = func._schema.arguments
        given = list(zip(arguments, args, strict=False))
        given += [(argument, kwargs[argument.name]) for argument in arguments if argument.name in kwargs]
        for argument, value in given:
            written = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tree_leaves(value):
                if isinstance(tensor, torch.Tensor):
                    self._access(tensor, written, func)
        out = func(*args, **kwargs)
        known = {self._name(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and self._name(tensor) not in known:
                self._access(tensor, True, func)
        return out

    @staticmethod
    def _name(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _access(self, tensor: torch.Tensor, writes: bool, func) -> None:
        """One access of the present stream."""
        name, clock = self._name(tensor), self.clocks[self.present]
        # Between two events all accesses of a stream have one time.
        for earlier in (self._writes[name], self._reads[name] if writes else {}):
            for stream, time in earlier.items():
                if clock.get(stream, 0) < time:
                    self.races.append(f"{func}: {self.present} {'writes' if writes else 'reads'} before {stream}")
        self._alive.append(tensor)
        (self._writes if writes else self._reads)[name][self.present] = clock[self.present]
        self.accesses[self.present] += 1

"""Who makes the pairs of the next update, and when: when it begins, or beside the update before it.

Overlap: while the student learns from the pairs of update n, those of update n + 1 are made by the reference as it
stood after update n - 1; the reference moves when both are done. A frozen reference gives the very pairs that it would
give without overlap.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, replace

import torch

from selfnpo_fast.rollout.pairs import GuidedPredictor, Pairs, UpdatePairs
from selfnpo_fast.runtime.profiling import region

State = dict[str, torch.Tensor]
_FIELDS = [field.name for field in fields(Pairs)]


def join_lanes(states: list[State], rank: int, world_size: int) -> State:
    """A rank's part of what another number of ranks have saved.

    (groups, lanes, ...) tensors of all ranks lie next to each other, and each rank takes an equal part of the lanes;
    scalars are common to all.
    """
    out = {}
    for name, first in states[0].items():
        if first.ndim < 2:
            out[name] = first
        else:
            whole = torch.cat([state[name] for state in states], dim=1)
            out[name] = whole.chunk(world_size, dim=1)[rank]
    return out


class Producer:
    """Makes the pairs of an update when it is asked for them.

    `rollout` is a LockstepRollout or a ContinuousRollout, `accumulation` the micro-batches of an update, and `version`
    tells how often the reference has moved.
    """

    def __init__(self, rollout, predictor: GuidedPredictor, accumulation: int, version: Callable[[], int]) -> None:
        self.rollout, self.predictor, self.accumulation, self.version = rollout, predictor, accumulation, version

    def _make(self) -> UpdatePairs:
        before, version = self.predictor.forwards, self.version()
        with region("reference"):
            pairs = tuple(self.rollout.next_pairs() for _ in range(self.accumulation))
        return UpdatePairs(micro_batches=pairs, version=version, forwards=self.predictor.forwards - before)

    def take(self) -> UpdatePairs:
        """The pairs of the next update, good until the one after it is taken."""
        return self._make()

    def settle(self) -> None:
        """Returns when the reference may move; raises what has gone wrong beside the update."""

    def state_dict(self) -> State:
        """All that the pairs to come depend on, beside the reference."""
        return self.rollout.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Go on from `state_dict()`."""
        self.rollout.load_state_dict(state)

    def close(self) -> None:
        """Let nothing run on."""


class _Thread:
    """Work beside the caller's on a CPU: a thread of its own."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="selfnpo-rollout")
        self._work: Future | None = None

    def begin(self, action: Callable[[], UpdatePairs]) -> None:
        """Start; one action at a time."""
        self._work = self._pool.submit(action)

    def finish(self) -> UpdatePairs:
        """What it made, when it is done; raises its error, whose traceback is the thread's."""
        return self._work.result()

    def close(self) -> None:
        """Wait for the present action, whatever becomes of it."""
        self._pool.shutdown()


class _Stream:
    """Work beside the caller's on a GPU: a stream of its own, ordered by events; the host waits for neither."""

    def __init__(self, device: torch.device) -> None:
        self._stream, self._done, self._made = torch.cuda.Stream(device), torch.cuda.Event(), None

    def begin(self, action: Callable[[], UpdatePairs]) -> None:
        """Start after all that the caller's stream has been given: the reference has moved, the buffers are free."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._made = action()
            self._done.record()

    def finish(self) -> UpdatePairs:
        """What it made; the caller's stream waits for it."""
        torch.cuda.current_stream().wait_event(self._done)
        return self._made

    def close(self) -> None:
        """Nothing runs on but kernels."""


def _empty_like(pairs: Pairs) -> Pairs:
    return Pairs(**{name: torch.empty_like(getattr(pairs, name)) for name in _FIELDS})


class OverlappedProducer(Producer):
    """Makes the pairs of the next update beside the present one, into two sets of buffers in turn."""

    def __init__(self, *arguments, device: torch.device) -> None:
        super().__init__(*arguments)
        self._beside = _Stream(device) if device.type == "cuda" else _Thread()
        self._buffers: list[tuple[Pairs, ...]] = []
        self._turn, self._begun = 0, False

    def _copied(self, made: UpdatePairs) -> UpdatePairs:
        """The same in buffers: what a rollout returns is overwritten by its next step, or belongs to another stream."""
        if not self._buffers:
            self._buffers = [tuple(_empty_like(pairs) for pairs in made.micro_batches) for _ in range(2)]
        buffers = self._buffers[self._turn]
        self._turn = 1 - self._turn
        for buffer, pairs in zip(buffers, made.micro_batches, strict=True):
            for name in _FIELDS:
                getattr(buffer, name).copy_(getattr(pairs, name))
        return replace(made, micro_batches=buffers)

    @torch.no_grad()  # a thread has a grad mode of its own, and so it is set here
    def _make(self) -> UpdatePairs:
        return self._copied(super()._make())

    def take(self) -> UpdatePairs:
        """The pairs of the next update; those of the one after it are begun."""
        made = self._beside.finish() if self._begun else self._make()
        self._beside.begin(self._make)
        self._begun = True
        return made

    def settle(self) -> None:
        """Wait for the pairs in flight: the reference that makes them must not move meanwhile."""
        if self._begun:
            self._beside.finish()

    def state_dict(self) -> State:
        """The rollout's state, and the pairs in flight: the reference that made them has moved since."""
        if not self._begun:
            return super().state_dict()
        made = self._beside.finish()
        pending = {f"pending.{n}": torch.stack([getattr(p, n) for p in made.micro_batches]) for n in _FIELDS}
        pending |= {"pending.version": torch.tensor(made.version), "pending.forwards": torch.tensor(made.forwards)}
        return super().state_dict() | pending

    def load_state_dict(self, state: State) -> None:
        """Go on from `state_dict()`."""
        super().load_state_dict({name: value for name, value in state.items() if not name.startswith("pending.")})
        if "pending.version" not in state:
            return
        device = self.rollout.maker.device
        parts = [{n: state[f"pending.{n}"][i].to(device) for n in _FIELDS} for i in range(self.accumulation)]
        made = UpdatePairs(
            micro_batches=tuple(Pairs(**part) for part in parts),
            version=int(state["pending.version"]),
            forwards=int(state["pending.forwards"]),
        )
        self._beside.begin(lambda: self._copied(made))
        self._begun = True

    def close(self) -> None:
        """Wait for what is in flight."""
        self._beside.close()

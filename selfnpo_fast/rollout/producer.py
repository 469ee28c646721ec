"""Producers make the pairs of the next update: at its start, or while the update before it runs.

Overlap: while the student learns from the pairs of update n, the reference as it stood after update
n - 1 makes those of update n + 1. The reference moves when both are done. A frozen reference gives
the same pairs with overlap as without.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, replace

import torch

from selfnpo_fast.rollout.pairs import GuidedPredictor, Pairs, UpdatePairs
from selfnpo_fast.runtime.layout import check_layout, check_range, layout_of
from selfnpo_fast.runtime.profiling import region
from selfnpo_fast.runtime.stopping import check_stop

State = dict[str, torch.Tensor]
_FIELDS = [field.name for field in fields(Pairs)]
_PENDING = "pending."
"""Prefix of the state entries that hold pairs in flight."""


def join_lanes(states: list[State], rank: int, world_size: int) -> State:
    """One rank's part of the states that another number of ranks have saved.

    Tensors (groups, lanes, ...) of all ranks are joined along their lanes, and each rank takes an
    equal part of the lanes. Tensors of fewer dimensions are the same on all ranks.
    """
    state = {}
    for name, first in states[0].items():
        if first.ndim < 2:
            state[name] = first
        else:
            joined = torch.cat([saved[name] for saved in states], dim=1)
            state[name] = joined.chunk(world_size, dim=1)[rank]
    return state


def rows_in_flight(state: State) -> torch.Tensor:
    """The table rows (n,) that pairs in flight in a producer's state are of; n is 0 without any."""
    return state.get(f"{_PENDING}rows", torch.empty(0, dtype=torch.int64)).flatten().cpu()


def _before_group() -> None:
    check_stop("before all slots were filled")


class Producer:
    """Makes the pairs of an update when the trainer asks for them."""

    def __init__(self, rollout, predictor: GuidedPredictor, accumulation: int, version: Callable[[], int]) -> None:
        """A producer over a rollout.

        rollout         has next_pairs, fill, state_dict, load_state_dict, batch and maker, as
                        LockstepRollout
        predictor       has forwards: the samples that the rollout's reference has forwarded
        accumulation    micro-batches of an update
        version         returns how often the reference has moved
        """
        self.rollout, self.predictor, self.accumulation, self.version = rollout, predictor, accumulation, version

    def _make(self, before_group: Callable[[], None] | None = None) -> UpdatePairs:
        """Run the rollout for one update; `before_group` may end it by an exception before it has
        changed anything."""
        before, version = self.predictor.forwards, self.version()
        with region("reference"):
            self.rollout.fill(self.accumulation, before_group)
            pairs = tuple(self.rollout.next_pairs() for _ in range(self.accumulation))
        return UpdatePairs(micro_batches=pairs, version=version, forwards=self.predictor.forwards - before)

    def take(self) -> UpdatePairs:
        """The pairs of the next update. They are valid until the next call.

        Raises Stopped on all ranks, without a change, where the run is to stop before slots are
        filled.
        """
        return self._make(_before_group)

    def settle(self) -> None:
        """Returns when the reference may move; re-raises an exception of the pairs in flight."""

    def state_dict(self) -> State:
        """All that the pairs to come depend on, except for the reference."""
        return self.rollout.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Continue from `state_dict()`."""
        self.rollout.load_state_dict(state)

    def close(self) -> None:
        """Returns when no thread of the producer runs any more."""


class _ThreadWorker:
    """Runs one action at a time in a second thread: the worker on a CPU."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="selfnpo-rollout")
        self._running: Future | None = None

    def begin(self, action: Callable[[], UpdatePairs]) -> None:
        """Start `action`; the one before it has to be finished."""
        self._running = self._pool.submit(action)

    def finish(self) -> UpdatePairs:
        """Waits for the running action and returns its pairs.

        Re-raises the action's exception with the worker's traceback.
        """
        return self._running.result()

    def close(self) -> None:
        """Waits until the running action has ended, by a result or by an exception."""
        self._pool.shutdown()


class _StreamWorker:
    """Runs one action at a time on a second CUDA stream: the worker on a GPU.

    Events order the two streams; the host waits for neither of them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream, self._done = device, torch.cuda.Stream(device), torch.cuda.Event()
        self._pairs: UpdatePairs | None = None
        self._action: Callable[[], UpdatePairs] | None = None
        self._error: Exception | None = None

    def begin(self, action: Callable[[], UpdatePairs]) -> None:
        """Enqueue `action` after all that the caller's stream has been given.

        By then the reference has moved and the buffers are free. The action, and so the tensors
        that it reads, live until `finish`: the allocator would give memory that was allocated on
        the caller's stream to that stream again, while the action's kernels still read it.

        `finish` raises what the action has raised.
        """
        self._action, self._pairs, self._error = action, None, None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            try:
                self._pairs = action()
            except Exception as error:
                self._error = error
            self._done.record()

    def finish(self) -> UpdatePairs:
        """Returns the action's pairs, and makes the caller's stream wait for them.

        Re-raises the action's exception with its traceback.
        """
        torch.cuda.current_stream(self._device).wait_event(self._done)
        self._action = None
        if self._error is not None:
            raise self._error
        return self._pairs

    def close(self) -> None:
        """Does nothing: only kernels can still run."""


def _empty_like(pairs: Pairs) -> Pairs:
    return Pairs(**{name: torch.empty_like(getattr(pairs, name)) for name in _FIELDS})


class OverlappedProducer(Producer):
    """Makes the pairs of the next update while the present one runs, in two alternating buffers."""

    def __init__(self, *arguments, device: torch.device) -> None:
        """`arguments` are those of `Producer`; `device` is the device of the pairs."""
        super().__init__(*arguments)
        self._worker = _StreamWorker(device) if device.type == "cuda" else _ThreadWorker()
        self._buffers: list[tuple[Pairs, ...]] = []
        self._next_buffers = 0
        self._in_flight = False
        """Whether the worker makes, or has made, pairs that nobody has taken."""

    def _copied(self, update_pairs: UpdatePairs) -> UpdatePairs:
        """The same pairs in the next set of buffers.

        What a rollout returns is overwritten by its next step, or belongs to another stream.
        """
        if not self._buffers:
            self._buffers = [tuple(_empty_like(pairs) for pairs in update_pairs.micro_batches) for _ in range(2)]
        buffers = self._buffers[self._next_buffers]
        self._next_buffers = 1 - self._next_buffers
        for buffer, pairs in zip(buffers, update_pairs.micro_batches, strict=True):
            for name in _FIELDS:
                getattr(buffer, name).copy_(getattr(pairs, name))
        return replace(update_pairs, micro_batches=buffers)

    @torch.no_grad()  # Grad mode belongs to a thread, and this may run in the worker's.
    def _make(self, before_group: Callable[[], None] | None = None) -> UpdatePairs:
        return self._copied(super()._make(before_group))

    def take(self) -> UpdatePairs:
        """The pairs of the next update; starts making those of the update after it.

        Raises Stopped like `Producer.take`, but not while pairs are in flight.
        """
        update_pairs = self._worker.finish() if self._in_flight else self._make(_before_group)
        self._worker.begin(self._make)
        self._in_flight = True
        return update_pairs

    def settle(self) -> None:
        """Waits for the pairs in flight: the reference must not move while it makes them.

        Re-raises the exception that ended their making.
        """
        if self._in_flight:
            self._worker.finish()

    def state_dict(self) -> State:
        """The rollout's state, and the pairs in flight, whose reference has moved since."""
        if not self._in_flight:
            return super().state_dict()
        in_flight = self._worker.finish()
        pending = {f"{_PENDING}{n}": torch.stack([getattr(p, n) for p in in_flight.micro_batches]) for n in _FIELDS}
        pending[f"{_PENDING}version"] = torch.tensor(in_flight.version)
        pending[f"{_PENDING}forwards"] = torch.tensor(in_flight.forwards)
        return super().state_dict() | pending

    def load_state_dict(self, state: State) -> None:
        """Continue from `state_dict()`. Raises ValueError where it is none of this producer's."""
        pending = {name: value for name, value in state.items() if name.startswith(_PENDING)}
        if pending:
            self._check_pending(pending)
        super().load_state_dict({name: value for name, value in state.items() if name not in pending})
        if not pending:
            return
        device = self.rollout.maker.device
        micro_batches = (
            Pairs(**{n: state[f"{_PENDING}{n}"][i].to(device) for n in _FIELDS}) for i in range(self.accumulation)
        )
        saved = UpdatePairs(
            micro_batches=tuple(micro_batches),
            version=int(state[f"{_PENDING}version"]),
            forwards=int(state[f"{_PENDING}forwards"]),
        )
        self._worker.begin(lambda: self._copied(saved))
        self._in_flight = True

    def _check_pending(self, pending: State) -> None:
        """ValueError where tensors by their names in a state are no pairs of this producer."""
        pairs = {name.removeprefix(_PENDING): value for name, value in pending.items()}
        counters = {name: pairs.pop(name, torch.empty(0)) for name in ("version", "forwards")}
        check_layout(layout_of(counters.items()), dict.fromkeys(counters, (torch.int64, ())))
        for name, value in counters.items():
            check_range(name, value, 0, 2**53)
        self.rollout.maker.check_pairs(pairs, (self.accumulation, self.rollout.batch))

    def close(self) -> None:
        """Waits until the pairs in flight are made, or their making has failed."""
        self._worker.close()

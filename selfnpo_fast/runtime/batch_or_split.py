"""Both branches of guidance as one batch or as two, whichever is faster on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from selfnpo_fast.runtime.console import logger

BRANCHES = ("auto", "batched", "split")
MARGIN = 0.05
"""Two batches have to be faster by this share: chance shall not decide between equals."""


class BatchOrSplit:
    """One batch or two for one shape, chosen by timing the first steps of a real trajectory: no forward is wasted.

    The first call of either kind sets things up and is not counted; the least of the next two decides.
    """

    TRIALS = 3

    def __init__(self, choice: str, what: str) -> None:
        """`choice` is one of BRANCHES; `what` names the shape in the line that says what was chosen."""
        self.batched: bool | None = {"auto": None, "batched": True, "split": False}[choice]
        self.what = what
        self._seconds: dict[bool, list[float]] = {True: [], False: []}

    @property
    def decided(self) -> bool:
        """Whether later calls run alike: before, nothing is to be captured."""
        return self.batched is not None

    def restart(self) -> None:
        """Forget what was timed: a larger batch is to decide."""
        self._seconds = {True: [], False: []}

    def run(self, call: Callable[[bool], tuple], device: torch.device) -> tuple:
        """`call(batched)`, timed while the choice is open; the device is waited for then."""
        if self.batched is not None:
            return call(self.batched)
        batched = len(self._seconds[True]) <= len(self._seconds[False])
        _wait(device)
        start = time.perf_counter()
        out = call(batched)
        _wait(device)
        self._seconds[batched].append(time.perf_counter() - start)
        if len(self._seconds[False]) == self.TRIALS:
            self._decide()
        return out

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The choice as a number: 1 for one batch, 0 for two, -1 while it is open."""
        return {"branches": torch.tensor(-1 if self.batched is None else int(self.batched))}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over a choice from `state_dict()`."""
        if state["branches"] >= 0:
            self.batched = bool(state["branches"])

    def _decide(self) -> None:
        one, two = (min(self._seconds[batched][1:], default=math.inf) for batched in (True, False))
        self.batched = one <= two * (1 + MARGIN)
        chosen = "one batch" if self.batched else "two batches"
        logger.info("guidance branches: %s for %s (one %.3g s, two %.3g s)", chosen, self.what, one, two)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

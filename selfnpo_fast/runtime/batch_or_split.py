"""The two branches of guidance as one batch or as two, whichever is faster on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from selfnpo_fast.runtime.capture import wait_for_device
from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.layout import check_range

BRANCHES = ("auto", "batched", "split")
MARGIN = 0.05
"""Two batches are chosen only if they are faster by this share: noise shall not decide."""


class BatchOrSplit:
    """Chooses one batch or two for one shape, by timing calls whose results are needed anyway.

    `TRIALS` calls of either kind are timed. The first of them sets things up and does not count;
    the fastest of the others decides.
    """

    TRIALS = 3

    def __init__(self, choice: str, what: str) -> None:
        """`choice` is one of BRANCHES; `what` names the shape in the log."""
        self.batched: bool | None = {"auto": None, "batched": True, "split": False}[choice]
        self.what = what
        self._seconds: dict[bool, list[float]] = {True: [], False: []}

    @property
    def decided(self) -> bool:
        """Whether the choice is final. A CUDA graph may be captured only then."""
        return self.batched is not None

    def restart(self) -> None:
        """Forget the times so far, because a larger batch is to decide."""
        self._seconds = {True: [], False: []}

    def run(self, call: Callable[[bool], tuple], device: torch.device) -> tuple:
        """The result of `call(batched)`; while the choice is open, the call is timed.

        A timed call waits for `device`.
        """
        if self.batched is not None:
            return call(self.batched)
        batched = len(self._seconds[True]) <= len(self._seconds[False])
        wait_for_device(device)
        start = time.perf_counter()
        result = call(batched)
        wait_for_device(device)
        self._seconds[batched].append(time.perf_counter() - start)
        if len(self._seconds[False]) == self.TRIALS:
            self._decide()
        return result

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The choice as a number: 1 for one batch, 0 for two, -1 while the choice is open."""
        return {"branches": torch.tensor(-1 if self.batched is None else int(self.batched))}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over the choice of a `state_dict()`, if it was final. Raises ValueError for others."""
        check_range("branches", state["branches"], -1, 1)
        if state["branches"] >= 0:
            self.batched = bool(state["branches"])

    def _decide(self) -> None:
        """Choose by the fastest counted call of either kind, and log the choice."""
        one, two = (min(self._seconds[batched][1:], default=math.inf) for batched in (True, False))
        self.batched = one <= two * (1 + MARGIN)
        chosen = "one batch" if self.batched else "two batches"
        logger.info("guidance branches: %s for %s (one %.3g s, two %.3g s)", chosen, self.what, one, two)

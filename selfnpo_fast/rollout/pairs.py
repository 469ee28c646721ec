"""Training pairs: what they are, who predicts for them, and what chance decides about them.

Shape letters: B pairs of one micro-batch, T training timesteps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from selfnpo_fast.config import RolloutConfig
from selfnpo_fast.models.conditioning import EMPTY_ROW, ConditioningTable
from selfnpo_fast.rollout.grid import Grid
from selfnpo_fast.runtime.console import logger
from selfnpo_kernels import Draw, NoiseKey, TdftRules, draw_id, permute, randint, uniform

Predict = Callable[[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]
"""(x (B, ...), t (B,), conditioning rows) -> raw network output (B, ...)."""
AUTOTUNE_CALLS, AUTOTUNE_MARGIN = 4, 0.05
"""Two batches have to be faster by the margin: chance shall not decide between equals."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """One micro-batch of training pairs, everything on the device of the latents."""

    x_s: torch.Tensor  # (B, ...) float32, the student's input
    s: torch.Tensor  # (B,) int64
    target: torch.Tensor  # (B, ...) float32, x_{t->0}
    t: torch.Tensor  # (B,) int64
    rows: torch.Tensor  # (B,) int64, the student's row of the conditioning table
    weight: torch.Tensor  # (B,) float32
    sample_ids: torch.Tensor  # (B,) int64


@dataclass(frozen=True, kw_only=True)
class UpdatePairs:
    """The pairs of one update on this rank: what the producer hands to the student."""

    micro_batches: tuple[Pairs, ...]
    version: int  # of the reference that made them: how often it had moved
    forwards: int  # samples that it forwarded for them


class GuidedPredictor:
    """The reference network under rollout guidance w; counts the samples it has forwarded.

    w = -1 needs the unconditional output alone and w = 0 the conditional one; otherwise both run, as one batch or as
    two (`branches`): `auto` measures at the first call which is faster here, and keeps to it.
    """

    def __init__(self, predict: Predict, table: ConditioningTable, w: float, branches: str = "auto") -> None:
        self.predict, self.table, self.w = predict, table, w
        self.batched: bool | None = {"auto": None, "batched": True, "split": False}[branches]
        self.forwards = 0

    @property
    def calls(self) -> int:
        """Samples that are forwarded for the outputs of one."""
        return 1 if self.w in (-1, 0) else 2

    def __call__(self, x: torch.Tensor, t: torch.Tensor, rows: torch.Tensor):
        """`(pos or None, neg or None)` at states x (B, ...), timesteps t (B,), table rows (B,)."""
        self.prepare(x, t, rows)
        self.forwards += self.calls * len(x)
        return self.outputs(x, t, rows)

    def prepare(self, x: torch.Tensor, t: torch.Tensor, rows: torch.Tensor) -> None:
        """Decide how the branches run, if that is still open; the device is waited for then."""
        if self.calls == 2 and self.batched is None:
            self.batched = self._faster_batched(x, t, rows)

    def outputs(self, x: torch.Tensor, t: torch.Tensor, rows: torch.Tensor):
        """What a call returns, and nothing else: for a step that is compiled or captured."""
        batch = len(x)
        if self.w == -1:
            return None, self.predict(x, t, self.table.empty(batch))
        if self.w == 0:
            return self.predict(x, t, self.table.gather(rows)), None
        if self.batched is False:
            return self.predict(x, t, self.table.gather(rows)), self.predict(x, t, self.table.empty(batch))
        both = self.table.gather(torch.cat([rows, torch.full_like(rows, EMPTY_ROW)]))
        pos, neg = self.predict(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return pos, neg

    def _faster_batched(self, x: torch.Tensor, t: torch.Tensor, rows: torch.Tensor) -> bool:
        """Whether one batch of both branches takes less time than two; the least of some calls each, in turn."""
        seconds = {True: math.inf, False: math.inf}
        for _ in range(1 + AUTOTUNE_CALLS):  # what the first calls set up counts for nobody: a minimum is taken
            for self.batched in seconds:
                _wait(x.device)
                start = time.perf_counter()
                self.outputs(x, t, rows)
                _wait(x.device)
                seconds[self.batched] = min(seconds[self.batched], time.perf_counter() - start)
        faster = seconds[True] <= seconds[False] * (1 + AUTOTUNE_MARGIN)
        logger.info(
            "rollout branches: %s (%d samples: one batch %.3g s, two %.3g s)",
            "one batch" if faster else "two", len(x), seconds[True], seconds[False],
        )  # fmt: skip
        return faster

    def state(self) -> torch.Tensor:
        """How the branches run, for a checkpoint: outputs of one batch and of two differ in their last bits."""
        return torch.tensor(-1 if self.batched is None else int(self.batched))

    def load_state(self, state: torch.Tensor) -> None:
        """Go on from `state()`."""
        if state >= 0:
            self.batched = bool(state)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PairMaker:
    """What both modes share: which prompt a sample has, where s falls, what the student sees."""

    def __init__(
        self,
        predictor: GuidedPredictor,
        grid: Grid,
        config: RolloutConfig,
        *,
        latent_shape: tuple[int, ...],
        items: int,
        latents: torch.Tensor | None,
        seed: int,
        dropout: float,
        device: torch.device,
        shuffled: bool = False,
    ) -> None:
        self.predictor, self.grid, self.config = predictor, grid, config
        self.latent_shape, self.items, self.latents = latent_shape, items, latents
        self.seed, self.dropout, self.device, self.shuffled = seed, dropout, device, shuffled

    def item(self, sample_ids: torch.Tensor, order: int = 0) -> torch.Tensor:
        """Prompt (or image) number of each sample id (B,): a keyed permutation of the items per epoch.

        Another `order` is another permutation.
        """
        return permute(sample_ids % self.items, self.items, self.seed + order, sample_ids // self.items)

    def rows(self, sample_ids: torch.Tensor) -> torch.Tensor:
        """Rows of the conditioning table, (B,)."""
        return self.item(sample_ids) + 1

    def key(self, kind: Draw, sample_ids: torch.Tensor, index: torch.Tensor | int = -1) -> NoiseKey:
        """The noise key of one use for these samples."""
        return NoiseKey(self.seed, sample_ids, draw_id(kind, index))

    def draw_s(self, sample_ids: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """s (B,) uniform in {t + 1, ..., T - 1} for pairs taken at grid `index` (B,)."""
        t = self.grid.timestep(index)
        room = self.grid.schedule.num_train_timesteps - 1 - t
        return t + 1 + randint(self.key(Draw.RENOISE_TIME, sample_ids, index), room)

    def student_rows(self, sample_ids: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """The prompts' rows with `dropout` of them replaced by the empty prompt, (B,)."""
        dropped = uniform(self.key(Draw.PROMPT_DROPOUT, sample_ids, index)) < self.dropout
        rows = self.item(sample_ids, order=1) + 1 if self.shuffled else self.rows(sample_ids)
        return torch.where(dropped, EMPTY_ROW, rows)

    def start_latents(self, sample_ids: torch.Tensor) -> torch.Tensor | None:
        """Scaled latents (B, ...) of real data, or None when rollouts start from noise."""
        if self.latents is None:
            return None
        return self.latents[self.item(sample_ids).to(self.latents.device)].to(self.device)

    def rules(self, stride: int) -> TdftRules:
        """What `tdft_step` needs of this; `stride` is the number of slots of all ranks."""
        return TdftRules(
            items=self.items,
            stride=stride,
            max_steps=self.config.max_steps,
            seed=self.seed,
            dropout=self.dropout,
            shuffled=self.shuffled,
            naive=self.grid.naive,
        )

    def finish(self, x_t, index, target, sample_ids) -> Pairs:
        """Re-noise states x_t (B, ...) at grid indices (B,) and pack the pairs."""
        s = self.draw_s(sample_ids, index)
        return Pairs(
            x_s=self.grid.noised(x_t, target, index, s, self.key(Draw.RENOISE, sample_ids, index)),
            s=s,
            target=target,
            t=self.grid.timestep(index),
            rows=self.student_rows(sample_ids, index),
            weight=torch.ones(len(s), device=x_t.device),
            sample_ids=sample_ids,
        )

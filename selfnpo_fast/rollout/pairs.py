"""Training pairs: what they are, who predicts for them, and what chance decides about them.

Shape letters: B pairs of one micro-batch, T training timesteps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from selfnpo_fast.config import RolloutConfig
from selfnpo_fast.models.base import Predict
from selfnpo_fast.models.conditioning import EMPTY_ROW, ConditioningTable
from selfnpo_fast.rollout.grid import Grid
from selfnpo_fast.runtime.batch_or_split import BatchOrSplit
from selfnpo_kernels import Draw, NoiseKey, TdftRules, draw_id, permute, randint, uniform


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
    """The reference network under rollout guidance omega; counts the samples it has forwarded.

    omega = -1 needs the unconditional output only and omega = 0 the conditional one. Otherwise both run, as one batch
    or as two (`branches`): `auto` times the first steps of full batches and keeps to the faster way.
    """

    def __init__(self, predict: Predict, table: ConditioningTable, omega: float, branches: str = "auto") -> None:
        self.predict, self.table, self.omega = predict, table, omega
        self.branches = BatchOrSplit(branches, "rollouts")
        self.forwards = 0
        self._largest_batch = 0

    @property
    def forwards_per_state(self) -> int:
        """Samples that are forwarded for the outputs of one state: 1 or 2."""
        return forwards_per_state(self.omega)

    @property
    def decided(self) -> bool:
        """Whether later calls run their branches alike: only then is a step compiled or captured."""
        return self.forwards_per_state == 1 or self.branches.decided

    def __call__(self, x: torch.Tensor, t: torch.Tensor, rows: torch.Tensor):
        """`(pos or None, neg or None)` at states x (B, ...), timesteps t (B,), table rows (B,)."""
        self.forwards += self.forwards_per_state * len(x)
        return self.outputs(x, t, rows)

    def outputs(self, x: torch.Tensor, t: torch.Tensor, rows: torch.Tensor):
        """What a call returns, without counting: for a step that is compiled or captured."""
        if self.omega == -1:
            return None, self.predict(x, t, self.table.empty(len(x)))
        if self.omega == 0:
            return self.predict(x, t, self.table.gather(rows)), None
        if self.branches.decided:
            return self._both(x, t, rows, bool(self.branches.batched))
        if len(x) > self._largest_batch:
            self._largest_batch = len(x)
            self.branches.restart()
        if len(x) < self._largest_batch:  # some samples have arrived: its time is no measure of a full batch
            return self._both(x, t, rows, batched=True)
        return self.branches.run(lambda batched: self._both(x, t, rows, batched), x.device)

    def _both(self, x: torch.Tensor, t: torch.Tensor, rows: torch.Tensor, batched: bool):
        if not batched:
            return self.predict(x, t, self.table.gather(rows)), self.predict(x, t, self.table.empty(len(x)))
        both = self.table.gather(torch.cat([rows, torch.full_like(rows, EMPTY_ROW)]))
        pos, neg = self.predict(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return pos, neg

    def state_dict(self) -> dict[str, torch.Tensor]:
        """How the branches run: outputs of one batch and of two differ in their last bits."""
        return self.branches.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from `state_dict()`."""
        self.branches.load_state_dict(state)


def forwards_per_state(omega: float) -> int:
    """Rows that the reference forwards for one state: both branches, or only the one that counts at -1 and 0."""
    return 1 if omega in (-1, 0) else 2


class PairMaker:
    """What both modes share: which prompt a sample has, where s falls, what the student sees."""

    def __init__(
        self,
        predictor: GuidedPredictor,
        grid: Grid,
        config: RolloutConfig,
        *,
        latent_shape: tuple[int, ...],
        num_prompts: int,
        latents: torch.Tensor | None,
        seed: int,
        dropout: float,
        device: torch.device,
        shuffled: bool = False,
    ) -> None:
        self.predictor, self.grid, self.config = predictor, grid, config
        self.latent_shape, self.num_prompts, self.latents = latent_shape, num_prompts, latents
        self.seed, self.dropout, self.device, self.shuffled = seed, dropout, device, shuffled

    def prompt_index(self, sample_ids: torch.Tensor, order: int = 0) -> torch.Tensor:
        """Prompt (or image) number of each sample id (B,): a keyed permutation of all of them per epoch.

        Another `order` is another permutation.
        """
        return permute(
            sample_ids % self.num_prompts, self.num_prompts, self.seed + order, sample_ids // self.num_prompts
        )

    def rows(self, sample_ids: torch.Tensor) -> torch.Tensor:
        """Rows of the conditioning table, (B,)."""
        return self.prompt_index(sample_ids) + 1

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
        rows = self.prompt_index(sample_ids, order=1) + 1 if self.shuffled else self.rows(sample_ids)
        return torch.where(dropped, EMPTY_ROW, rows)

    def start_latents(self, sample_ids: torch.Tensor) -> torch.Tensor | None:
        """Scaled latents (B, ...) of real data, or None when rollouts start from noise."""
        if self.latents is None:
            return None
        return self.latents[self.prompt_index(sample_ids).to(self.latents.device)].to(self.device)

    def rules(self, stride: int) -> TdftRules:
        """What `tdft_step` needs of this; `stride` is the number of slots of all ranks."""
        return TdftRules(
            num_prompts=self.num_prompts,
            stride=stride,
            max_steps=self.config.max_steps,
            seed=self.seed,
            dropout=self.dropout,
            shuffled=self.shuffled,
            naive=self.grid.naive,
        )

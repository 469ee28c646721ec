"""Training pairs, the guided reference that predicts for them, and the random draws behind them.

Shape letters: B pairs of one micro-batch, T training timesteps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from selfnpo_fast.config import RolloutConfig
from selfnpo_fast.models.base import Predict
from selfnpo_fast.models.conditioning import EMPTY_ROW, ConditioningTable
from selfnpo_fast.rollout.grid import Grid, pair_weights
from selfnpo_fast.runtime.batch_or_split import BatchOrSplit
from selfnpo_fast.runtime.layout import check_layout, check_range, layout_of
from selfnpo_fast.runtime.limits import MAX_SAMPLE_ID
from selfnpo_fast.runtime.upload import upload
from selfnpo_kernels import Draw, NoiseKey, TdftRules, draw_id, permute, randint, uniform

BranchOutputs = tuple[torch.Tensor | None, torch.Tensor | None]
"""Conditional and unconditional output, (B, ...) each; None where guidance does not need it."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """One micro-batch of training pairs, on the device of the latents."""

    x_s: torch.Tensor
    """(B, ...) float32: the student's input."""
    s: torch.Tensor
    """(B,) int64: the timestep of `x_s`."""
    target: torch.Tensor
    """(B, ...) float32: x_{t->0}, the reference's estimate of x_0."""
    t: torch.Tensor
    """(B,) int64: the timestep of the state that gave the target."""
    rows: torch.Tensor
    """(B,) int64: the student's rows of the conditioning table."""
    weight: torch.Tensor
    """(B,) float32: the pair's weight in the loss."""
    sample_ids: torch.Tensor
    """(B,) int64: the samples whose trajectories gave the pairs."""


@dataclass(frozen=True, kw_only=True)
class UpdatePairs:
    """The pairs of one update on this rank, as a producer gives them to the trainer."""

    micro_batches: tuple[Pairs, ...]
    """As many as the update accumulates gradients over."""
    version: int
    """How often the reference had moved when it made the pairs."""
    forwards: int
    """Samples that the reference forwarded for the pairs."""


class GuidedPredictor:
    """The reference network under rollout guidance omega; counts the samples it has forwarded.

    omega = -1 needs only the unconditional output, and omega = 0 only the conditional one.
    Otherwise both branches run, as one batch or as two. `branches` chooses: `batched`, `split`, or
    `auto`, which times the first steps of full batches and keeps to the faster way.
    """

    def __init__(self, predict: Predict, table: ConditioningTable, omega: float, branches: str = "auto") -> None:
        self.predict, self.table, self.omega = predict, table, omega
        self.branches = BatchOrSplit(branches, "rollouts")
        self.forwards = 0
        self.full_batch = 0
        """Samples of a full batch: as many as a rollout announces, or the most so far."""

    @property
    def forwards_per_state(self) -> int:
        """Samples that are forwarded for the outputs of one state: 1 or 2."""
        return forwards_per_state(self.omega)

    @property
    def decided(self) -> bool:
        """Whether all later calls run their branches alike, so that a step may be captured."""
        return self.forwards_per_state == 1 or self.branches.decided

    def __call__(self, x: torch.Tensor, t: torch.Tensor, rows: torch.Tensor) -> BranchOutputs:
        """The outputs (conditional, unconditional) at some states.

        x       (B, ...), the states
        t       (B,), their timesteps
        rows    (B,), their rows of the conditioning table
        """
        self.forwards += self.forwards_per_state * len(x)
        return self.outputs(x, t, rows)

    def outputs(self, x: torch.Tensor, t: torch.Tensor, rows: torch.Tensor) -> BranchOutputs:
        """What a call returns, without counting, for a step that is compiled or captured."""
        if self.omega == -1:
            return None, self.predict(x, t, self.table.empty(len(x)))
        if self.omega == 0:
            return self.predict(x, t, self.table.gather(rows)), None
        if self.branches.decided:
            return self._both(x, t, rows, bool(self.branches.batched))
        if len(x) > self.full_batch:
            self.full_batch = len(x)
            self.branches.restart()
        if len(x) < self.full_batch:
            # Slots are filled, or some samples have arrived: the time of this call is no measure.
            return self._both(x, t, rows, batched=True)
        return self.branches.run(lambda batched: self._both(x, t, rows, batched), x.device)

    def _both(self, x: torch.Tensor, t: torch.Tensor, rows: torch.Tensor, batched: bool) -> BranchOutputs:
        """Both outputs, from one forward of 2B samples or from two forwards of B."""
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
    """Samples that the reference forwards for one state: 1 where omega is -1 or 0, else 2."""
    return 1 if omega in (-1, 0) else 2


def rows_at_hand(*, batch: int, accumulation: int, groups: int, omega: float) -> int:
    """Rows that a table on the host keeps on the device, so that none is missing where it is used.

    batch           pairs of a micro-batch on this rank
    accumulation    micro-batches of an update
    groups          groups of slots; 0 for lockstep rollouts

    A micro-batch asks for the rows of its pairs, and unless omega is -1 for those of its rollouts.
    While the student learns from an update's pairs, those of the next one are made, its groups are
    filled, and one micro-batch more is prefetched. The slots' rows stay from turn to turn.
    """
    return batch * (1 if omega == -1 else 2) * max(3 * accumulation + 2, groups + 1)


class PairMaker:
    """What both modes share: each sample's prompt, its keyed draws, and the student's prompt."""

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
        """A maker of pairs on `device`.

        latents         (num_prompts, ...), the scaled latents of real data; None from noise
        latent_shape    the shape of one latent
        dropout         the probability that the student is given the empty prompt
        shuffled        whether the student is given the prompt of another sample (a control)
        """
        self.predictor, self.grid, self.config = predictor, grid, config
        self.latent_shape, self.num_prompts, self.latents = latent_shape, num_prompts, latents
        self.seed, self.dropout, self.device, self.shuffled = seed, dropout, device, shuffled
        weights, self.share_without_s = pair_weights(config, grid)
        self.weights = weights.float().to(device)  # (N + 1,), by grid index + 1

    def prompt_index(self, sample_ids: torch.Tensor, order: int = 0) -> torch.Tensor:
        """Prompt (or image) index (B,) of sample ids (B,).

        Every epoch is a keyed permutation of all prompts; another `order` is another permutation.
        """
        return permute(
            sample_ids % self.num_prompts, self.num_prompts, self.seed + order, sample_ids // self.num_prompts
        )

    def rows(self, sample_ids: torch.Tensor) -> torch.Tensor:
        """Rows (B,) of the conditioning table for sample ids (B,)."""
        return self.prompt_index(sample_ids) + 1

    def key(self, kind: Draw, sample_ids: torch.Tensor, index: torch.Tensor | int = -1) -> NoiseKey:
        """The noise key of one use, for samples (B,) at grid indices (B,) or one index for all."""
        return NoiseKey(self.seed, sample_ids, draw_id(kind, index))

    def draw_s(self, sample_ids: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """s (B,) in {t + 1, ..., T - 1}, for samples (B,) at grid indices (B,): uniform, in the levels
        that pairs may have, unless `rollout.s_shift` moves it."""
        above = self.grid.draws_above[index + 1]
        choices = self.grid.schedule.num_train_timesteps - 1 - above
        return self.grid.level_of(index, above + 1 + randint(self.key(Draw.RENOISE_TIME, sample_ids, index), choices))

    def student_rows(self, sample_ids: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """The prompts' table rows (B,), with a share `dropout` replaced by the empty row."""
        dropped = uniform(self.key(Draw.PROMPT_DROPOUT, sample_ids, index)) < self.dropout
        rows = self.prompt_index(sample_ids, order=1) + 1 if self.shuffled else self.rows(sample_ids)
        return torch.where(dropped, EMPTY_ROW, rows)

    def prefetch(self, rows: torch.Tensor, student_rows: torch.Tensor) -> None:
        """Bring the rows (n,) that samples walk with, and those that the student is given, to the
        device; both are on the host. Nothing to do where the whole table is on the device."""
        table, only_empty = self.predictor.table, self.predictor.omega == -1
        if table.on_host:
            table.prefetch(student_rows if only_empty else torch.cat([rows, student_rows]))

    def start_latents(self, sample_ids: torch.Tensor) -> torch.Tensor | None:
        """Scaled latents (B, ...) of real data, or None where rollouts start from noise."""
        if self.latents is None:
            return None
        return upload(self.latents[self.prompt_index(sample_ids).to(self.latents.device)], self.device)

    def check_pairs(self, pairs: dict[str, torch.Tensor], lead: tuple[int, ...]) -> None:
        """ValueError where saved fields of pairs, each (*lead, ...), are none that this maker
        makes."""
        last = self.grid.schedule.num_train_timesteps - 1
        bounds = {"s": last, "t": last, "rows": self.num_prompts, "sample_ids": MAX_SAMPLE_ID}
        expected = {name: (torch.int64, lead) for name in bounds} | {"weight": (torch.float32, lead)}
        expected |= {name: (torch.float32, (*lead, *self.latent_shape)) for name in ("x_s", "target")}
        check_layout(layout_of(pairs.items()), expected)
        for name, most in bounds.items():
            check_range(name, pairs[name], 0, most)

    def rules(self, stride: int) -> TdftRules:
        """The constants of `tdft_step`; `stride` is the number of slots of all ranks."""
        return TdftRules(
            num_prompts=self.num_prompts,
            stride=stride,
            max_steps=self.config.max_steps,
            seed=self.seed,
            dropout=self.dropout,
            shuffled=self.shuffled,
            naive=self.grid.naive,
        )

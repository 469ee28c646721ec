"""Self-NPO: the student learns from truncated rollouts of the reference.

The paper calls this truncated diffusion fine-tuning.
"""

from __future__ import annotations

import torch
from torch import nn

from selfnpo_fast.config import TrainConfig
from selfnpo_fast.data.prompts import read_prompts
from selfnpo_fast.data.real_images import load_real_data
from selfnpo_fast.models import Adapter
from selfnpo_fast.models.base import Predict
from selfnpo_fast.models.conditioning import ConditioningTable
from selfnpo_fast.rollout import (
    ContinuousRollout,
    Grid,
    GuidedPredictor,
    LockstepRollout,
    OverlappedProducer,
    PairMaker,
    Pairs,
    Producer,
    rows_at_hand,
    rows_in_flight,
)
from selfnpo_fast.runtime.capture import capture_of
from selfnpo_fast.runtime.console import say_once
from selfnpo_fast.runtime.dtypes import DTYPES
from selfnpo_fast.runtime.world import World
from selfnpo_fast.training.methods.base import Method, MethodInputs
from selfnpo_fast.training.moving_reference import Reference
from selfnpo_fast.training.objective import Objective
from selfnpo_kernels import guided_step


def say_without_graphs(device: torch.device, asked: bool) -> None:
    """Say once that the reference's steps are neither captured nor compiled as a whole, where they
    would have been."""
    if asked and device.type == "cuda":
        say_once(
            "engine.graphs, engine.compile: the rollout's steps of a model of two experts run as plain launches, since "
            "the host routes samples by their times; blocks are compiled as asked"
        )


def window_rows(config: TrainConfig, world_size: int) -> int:
    """Rows of a table on the host that a rank keeps on the device."""
    accumulation, lockstep = config.engine.accumulation, config.rollout.mode == "lockstep"
    return rows_at_hand(
        batch=config.engine.micro_batch(world_size),
        accumulation=accumulation,
        groups=0 if lockstep else config.rollout.pool * accumulation,
        omega=config.rollout.omega,
    )


class SelfNPO(Method):
    """Pairs (x_s, x_{t->0}) of the reference's rollouts, whose targets the student's x0 learns."""

    name = "self_npo"

    def __init__(self, config: TrainConfig, adapter: Adapter, table: ConditioningTable, world: World) -> None:
        super().__init__(config, adapter, table, world)
        self.objective = Objective.build(config.loss, adapter.schedule, world.device)

    @classmethod
    def read_inputs(cls, config: TrainConfig, adapter: Adapter, world: World) -> MethodInputs:
        """Prompts (Eq. 13), or real images with captions (Eq. 14).

        Raises UserError for every mistake that a user can make in them.
        """
        Grid.check(adapter.schedule, config.rollout.grid_steps)
        if config.rollout.start == "data":
            data = load_real_data(config, adapter, world)
            return MethodInputs(data.captions, data.latents, data.fingerprint)
        source = config.prompts
        return MethodInputs(read_prompts(source.source, column=source.column, limit=source.limit))

    def make_producer(self, reference: Reference, latents: torch.Tensor | None) -> Producer:
        """Lockstep or continuous rollouts, at an update's start or during the update before it."""
        config, world = self.config, self.world
        # The reference under rollout guidance.
        predictor = GuidedPredictor(
            lambda x, t, cond: self.adapter.predict_level(reference.module, x, t, cond),
            self.table,
            config.rollout.omega,
            config.rollout.branches,
        )
        # The rollout: this rank's share of the samples.
        maker = self._pair_maker(predictor, latents)
        shard = {"batch": config.engine.micro_batch(world.size), "rank": world.rank, "world_size": world.size}
        self.table.reserve(window_rows(config, world.size))
        if config.rollout.mode == "lockstep":
            rollout = LockstepRollout(maker, **shard)
        else:
            groups, compile = config.rollout.pool * config.engine.accumulation, config.engine.compile
            dtype = DTYPES[config.engine.precision]
            graphs = config.engine.graphs
            if self.adapter.boundary is not None:  # which looks at times on the host
                say_without_graphs(world.device, graphs or compile != "off")
                graphs, compile = False, "off"
            capture = capture_of(world.device, graphs, "the rollout's steps", dtype)
            rollout = ContinuousRollout(maker, groups=groups, compile=compile, capture=capture, **shard)
        # The producer: when the rollout runs.
        arguments = rollout, predictor, config.engine.accumulation, lambda: reference.version
        if config.rollout.overlap:
            self.producer = OverlappedProducer(*arguments, device=world.device)
        else:
            self.producer = Producer(*arguments)
        return self.producer

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """As in the base; pairs in flight find their rows of a table on the host."""
        super().load_state_dict(state)
        self.table.prefetch(rows_in_flight(state))

    def _pair_maker(self, predictor: GuidedPredictor, latents: torch.Tensor | None) -> PairMaker:
        """The grid and the keyed draws of the config."""
        config, device = self.config, self.world.device
        grid = Grid.build(
            self.adapter.schedule,
            config.rollout.grid_steps,
            device,
            omega=config.rollout.omega,
            noising=config.rollout.noising,
            s_shift=config.rollout.s_shift,
            levels=self.adapter.trained_levels,
        )
        maker = PairMaker(
            predictor,
            grid,
            config.rollout,
            latent_shape=self.adapter.latent_shape,
            num_prompts=self.table.prompts,
            latents=latents,
            seed=config.seed,
            dropout=config.prompts.dropout,
            shuffled=config.prompts.shuffled,
            device=device,
        )
        if maker.share_without_s:
            say_once(
                f"model.expert: {config.model.expert}: {maker.share_without_s:.0%} of the pairs are of states above "
                "its noise levels; they weigh 0, and the student does not compute them"
            )
        return maker

    def pair_loss(self, predict: Predict, pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
        """Eq. 17, or its pseudo-Huber form."""
        pred = predict(pairs.x_s, pairs.s, self.table.gather(pairs.rows))
        return self.objective(pred, pairs.x_s, pairs.s, pairs.target, pairs.weight)

    @torch.no_grad()
    def inspect(self, predict: Predict, pairs: Pairs) -> dict[str, torch.Tensor]:
        """The fields of the pairs, their losses, and the student's x0 (B, ...) as `student_x0`."""
        pred = predict(pairs.x_s, pairs.s, self.table.gather(pairs.rows))
        k = nn.functional.pad(self.objective.k, (0, 6))  # for the op's x0; its next state is not used
        _, x0 = guided_step(pred, None, pairs.x_s, k, index=pairs.s)
        return super().inspect(lambda *_: pred, pairs) | {"student_x0": x0}

"""The socket for training methods: what a method reads, how its pairs are made, the loss of a pair, and its state.

docs/adding_a_method.md lists the steps.

Shape letters: B pairs of a micro-batch, N prompts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import torch

from selfnpo_fast.config import TrainConfig
from selfnpo_fast.models import Adapter
from selfnpo_fast.models.base import Predict
from selfnpo_fast.models.conditioning import ConditioningTable
from selfnpo_fast.rollout import Pairs, Producer, join_lanes
from selfnpo_fast.runtime.world import World
from selfnpo_fast.training.moving_reference import Reference


@dataclass(frozen=True)
class MethodInputs:
    """What a method trains on."""

    prompts: list[str]
    """N prompts, or the captions of N latents. Repeated prompts are encoded once."""
    latents: torch.Tensor | None = None
    """(N, ...) float32 scaled latents of real data, in host memory or mapped from a file; None without data."""


class Method:
    """How training pairs are made and what the student learns from them.

    The trainer calls four verbs: `read_inputs` before anything is written, `make_producer` once, `pair_loss` for each
    micro-batch, and `state_dict` / `load_state_dict` for a checkpoint. A subclass overrides the first three; its state
    is the producer's unless it says otherwise.
    """

    name: ClassVar[str]
    """What `method` is in a config."""

    def __init__(self, config: TrainConfig, adapter: Adapter, table: ConditioningTable, world: World) -> None:
        self.config, self.adapter, self.table, self.world = config, adapter, table, world
        self.producer: Producer | None = None

    @classmethod
    def read_inputs(cls, config: TrainConfig, adapter: Adapter, world: World) -> MethodInputs:
        """Prompts and data of a run; all ranks take part.

        Raises UserError for every mistake that a user can make in them.
        """
        raise NotImplementedError

    def make_producer(self, reference: Reference, latents: torch.Tensor | None) -> Producer:
        """Who makes the pairs of each update with the reference's network."""
        raise NotImplementedError

    def pair_loss(self, predict: Predict, pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of one micro-batch (a scalar with gradient) and of each pair (B,); `predict` is the student."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All of this rank that the pairs to come depend on, besides the reference."""
        return self.producer.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from `state_dict()`."""
        self.producer.load_state_dict(state)

    def reshard(self, states: list[dict[str, torch.Tensor]], world: World) -> dict[str, torch.Tensor]:
        """This rank's part of the states that another number of ranks have saved."""
        return join_lanes(states, world.rank, world.size)

    @torch.no_grad()
    def inspect(self, predict: Predict, pairs: Pairs) -> dict[str, torch.Tensor]:
        """The fields of the pairs and the loss (B,) of each, for a person who looks at one update."""
        _, loss = self.pair_loss(predict, pairs)
        return {field.name: getattr(pairs, field.name) for field in fields(pairs)} | {"loss": loss}

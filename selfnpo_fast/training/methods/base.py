"""The socket for training methods: a method's inputs, its pairs, the loss of a pair, and its state.

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
    """N prompts, or the captions of N latents; repeated prompts are encoded once."""
    latents: torch.Tensor | None = None
    """(N, ...) float32 scaled latents of real data, in host memory or mapped; None without data."""
    latents_fingerprint: str | None = None
    """The SHA-256 of the latents, by which a resumed run knows them; None without data."""


class Method:
    """How training pairs are made, and what the student learns from them.

    A subclass has a `name` and overrides three methods:

    read_inputs      called once, before anything is written
    make_producer    called once, before the first update
    pair_loss        called for each micro-batch

    The others have defaults. `state_dict`, `load_state_dict` and `reshard` serve checkpoints: they
    save and restore the producer. `inspect` serves `selfnpo train --replay-step`.
    """

    name: ClassVar[str]
    """The value of `method` in a config."""

    def __init__(self, config: TrainConfig, adapter: Adapter, table: ConditioningTable, world: World) -> None:
        self.config, self.adapter, self.table, self.world = config, adapter, table, world
        self.producer: Producer | None = None
        """What `make_producer` has returned."""

    @classmethod
    def read_inputs(cls, config: TrainConfig, adapter: Adapter, world: World) -> MethodInputs:
        """Read the prompts and the data of a run; all ranks take part.

        Raises UserError for every mistake that a user can make in them.
        """
        raise NotImplementedError

    def make_producer(self, reference: Reference, latents: torch.Tensor | None) -> Producer:
        """The producer of each update's pairs, which the method also keeps as `self.producer`.

        reference    its `module` is the network that runs the rollouts
        latents      (N, ...), as `read_inputs` has returned them
        """
        raise NotImplementedError

    def pair_loss(self, predict: Predict, pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of one micro-batch, a scalar with gradient, and the loss of each pair (B,).

        `predict` is the student.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All of this rank that the pairs to come depend on, except for the reference."""
        return self.producer.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from `state_dict()`."""
        self.producer.load_state_dict(state)

    def reshard(self, states: list[dict[str, torch.Tensor]], world: World) -> dict[str, torch.Tensor]:
        """One rank's part of the states that another number of ranks have saved."""
        return join_lanes(states, world.rank, world.size)

    @torch.no_grad()
    def inspect(self, predict: Predict, pairs: Pairs) -> dict[str, torch.Tensor]:
        """The fields of the pairs by name, and the loss (B,) of each, for `--replay-step`."""
        _, loss = self.pair_loss(predict, pairs)
        return {field.name: getattr(pairs, field.name) for field in fields(pairs)} | {"loss": loss}

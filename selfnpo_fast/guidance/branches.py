"""The two branches of guidance: which network computes each branch, and in how many forwards.

Shape letters: B pictures of a batch.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from selfnpo_fast.guidance.lora_backbone import LowRankBackbone, install
from selfnpo_fast.guidance.lora_layers import Rows
from selfnpo_fast.models.base import Adapter, Conditioning
from selfnpo_fast.negatives.load import Negative
from selfnpo_fast.negatives.weights import match_placement
from selfnpo_fast.runtime.compiling import compile_blocks


class Branches:
    """The positive network and the network of the negative branch.

    The negative branch is computed by
    - the positive network, where there is no negative model,
    - the positive network with low-rank updates, where the negative is a LoRA,
    - a second network, where the negative has full weights.

    One network computes both branches as one batch, the negative rows first, or as two batches.
    Two networks run one after the other.
    """

    def __init__(self, adapter: Adapter, positive: nn.Module, negative: Negative | None, compile: str = "off") -> None:
        """`compile` is off, default or max; the caller's positive network is not changed."""
        self.predict, self.positive = adapter.predict, positive
        blocks = adapter.family.repeated_blocks
        self.backbone: LowRankBackbone | None = None
        network = negative.network if negative is not None else None
        deltas = negative.deltas if negative is not None else None
        if isinstance(network, nn.Module):
            match_placement(network, positive)
        if deltas is not None or compile != "off":
            # Layers are changed and compiled in a copy of the module tree, not in the caller's.
            self.positive = _share(positive)
        if deltas is not None:
            self.backbone = install(self.positive, deltas)
        if compile != "off":
            compile_blocks(self.positive, blocks, compile)
            if network is not None:
                network = _share(network)
                compile_blocks(network, blocks, compile)
        self.negative = network

    @property
    def one_network(self) -> bool:
        """Whether one network computes both branches, so that they can be one batch."""
        return self.negative is None

    def _rows(self, choice: Rows) -> AbstractContextManager:
        """The rows that get the low-rank updates within the block, where there are updates."""
        return self.backbone.rows(choice) if self.backbone is not None else nullcontext()

    def single(self, x: torch.Tensor, t: torch.Tensor, rows: Conditioning) -> torch.Tensor:
        """The positive branch's output, in the network's dtype.

        Shapes:
        - x: (B, ...), the states.
        - t: (B,), the timesteps.
        - rows: (B, ...), the prompts' conditioning rows.
        - result: (B, ...).
        """
        return self.predict(self.positive, x, t, rows)

    def both(
        self, x: torch.Tensor, t: torch.Tensor, rows: Conditioning, batched: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(pos, neg)`, the outputs of both branches, as one batch where `batched`.

        Shapes:
        - x: (B, ...), the states.
        - t: (B,), the timesteps.
        - rows: (2 B, ...), the negative branch's conditioning rows, then the prompts'.
        - pos, neg: (B, ...).
        """
        if batched:
            with self._rows(Rows.FIRST_HALF):
                neg, pos = self.predict(self.positive, torch.cat([x, x]), torch.cat([t, t]), rows).chunk(2)
            return pos, neg
        negative_rows, prompts = halves(rows)
        pos = self.single(x, t, prompts)
        if self.negative is not None:
            return pos, self.predict(self.negative, x, t, negative_rows)
        with self._rows(Rows.ALL):
            return pos, self.predict(self.positive, x, t, negative_rows)


def _share(network: nn.Module) -> nn.Module:
    """A copy of the module tree, in evaluation mode, over the tensors of `network` itself.

    Layers of the copy can be changed without changing those of `network`.
    """
    return copy.deepcopy(network, {id(t): t for t in (*network.parameters(), *network.buffers())}).eval()


def halves(rows: Conditioning) -> tuple[Conditioning, Conditioning]:
    """Two views (B, ...) of (2 B, ...) rows: the negative branch's and the prompts'."""
    half = len(next(iter(rows.values()))) // 2
    return {name: value[:half] for name, value in rows.items()}, {name: value[half:] for name, value in rows.items()}

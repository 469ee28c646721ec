"""The two branches of guidance: who answers for the positive and the negative one, and how their forwards are run.

Shape letters: B pictures of a batch.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from selfnpo_fast.guidance.lora_layers import LowRankBackbone, Rows, install
from selfnpo_fast.models.base import Adapter, Conditioning
from selfnpo_fast.negatives.load import Negative
from selfnpo_fast.runtime.compiling import compile_blocks


class Branches:
    """The positive network and what stands against it.

    Without a negative that is the same network, with a low-rank one the same backbone, with full weights another
    network. One network runs both branches as one batch, the negative rows first, or as two; two networks run one after
    the other.
    """

    def __init__(self, adapter: Adapter, positive: nn.Module, negative: Negative | None, compile: str = "off") -> None:
        self.predict, self.positive = adapter.predict, positive
        blocks = adapter.family.repeated_blocks
        self.backbone: LowRankBackbone | None = None
        against = negative.network if negative is not None else None
        deltas = negative.deltas if negative is not None else None
        if isinstance(against, nn.Module):
            like = next(positive.parameters())
            nn.Module.to(against, like.device, like.dtype)  # without ModelMixin's warning
        if deltas is not None or compile != "off":
            # A module tree of our own over the caller's tensors: his network keeps its layers and compiles nothing.
            self.positive = _share(positive)
        if deltas is not None:
            self.backbone = install(self.positive, deltas)
        if compile != "off":
            compile_blocks(self.positive, blocks, compile)
            if against is not None:
                against = _share(against)
                compile_blocks(against, blocks, compile)
        self.against = against

    @property
    def one_network(self) -> bool:
        """Whether both branches can be one batch."""
        return self.against is None

    def _rows(self, choice: Rows) -> AbstractContextManager:
        return self.backbone.rows(choice) if self.backbone is not None else nullcontext()

    def single(self, x: torch.Tensor, t: torch.Tensor, rows: Conditioning) -> torch.Tensor:
        """The positive output (B, ...) at states x (B, ...), timesteps t (B,) and the prompts' rows (B, ...)."""
        return self.predict(self.positive, x, t, rows)

    def both(
        self, x: torch.Tensor, t: torch.Tensor, rows: Conditioning, batched: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(pos, neg)`, (B, ...) each; rows (2 B, ...) are the negative branch's, then the prompts'."""
        if batched:
            with self._rows(Rows.FIRST_HALF):
                neg, pos = self.predict(self.positive, torch.cat([x, x]), torch.cat([t, t]), rows).chunk(2)
            return pos, neg
        against, prompts = halves(rows)
        pos = self.single(x, t, prompts)
        if self.against is not None:
            return pos, self.predict(self.against, x, t, against)
        with self._rows(Rows.ALL):
            return pos, self.predict(self.positive, x, t, against)


def _share(network: nn.Module) -> nn.Module:
    """A copy of the module tree over the very same tensors, in evaluation mode: layers can be changed in it alone."""
    return copy.deepcopy(network, {id(t): t for t in (*network.parameters(), *network.buffers())}).eval()


def halves(rows: Conditioning) -> tuple[Conditioning, Conditioning]:
    """The negative branch's rows and the prompts' of (2 B, ...) rows; views."""
    half = len(next(iter(rows.values()))) // 2
    return {name: value[:half] for name, value in rows.items()}, {name: value[half:] for name, value in rows.items()}

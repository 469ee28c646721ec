"""The text-embedding table: every prompt encoded once, gathered by row on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

EMPTY_ROW = 0


def unique_rows(prompts: Sequence[str]) -> tuple[list[str], list[int]]:
    """The distinct prompts in first-seen order, and for each of `prompts` its index among them.

    Encode the distinct prompts only, then gather the rows of all prompts by their index.
    """
    index_of_prompt: dict[str, int] = {}
    indices = [index_of_prompt.setdefault(prompt, len(index_of_prompt)) for prompt in prompts]
    return list(index_of_prompt), indices


@dataclass(frozen=True)
class ConditioningTable:
    """Named rows (N + 1, ...) of the denoiser's conditioning; row 0 is the empty prompt, row i + 1
    is prompt i."""

    rows: dict[str, torch.Tensor]
    """By the name of the denoiser's argument."""

    @classmethod
    def build(
        cls, empty: dict[str, torch.Tensor], prompts: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32
    ) -> ConditioningTable:
        """Joins the unconditional row (1, ...) and the prompts' rows (N, ...), kept in the
        network's `dtype`."""
        return cls({name: torch.cat([empty[name].to(dtype), prompts[name].to(dtype)]) for name in empty})

    @classmethod
    def encode(cls, adapter, prompts: list[str], device: torch.device, dtype: torch.dtype) -> ConditioningTable:
        """The table of `prompts` (N), by an adapter's text encoders; a repeated prompt is encoded
        once."""
        distinct, index = unique_rows(prompts)
        rows = adapter.encode_prompts(distinct, device)
        if len(distinct) < len(prompts):
            order = torch.tensor(index, device=device)
            rows = {name: value[order] for name, value in rows.items()}
        return cls.build(adapter.encode_empty(device), rows, dtype)

    @property
    def prompts(self) -> int:
        """How many prompts there are, not counting the empty one."""
        return len(next(iter(self.rows.values()))) - 1

    def gather(self, index: torch.Tensor) -> dict[str, torch.Tensor]:
        """Rows (B, ...) at int64 table rows `index` (B,)."""
        return {name: value[index] for name, value in self.rows.items()}

    def empty(self, batch: int) -> dict[str, torch.Tensor]:
        """The unconditional row, `batch` times."""
        return {name: value[:1].expand(batch, *value.shape[1:]) for name, value in self.rows.items()}

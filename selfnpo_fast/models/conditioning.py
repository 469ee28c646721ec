"""What the denoiser is given of prompts: the facts of one prompt's rows, and the table of all rows.

Every prompt is encoded once. A small table lies on the device; of a large one, which stays on the
host, `models.host_table` keeps on the device what the next pairs need.

Shape letters: B samples, N prompts, L the length of a ragged row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from selfnpo_fast.runtime.upload import upload

EMPTY_ROW = 0
Conditioning = dict[str, torch.Tensor]
"""Named tensors with one row per prompt, as the denoiser's keyword arguments."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one prompt's row of one argument is."""

    shape: tuple[int, ...]
    """Its shape; along a ragged axis the largest length that there can be."""
    dtype: torch.dtype | None = None
    """How rows are stored; None for the network's dtype."""
    ragged: int | None = None
    """The axis along which rows have lengths of their own; None where all have `shape`."""
    mask: str | None = None
    """The denoiser's argument that is told which positions of a ragged row are its own: (B, L)
    bool. None where the denoiser needs no mask, and padding with zeros is right."""
    whole: bool = False
    """Whether ragged rows are padded to the largest length that there can be, and not to the longest
    one that there is: without a mask the denoiser sees how many zeros there are."""


def given_shapes(rows: Mapping[str, Row]) -> dict[str, tuple[int, ...]]:
    """The shape of what the denoiser is given of one prompt by name: of rows, and of their masks."""
    shapes = {name: row.shape for name, row in rows.items()}
    masks = {row.mask: (row.shape[row.ragged],) for row in rows.values() if row.mask and row.ragged is not None}
    return shapes | masks


def table_bytes(shapes: Mapping[str, tuple[int, ...]], rows: int, dtype: torch.dtype) -> int:
    """Bytes of a table of that many rows, of `given_shapes`, on the device."""
    return rows * dtype.itemsize * sum(math.prod(shape) for shape in shapes.values())


def padded(name: str, row: Row, values: Sequence[torch.Tensor], length: int) -> Conditioning:
    """Rows of lengths of their own as one tensor (B, ...), padded with zeros to `length` along the
    ragged axis, under `name`; and their mask (B, length) bool, where the denoiser takes one."""
    axis = row.ragged
    assert axis is not None
    shape = (*row.shape[:axis], length, *row.shape[axis + 1 :])
    out = values[0].new_zeros(len(values), *shape)
    mask = torch.zeros(len(values), length, dtype=torch.bool, device=out.device)
    for i, value in enumerate(values):
        out[i].narrow(axis, 0, value.shape[axis]).copy_(value)
        mask[i, : value.shape[axis]] = True
    return {name: out} if row.mask is None else {name: out, row.mask: mask}


def joined(rows: Mapping[str, Row], batches: Sequence[Mapping], *, full: bool) -> Conditioning:
    """Batches of encoded rows as tensors (N, ...); ragged ones are padded to the longest, or with
    `full` and where they are `whole` to the largest length that there can be."""
    out: Conditioning = {}
    for name in batches[0]:
        row = rows.get(name)
        if row is None or row.ragged is None:
            out[name] = torch.cat([batch[name] for batch in batches])
            continue
        values = [value for batch in batches for value in batch[name]]
        longest = max(value.shape[row.ragged] for value in values)
        out |= padded(name, row, values, row.shape[row.ragged] if full or row.whole else longest)
    return out


def unique_rows(prompts: Sequence[str]) -> tuple[list[str], list[int]]:
    """The distinct prompts in first-seen order, and for each of `prompts` its index among them.

    Encode the distinct prompts only, then gather the rows of all prompts by their index.
    """
    index_of_prompt: dict[str, int] = {}
    indices = [index_of_prompt.setdefault(prompt, len(index_of_prompt)) for prompt in prompts]
    return list(index_of_prompt), indices


class ConditioningTable:
    """Named rows (N + 1, ...) of the denoiser's conditioning on the device; row 0 is the empty
    prompt, row i + 1 is prompt i."""

    on_host = False
    """Whether only some rows are on the device, and `prefetch` has to say which."""

    def __init__(self, rows: Conditioning) -> None:
        """`rows` are named after the denoiser's arguments."""
        self.rows = rows

    @classmethod
    def build(cls, empty: Conditioning, prompts: Conditioning, dtype: torch.dtype = torch.float32) -> ConditioningTable:
        """Joins the unconditional row (1, ...) and the prompts' rows (N, ...), kept in the
        network's `dtype`."""
        return cls({name: torch.cat([empty[name].to(dtype), prompts[name].to(dtype)]) for name in empty})

    @classmethod
    @torch.no_grad()
    def encode(
        cls,
        adapter,
        prompts: list[str],
        device: torch.device,
        dtype: torch.dtype,
        encoder_dtype: torch.dtype | None = None,
    ) -> ConditioningTable:
        """The table of `prompts` (N) in the network's `dtype`, by an adapter's text encoders in
        `encoder_dtype` (`models.text.encoder_dtype` of float32 if None).

        A repeated prompt is encoded once, and the encoders are loaded once.
        """
        distinct, index = unique_rows(prompts)
        facts = adapter.conditioning_rows
        with adapter.text_encoders(device, encoder_dtype) as encoders:
            encoders.say_what_is_cut(distinct)
            batches = [stored(rows, facts, dtype) for rows in encoders.stream(distinct)]
        table = joined(facts, batches, full=False)
        if len(distinct) < len(prompts):
            order = torch.tensor([EMPTY_ROW, *(i + 1 for i in index)], device=device)
            table = {name: value[order] for name, value in table.items()}
        return cls(table)

    @property
    def prompts(self) -> int:
        """How many prompts there are, not counting the empty one."""
        return len(next(iter(self.rows.values()))) - 1

    def gather(self, index: torch.Tensor) -> Conditioning:
        """Rows (B, ...) at int64 table rows `index` (B,), which is on the device.

        Of a table on the host these are rows that `prefetch` has been told of.
        """
        return {name: value[index] for name, value in self.rows.items()}

    def empty(self, batch: int) -> Conditioning:
        """The unconditional row, `batch` times."""
        return {name: value[:1].expand(batch, *value.shape[1:]) for name, value in self.rows.items()}

    def fetch(self, index: torch.Tensor) -> Conditioning:
        """Rows (B, ...) on the device at table rows `index` (B,), which is on the host; for what is
        seldom asked."""
        return self.gather(upload(index, next(iter(self.rows.values())).device))

    def reserve(self, rows: int) -> None:
        """Make room on the device for that many rows at once; nothing to do where all are there."""

    def prefetch(self, index: torch.Tensor) -> None:
        """Bring table rows `index` (B,), which is on the host, to the device; nothing to do where
        all are there."""


def stored(rows: Mapping, facts: Mapping[str, Row], dtype: torch.dtype) -> dict:
    """Encoded rows in the dtype in which the table keeps them: the network's `dtype`, or a row's
    own."""

    def cast(name: str, value: torch.Tensor) -> torch.Tensor:
        row = facts.get(name)
        return value.to(dtype if row is None or row.dtype is None else row.dtype)

    return {
        name: [cast(name, part) for part in value] if isinstance(value, list | tuple) else cast(name, value)
        for name, value in rows.items()
    }

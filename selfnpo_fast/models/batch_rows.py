"""The rows of a denoiser's call that belong to some of its samples, by the names of its arguments."""

from __future__ import annotations

from typing import Any

import torch

from selfnpo_fast.models.family import Family
from selfnpo_fast.runtime.errors import UserError


def rows_of(args: tuple, kwargs: dict, family: Family) -> int:
    """The number of rows in a call of the denoiser, which is that of its first argument."""
    return len(args[0] if args else kwargs[family.input_name])


def take_rows(
    value: Any,
    rows: slice | torch.Tensor,
    batch: int,
    name: str,
    family: Family,
    *,
    field: str = "negative",
    mend: str = "use a LoRA as the negative",
) -> Any:
    """The argument `name` of a call on `batch` samples, for those of the samples in `rows`.

    `rows` is a slice, or int64 indices on the device of the call's tensors. Tensors that the family
    says to have one row for each sample are cut, by a slice as views. Tensors of one row, 0-d
    tensors and other values are not. Lists that the family says to have one entry for each sample
    are cut; other lists, and dicts, whose entries are named `name.entry`, are copied, since
    denoisers pop from them.

    Raises UserError that begins with `field` for a tensor of `batch` rows of which it is not known
    whether they are samples; `mend` ends it.
    """

    def part_of(part: Any, named: str) -> Any:
        return take_rows(part, rows, batch, named, family, field=field, mend=mend)

    if isinstance(value, list) and name in family.list_rows:
        if len(value) != batch:
            raise UserError(f"{field}: {name} has {len(value)} entries in a batch of {batch}; give {batch}")
        return value[rows] if isinstance(rows, slice) else [value[i] for i in rows.tolist()]
    if isinstance(value, dict):
        return {key: part_of(part, f"{name}.{key}") for key, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [part_of(part, name) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    if not isinstance(value, torch.Tensor) or value.ndim == 0 or name in family.not_rows:
        return value
    if name == family.input_name or name in family.row_names:
        if len(value) not in (1, batch):
            raise UserError(f"{field}: {name} has {len(value)} rows in a batch of {batch}; give 1 or {batch}")
        return value[rows] if len(value) == batch else value
    if len(value) == batch:
        raise UserError(
            f"{field}: {name} has as many rows as the batch, {batch}, and it is not known whether they belong to the "
            f"samples, which two networks share; {mend}"
        )
    return value

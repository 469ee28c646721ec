"""The conditioning table of many or long prompts: rows on the host, a window of them on the device.

Which prompts the next pairs need is known on the host, since prompts are a keyed permutation of
sample ids. `prefetch` copies their rows through pinned memory into a window on the device, where
`gather` finds them at fixed addresses: compiled and captured steps read what is there when they
run. Nothing waits for the device.

Shape letters: B samples, N prompts, M stored rows, W rows of the window.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from selfnpo_fast.models.conditioning import EMPTY_ROW, Conditioning, ConditioningTable, Row, padded
from selfnpo_fast.runtime.upload import upload

_MISSING = 1
"""The window's row that stands for rows which are not on the device: NaN, so that it shows. The row
before it is the empty prompt's."""
_FIRST = 2
"""The window's first row that changes hands."""


def window_size(rows: int, prompts: int) -> int:
    """Rows of the window that `reserve(rows)` makes for a table of that many prompts."""
    return _FIRST + min(rows, prompts)


@dataclass(frozen=True, kw_only=True)
class HostRows:
    """M rows in host memory or mapped from a file, ragged ones without padding."""

    facts: Mapping[str, Row]
    """What a row is, by name."""
    tensors: Conditioning
    """(M, ...) by name. Of ragged rows all lengths one after the other, with the ragged axis
    first."""
    lengths: dict[str, torch.Tensor]
    """(M,) int64 by name, of ragged rows alone."""

    @functools.cached_property
    def _ends(self) -> dict[str, list[int]]:
        """Where each ragged row ends in its tensor, by name."""
        return {name: value.cumsum(0).tolist() for name, value in self.lengths.items()}

    def __len__(self) -> int:
        """M."""
        name = next(iter(self.tensors))
        return len(self.lengths.get(name, self.tensors[name]))

    def take(self, index: Sequence[int]) -> Conditioning:
        """Copies of the rows (B, ...) at `index`, in host memory; ragged ones are padded to the
        longest of all M rows, or to the largest length where they are `whole`, and have their
        masks."""
        out: Conditioning = {}
        for name, tensor in self.tensors.items():
            if name not in self.lengths:
                out[name] = torch.stack([tensor[i] for i in index])
                continue
            row, ends = self.facts[name], self._ends[name]
            parts = [tensor[ends[i - 1] if i else 0 : ends[i]].movedim(0, row.ragged) for i in index]
            length = row.shape[row.ragged] if row.whole else int(self.lengths[name].max())
            out |= padded(name, row, parts, length)
        return out


class HostTable(ConditioningTable):
    """The rows of N + 1 prompts on the host, W of which are on the device.

    Rows leave the window in the order in which they were last asked for. A rollout reserves enough
    for all pairs that are made or learnt from at one time (`rollout.rows_at_hand`). Until something
    is prefetched, `gather` asks the device for the rows that are wanted, and the host waits.
    """

    on_host = True

    def __init__(self, rows: HostRows, index: Sequence[int], device: torch.device) -> None:
        """A table whose row i + 1 is stored row index[i] of `rows`; stored row 0 is the empty
        prompt's."""
        self.host, self.device = rows, device
        self._stored = [EMPTY_ROW, *index]
        self._place = torch.full((len(self._stored),), _MISSING, device=device)
        self._place[EMPTY_ROW] = EMPTY_ROW
        self._told = False  # whether anybody prefetches
        self._window: OrderedDict[int, int] = OrderedDict()  # place in the window by table row, oldest first
        self._free: list[int] = []
        self.rows: Conditioning = {}
        self.reserve(1)

    @property
    def prompts(self) -> int:
        """N."""
        return len(self._stored) - 1

    @torch.no_grad()
    def reserve(self, rows: int) -> None:
        """A window of that many rows, or of all where there are fewer; what it held is forgotten.

        Steps that were captured before have other addresses.
        """
        size = window_size(rows, self.prompts)
        empty = self.host.take([EMPTY_ROW])
        self.rows = {
            name: upload(value, self.device).expand(size, *value.shape[1:]).clone() for name, value in empty.items()
        }
        for value in self.rows.values():
            if value.is_floating_point():
                value[_MISSING] = torch.nan
        self._place[EMPTY_ROW + 1 :] = _MISSING
        self._window.clear()
        self._free = list(range(size - 1, _FIRST - 1, -1))

    @torch.no_grad()
    def prefetch(self, index: torch.Tensor) -> None:
        """Bring table rows `index` (B,), which is on the host, to the device.

        The copies are work of the present stream. They replace the rows that nobody has asked for
        the longest, never those of `index`.
        """
        self._told = True
        wanted = dict.fromkeys(index.tolist())
        wanted.pop(EMPTY_ROW, None)
        if len(wanted) > len(self._window) + len(self._free):
            raise ValueError(f"{len(wanted)} rows do not fit into a window of {len(self._window) + len(self._free)}")
        for row in wanted:
            if row in self._window:
                self._window.move_to_end(row)
        new = [row for row in wanted if row not in self._window]
        if not new:
            return
        gone = [self._window.popitem(last=False) for _ in range(len(new) - len(self._free))]
        places = [place for _, place in gone]
        places += [self._free.pop() for _ in range(len(new) - len(places))]
        self._window.update(zip(new, places, strict=True))
        # One copy of integers: which table rows have moved, and where they are now.
        moved = torch.tensor([[*(row for row, _ in gone), *new], [*(_MISSING for _ in gone), *places]])
        row, place = upload(moved, self.device)
        self._place.index_copy_(0, row, place)
        target = place[len(gone) :]
        for name, value in self.host.take([self._stored[row] for row in new]).items():
            self.rows[name].index_copy_(0, target, upload(value, self.device))

    def gather(self, index: torch.Tensor) -> Conditioning:
        """Rows (B, ...) at table rows `index` (B,), which were prefetched; others are NaN."""
        if not self._told:
            return self.fetch(index.cpu())
        place = self._place[index]
        return {name: value[place] for name, value in self.rows.items()}

    def fetch(self, index: torch.Tensor) -> Conditioning:
        """Rows (B, ...) on the device at table rows `index` (B,), which is on the host; past the
        window."""
        rows = self.host.take([self._stored[row] for row in index.tolist()])
        return {name: upload(value, self.device) for name, value in rows.items()}

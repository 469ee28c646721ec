"""Lists of parameters that `ema_update` has checked, by all that the check has seen of them.

A training run gives `ema_update` the same tensors at every update. They are checked at the first
one, and a backend keeps here what it has prepared for them. A list with any other address, shape,
stride, dtype or device is another list, so nothing is known of it. Memory that was freed and given
to an equal tensor makes an equal list: what is known of the one holds for the other.
"""

from __future__ import annotations

import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Tensors = Sequence[torch.Tensor]

MAX_BYTES = 32 * 2**20
"""Bytes that all entries may take; the ones that were used least recently go first.

The newest entry is kept whatever it takes. Tables of SDXL's UNet take 20 MB; under ZeRO 3, where
parameters are gathered one by one, an entry takes about 2 KB.
"""
ENTRY_BYTES, TENSOR_BYTES = 1024, 256
"""What an entry takes on the host, about, and of that each of its tensors."""

_DTYPE, _DEVICE = operator.attrgetter("dtype"), operator.attrgetter("device")


@dataclass(eq=False, kw_only=True)
class KnownLists:
    """What is known of lists that were checked."""

    key: tuple
    """Their `signature`."""
    device: torch.device
    """Of all tensors."""
    float64: bool
    """Whether a tensor is float64."""
    nbytes: int
    """Bytes that the entry takes, those of `prepared` included."""
    prepared: Any = None
    """What a backend has prepared for its launches; `ListCache.prepare` sets it."""


def signature(lists: Sequence[Tensors]) -> tuple:
    """All that a check looks at, and the addresses; equal for lists that a launch cannot tell
    apart."""
    tensor = torch.Tensor
    parts: list[tuple] = []
    for tensors in lists:
        parts += (
            tuple(map(tensor.data_ptr, tensors)),
            tuple(map(tensor.size, tensors)),
            tuple(map(tensor.stride, tensors)),
            tuple(map(_DTYPE, tensors)),
            tuple(map(_DEVICE, tensors)),
        )
    return tuple(parts)


class ListCache:
    """The lists that were checked, bounded by the bytes that all entries take."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes, self.nbytes = max_bytes, 0
        # By the hash of the signature, which takes long: a lookup computes it once.
        self._entries: OrderedDict[int, KnownLists] = OrderedDict()
        self._kept: set[KnownLists] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, lists: Sequence[Tensors], check: Callable[[], None]) -> KnownLists:
        """The entry of the lists, of which the first is not empty.

        Where there is none, `check` is called first, which raises for lists that are refused.
        """
        key = signature(lists)
        name = hash(key)
        with self._lock:
            known = self._entries.get(name)
            if known is not None and known.key == key:
                self._entries.move_to_end(name)
                return known
        check()
        tensors = [tensor for each in lists for tensor in each]
        known = KnownLists(
            key=key,
            device=tensors[0].device,
            float64=any(tensor.dtype == torch.float64 for tensor in tensors),
            nbytes=ENTRY_BYTES + TENSOR_BYTES * len(tensors),
        )
        with self._lock:
            self._drop(name)
            self._entries[name] = known
            self.nbytes += known.nbytes
            self._shrink()
        return known

    def prepare(self, known: KnownLists, prepared: Any, nbytes: int) -> None:
        """Keep what a backend has prepared for an entry, `nbytes` in all.

        Where another thread was quicker, what that one has prepared stays.
        """
        with self._lock:
            if known.prepared is not None:
                return
            known.prepared = prepared
            known.nbytes += nbytes
            if self._entries.get(hash(known.key)) is known:
                self.nbytes += nbytes
                self._shrink()

    def keep(self, known: KnownLists) -> None:
        """Never drop an entry again."""
        with self._lock:
            self._kept.add(known)

    def _shrink(self) -> None:
        """Drop the oldest entries while all of them take too much."""
        while self.nbytes > self.max_bytes and len(self._entries) > 1:
            self._drop(next(iter(self._entries)))

    def _drop(self, name: int) -> None:
        """Drop an entry, if there is one of that name."""
        known = self._entries.pop(name, None)
        if known is not None:
            self.nbytes -= known.nbytes


CACHE = ListCache()
"""The lists of this process."""

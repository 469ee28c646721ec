"""Bytes that each op of `bench_ops.py` has to move, and copies of as many bytes: its floor."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Traffic(NamedTuple):
    """Bytes that an op has to move, per element of the latents."""

    read: int
    """Read from its inputs, each counted once."""
    fresh: tuple[int, ...]
    """Written to new tensors, with one entry per tensor."""
    in_place: int = 0
    """Written to existing tensors."""
    again: int = 0
    """Read a second time."""

    @property
    def total(self) -> int:
        """All bytes read and written, per element."""
        return self.read + self.again + sum(self.fresh) + self.in_place


TRAFFIC = {
    "normal": {"fp32": Traffic(0, (4,)), "bf16": Traffic(0, (2,))},
    "affine_noise": {"fp32": Traffic(4, (4,)), "bf16": Traffic(2, (2,))},
    "guided_step": {"fp32": Traffic(12, (4, 4)), "bf16": Traffic(6, (2, 2))},
    "guided_step_single": {"fp32": Traffic(8, (4, 4)), "bf16": Traffic(4, (2, 2))},
    # pos, neg, x and the x0 of two steps before -> x_next, x0.
    "guided_step_unipc": {"fp32": Traffic(20, (4, 4)), "bf16": Traffic(10, (2, 2))},
    # pos and neg are read twice: once for their standard deviations.
    "guidance_rescale": {"fp32": Traffic(12, (4, 4), again=8), "bf16": Traffic(6, (2, 2), again=4)},
    # pos, neg, x -> target, x_s, x. `final` is left out: one slot in 25 reads or writes it.
    "tdft_step": {"fp32": Traffic(12, (4, 4), in_place=4), "bf16": Traffic(8, (4, 4), in_place=4)},
    # Forward: pred, x_s, target -> slope. Backward: slope -> gradient.
    "x0_loss": {"fp32": Traffic(12, (4, 4), again=4), "bf16": Traffic(10, (2, 2), again=2)},
    # master, live -> master, and in bf16 the shadow.
    "ema_update": {"fp32": Traffic(8, (), in_place=4), "bf16": Traffic(6, (), in_place=6)},
}
"""Traffic by op and mixture of dtypes."""


def floor_arm(traffic: Traffic, elements: int, device: torch.device) -> Callable[[], list[torch.Tensor]]:
    """Plain copies that move as many bytes as the op does on `elements` elements of latents.

    As many bytes as in the op go to new tensors, and as many to existing ones. Each new tensor is a
    clone, and each existing one the target of a copy_, as long as the op has reads left for its
    source; after that they are fills. Reads that remain become a copy_ of half as many bytes.
    """

    def words(count: float) -> int:
        """float32 words of `count` bytes per element."""
        return int(count * elements) // 4

    source = torch.ones(words(traffic.read), device=device)
    reads_left, position = traffic.read + traffic.again, 0

    def take(count: float) -> torch.Tensor | None:
        """A part of the source for `count` bytes per element; None where too few reads are left."""
        nonlocal reads_left, position
        if reads_left < count:
            return None
        reads_left -= count
        if position + words(count) > len(source):
            position = 0
        position += words(count)
        return source[position - words(count) : position]

    # The copies are chosen once, in the order in which they use up the reads.
    clones = [(words(count), take(count)) for count in traffic.fresh]
    updates = []
    if traffic.in_place:
        updates.append((torch.zeros(words(traffic.in_place), device=device), take(traffic.in_place)))
    if reads_left:
        updates.append((torch.zeros(words(reads_left / 2), device=device), take(reads_left / 2)))

    def run() -> list[torch.Tensor]:
        out = [torch.empty(n, device=device).fill_(1) if src is None else src.clone() for n, src in clones]
        for target, src in updates:
            if src is None:
                target.fill_(1)
            else:
                target.copy_(src)
        return out

    return run

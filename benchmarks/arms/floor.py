"""What each op of `bench_ops.py` has to move, and the copies that move as much: how fast it could be."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Traffic(NamedTuple):
    """Bytes per element of the latents that an op has to move."""

    read: int
    """Of its inputs, each counted once."""
    fresh: tuple[int, ...]
    """Written, an entry for every tensor that it allocates."""
    in_place: int = 0
    """Written to tensors that exist."""
    again: int = 0
    """Read a second time."""

    @property
    def total(self) -> int:
        return self.read + self.again + sum(self.fresh) + self.in_place


TRAFFIC = {
    "normal": {"fp32": Traffic(0, (4,)), "bf16": Traffic(0, (2,))},
    "affine_noise": {"fp32": Traffic(4, (4,)), "bf16": Traffic(2, (2,))},
    "guided_step": {"fp32": Traffic(12, (4, 4)), "bf16": Traffic(6, (2, 2))},
    "guided_step_single": {"fp32": Traffic(8, (4, 4)), "bf16": Traffic(4, (2, 2))},
    # pos and neg twice: the standard deviations come first.
    "guidance_rescale": {"fp32": Traffic(12, (4, 4), again=8), "bf16": Traffic(6, (2, 2), again=4)},
    # pos, neg, x -> target, x_s and x. Of `final` one slot in 25 is read and one written: left out.
    "tdft_step": {"fp32": Traffic(12, (4, 4), in_place=4), "bf16": Traffic(8, (4, 4), in_place=4)},
    # pred, x_s, target -> slope; backward, slope -> gradient.
    "x0_loss": {"fp32": Traffic(12, (4, 4), again=4), "bf16": Traffic(10, (2, 2), again=2)},
    # master, live -> master; in bf16 the shadow, too.
    "ema_update": {"fp32": Traffic(8, (), in_place=4), "bf16": Traffic(6, (), in_place=6)},
}


def floor_arm(traffic: Traffic, elements: int, device: torch.device) -> Callable[[], list[torch.Tensor]]:
    """Plain copies that move as many bytes as the op, as much of them to fresh and to existing memory.

    A fresh tensor is a clone and one in place a copy_ while the op has reads to pay for it, else a fill; reads that are
    left over become a copy_ of half as many bytes. In float32 words: bytes per element times `elements` in fours.
    """

    def words(count: float) -> int:
        return int(count * elements) // 4

    source = torch.ones(words(traffic.read), device=device)
    left, at = traffic.read + traffic.again, 0

    def take(count: float) -> torch.Tensor | None:
        nonlocal left, at
        if left < count:
            return None
        left -= count
        if at + words(count) > len(source):
            at = 0
        at += words(count)
        return source[at - words(count) : at]

    clones = [(words(count), take(count)) for count in traffic.fresh]
    updates = []
    if traffic.in_place:
        updates.append((torch.zeros(words(traffic.in_place), device=device), take(traffic.in_place)))
    if left:
        updates.append((torch.zeros(words(left / 2), device=device), take(left / 2)))

    def run() -> list[torch.Tensor]:
        out = [torch.empty(n, device=device).fill_(1) if src is None else src.clone() for n, src in clones]
        for kept, src in updates:
            if src is None:
                kept.fill_(1)
            else:
                kept.copy_(src)
        return out

    return run

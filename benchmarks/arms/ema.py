"""The arms of `ema_update` in `bench_ops.py`, on the parameters of a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.arms.ops import Comparison, Op
from benchmarks.nets import NETS
from selfnpo_kernels import ema_update

DECAY = 0.999


class EmaUpdate(Op):
    """`ema_update` against a loop over the parameters of a network.

    The loop has one kernel less than that of diffusers' EMAModel.
    """

    def __init__(self, network: str, dtype: str, device: torch.device) -> None:
        adapter = NETS[network]().adapter
        with torch.device("meta"):  # only the sizes count
            self.sizes = [p.shape for p in adapter.new_denoiser(torch.float32).parameters()]
        super().__init__((sum(size.numel() for size in self.sizes),), dtype, device)

    def build(self) -> None:
        masters = [torch.randn(size, generator=self.generator, device=self.device) for size in self.sizes]
        live = [
            torch.randn(size, generator=self.generator, device=self.device).to(self.torch_dtype) for size in self.sizes
        ]
        shadows = [m.to(self.torch_dtype) for m in masters] if self.torch_dtype != torch.float32 else []
        self.inputs = (masters, live, shadows)

    def ours(self, masters, live, shadows):
        ema_update(masters, live, shadows, DECAY)

    @torch.no_grad()
    def eager(self, masters, live, shadows):
        for i, (master, new) in enumerate(zip(masters, live, strict=True)):
            master.mul_(DECAY).add_(new, alpha=1 - DECAY)
            if shadows:
                shadows[i].copy_(master)

    plain = eager

    def after(self, update: Callable) -> list[torch.Tensor]:
        """Masters and shadows, each as one flat tensor, after an update of copies.

        The copied shadows are zero before the update. In float32 there are none.
        """
        masters, live, shadows = ([t.clone() for t in tensors] for tensors in self.inputs)
        update(masters, live, [t.zero_() for t in shadows])
        return [torch.cat([t.flatten() for t in tensors]) for tensors in (masters, shadows) if tensors]

    def compare(self, name: str, found: list[torch.Tensor]) -> Iterator[Comparison]:
        """Compares masters and shadows with the eager masters, which shadows copy."""
        truth, *_ = self.after(self.eager)
        for what, tensor in zip(("masters", "shadows"), found, strict=False):
            yield Comparison(f"{name}{what}", tensor, truth)

    def check(self) -> Iterator[Comparison]:
        yield from self.compare("", self.after(self.ours))
        yield from self.compare("eager ", self.after(self.eager))

    def check_compiled(self, compiled) -> Iterator[Comparison]:
        """Compares on copies of `inputs`, because the compiled function writes to them."""
        original = self.inputs
        self.inputs = tuple([t.clone() for t in tensors] for tensors in original)
        for shadow in self.inputs[2]:
            shadow.zero_()
        compiled()
        found = [torch.cat([t.flatten() for t in tensors]) for tensors in self.inputs[::2] if tensors]
        self.inputs = original
        yield from self.compare("compiled ", found)

"""Counts the ops that torch dispatches outside of the networks, on tensors of given sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Ops that move, view or make tensors and compute nothing.
LAYOUT = {
    *(
        "alias",
        "as_strided",
        "cat",
        "clone",
        "copy_",
        "detach",
        "empty",
        "empty_like",
        "expand",
        "index",
        "index_copy_",
        "new_empty",
    ),
    *("select", "slice", "split", "stack", "t", "transpose", "unbind", "unsqueeze", "view", "zeros_like", "_to_copy"),
    *("_unsafe_view", "new_empty_strided", "empty_strided", "zero_", "zeros"),
}


class Dispatched(TorchDispatchMode):
    """Counts `namespace.op` of every call that touches a tensor with one of these element counts.

    Calls in the forward of a watched network are left out, and so are all calls while `inside` is
    set. A fused op counts as one call, since its kernel is not seen.
    """

    def __init__(self, sizes: Iterable[int], *networks: torch.nn.Module) -> None:
        super().__init__()
        self.sizes, self.seen, self.inside = set(sizes), Counter(), False
        self.hooks = []
        for network in networks:
            self.hooks += [
                network.register_forward_pre_hook(lambda *_: self.enter()),
                network.register_forward_hook(lambda *_: self.leave()),
            ]

    def enter(self) -> None:
        """Stop counting."""
        self.inside = True

    def leave(self) -> None:
        """Go on counting."""
        self.inside = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        if not self.inside and any(t.numel() in self.sizes for t in tensors):
            self.seen[f"{func.namespace}.{func.overloadpacket.__name__}"] += 1
        return out

    def __exit__(self, *args):
        for hook in self.hooks:
            hook.remove()
        return super().__exit__(*args)

    @property
    def computing(self) -> dict[str, int]:
        """The counted ops, without those that move, view or make tensors."""
        return {name: n for name, n in self.seen.items() if name.partition(".")[2] not in LAYOUT}

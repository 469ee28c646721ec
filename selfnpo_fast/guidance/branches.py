"""The two branches of guidance: which network computes each branch, and in how many forwards.

Shape letters: B pictures of a batch.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from selfnpo_fast.guidance.lora_backbone import LowRankBackbone, install
from selfnpo_fast.guidance.lora_layers import Rows
from selfnpo_fast.models.base import Adapter, Conditioning
from selfnpo_fast.models.size import Size
from selfnpo_fast.negatives.load import Negative
from selfnpo_fast.negatives.weights import match_placement
from selfnpo_fast.runtime.attention import set_attention
from selfnpo_fast.runtime.compiling import compile_blocks
from selfnpo_fast.runtime.errors import UserError


class Branches:
    """The positive network and the network of the negative branch.

    The negative branch is computed by
    - the positive network, where there is no negative model,
    - the positive network with low-rank updates, where the negative is a LoRA,
    - a second network, where the negative has full weights.

    One network computes both branches as one batch, the negative rows first, or as two batches.
    Two networks run one after the other.
    """

    def __init__(
        self,
        adapter: Adapter,
        positive: nn.Module,
        negative: Negative | None,
        compile: str = "off",
        attention: str = "auto",
    ) -> None:
        """`compile` is off, default or max, `attention` one of `runtime.attention.ATTENTION`; the
        caller's networks are not changed."""
        self.predict, self.positive = adapter.predict, positive
        blocks = adapter.family.repeated_blocks
        self.backbone: LowRankBackbone | None = None
        network = negative.network if negative is not None else None
        deltas = negative.deltas if negative is not None else None
        if isinstance(network, nn.Module):
            match_placement(network, positive)
        self.given_network = network if isinstance(network, nn.Module) else None
        """The negative's network as it was given, of which `negative` may be a copy."""
        copied = compile != "off" or attention != "auto"
        if deltas is not None or copied:
            # Layers are changed and compiled in a copy of the module tree, not in the caller's.
            self.positive = _share(positive, f"pipe: its {adapter.family.denoiser_name}")
        if deltas is not None:
            self.backbone = install(self.positive, deltas)
        if copied and network is not None:
            network = _share(network, "negative: its network")
        for part in (self.positive, *([] if network is None else [network])):
            set_attention(part, attention, field="attention")
            compile_blocks(part, blocks, compile)
        self.negative = network

    @property
    def one_network(self) -> bool:
        """Whether one network computes both branches, so that they can be one batch."""
        return self.negative is None

    def addresses(self) -> tuple[int, ...]:
        """Where the tensors of both networks are in memory: captured steps read them there.

        A network that is moved away and back is somewhere else.
        """
        networks = [network for network in (self.positive, self.negative) if network is not None]
        named = [pair for network in networks for pair in (*network.named_parameters(), *network.named_buffers())]
        return tuple(tensor.data_ptr() for _, tensor in named if type(tensor.data) is torch.Tensor)

    def _rows(self, choice: Rows) -> AbstractContextManager:
        """The rows that get the low-rank updates within the block, where there are updates."""
        return self.backbone.rows(choice) if self.backbone is not None else nullcontext()

    def single(self, x: torch.Tensor, t: torch.Tensor, rows: Conditioning, size: Size | None = None) -> torch.Tensor:
        """The positive branch's output, in the network's dtype; `size` is that of the states, by
        default the adapter's.

        Shapes:
        - x: (B, ...), the states.
        - t: (B,), the timesteps.
        - rows: (B, ...), the prompts' conditioning rows.
        - result: (B, ...).
        """
        return self.predict(self.positive, x, t, rows, size)

    def both(
        self, x: torch.Tensor, t: torch.Tensor, rows: Conditioning, batched: bool, size: Size | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(pos, neg)`, the outputs of both branches, as one batch where `batched`; `size` is that of
        `single`.

        Shapes:
        - x: (B, ...), the states.
        - t: (B,), the timesteps.
        - rows: (2 B, ...), the negative branch's conditioning rows, then the prompts'.
        - pos, neg: (B, ...).
        """
        if batched:
            with self._rows(Rows.FIRST_HALF):
                neg, pos = self.predict(self.positive, torch.cat([x, x]), torch.cat([t, t]), rows, size).chunk(2)
            return pos, neg
        negative_rows, prompts = halves(rows)
        pos = self.single(x, t, prompts, size)
        if self.negative is not None:
            return pos, self.predict(self.negative, x, t, negative_rows, size)
        with self._rows(Rows.ALL):
            return pos, self.predict(self.positive, x, t, negative_rows, size)


def _share(network: nn.Module, what: str) -> nn.Module:
    """A copy of the module tree, in evaluation mode, over the tensors of `network` itself.

    Layers of the copy can be changed without changing those of `network`.

    Raises UserError, which names `what`, where a function that was put on a module reaches back
    into `network`: the copy would compute with the layers of the original.
    """
    modules = set(network.modules())
    for path, module in network.named_modules():
        for name, function in _functions_on(module):
            owner = getattr(function, "__self__", None)
            if (name == "forward" and owner is not module) or _closes_over(function, modules):
                raise UserError(
                    f"{what} has another {name} at {path or 'its top'} than its class, which would call the layers "
                    "without the negative or the compiled blocks; undo that patch, or use attach_negative"
                )
    shared = {id(t): t for t in (*network.parameters(), *network.buffers())}
    # bitsandbytes' 8-bit layers hold on to their weights here, too.
    states = (vars(module).get("state") for module in modules if type(module).__module__.startswith("bitsandbytes"))
    return copy.deepcopy(network, shared | {id(state): state for state in states if state is not None}).eval()


def _functions_on(module: nn.Module) -> Iterator[tuple[str, Callable]]:
    """(attribute, function) of functions that were put on an instance, and of its hooks."""
    for name, value in vars(module).items():
        if name in ("_forward_hooks", "_forward_pre_hooks"):
            yield from ((name.strip("_"), hook) for hook in value.values())
        elif name == "forward" or isinstance(value, types.FunctionType | types.MethodType | functools.partial):
            yield name, value


def _closes_over(function: object, modules: set[nn.Module]) -> bool:
    """Whether a function holds one of the modules in its closure, which a deep copy does not
    follow."""
    while isinstance(function, functools.partial):
        function = function.func
    cells = getattr(getattr(function, "__func__", function), "__closure__", None) or ()
    return any(_content(cell) in modules for cell in cells)


def _content(cell: types.CellType) -> nn.Module | None:
    """The module in a cell of a closure; None where it is empty or holds something else."""
    try:
        content = cell.cell_contents
    except ValueError:  # empty as yet
        return None
    return content if isinstance(content, nn.Module) else None


def halves(rows: Conditioning) -> tuple[Conditioning, Conditioning]:
    """Two views (B, ...) of (2 B, ...) rows: the negative branch's and the prompts'."""
    half = len(next(iter(rows.values()))) // 2
    return {name: value[:half] for name, value in rows.items()}, {name: value[half:] for name, value in rows.items()}


def rows_of_part(rows: Conditioning, part: slice) -> Conditioning:
    """The rows of some pictures; a single row is that of all pictures."""
    return {name: value if len(value) == 1 else value[part] for name, value in rows.items()}


def joined(negative_rows: Conditioning, prompts: Conditioning, batch: int, dtype: torch.dtype) -> Conditioning:
    """(2 B, ...) rows, numbers in the network's dtype and masks as they are: the negative branch's,
    then the prompts'.

    Both are (B, ...) or (1, ...), where B is `batch`.
    """
    pairs = {name: (negative_rows[name], prompts[name]) for name in prompts}
    return {
        name: torch.cat([_in_dtype(value, dtype).expand(batch, *value.shape[1:]) for value in pair])
        for name, pair in pairs.items()
    }


def _in_dtype(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return value.to(dtype) if value.is_floating_point() else value

"""Layers that add a low-rank update to the rows of the negative branch.

A layer computes y = W x + b, and y + scale up (down x) for the chosen rows. So one network computes
both branches as one batch. Each thread chooses its rows, and no adapter is ever switched.
"""

from __future__ import annotations

import enum
import threading
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import nn

from selfnpo_fast.runtime.dtypes import not_below_16_bits
from selfnpo_fast.runtime.errors import UserError


class Rows(enum.Enum):
    """Which rows, along dimension 0, get the low-rank update."""

    NONE = enum.auto()
    ALL = enum.auto()
    FIRST_HALF = enum.auto()
    LAST_HALF = enum.auto()


class RowChoice(threading.local):
    """The choice of rows that all layers of one backbone read: one for each thread, NONE at first.

    torch.compile guards on the attribute `rows`, which gives one graph for each choice. It cannot
    trace a ContextVar. It would not guard on a class attribute that an attribute of a thread hides
    later.
    """

    def __init__(self) -> None:
        self.rows = Rows.NONE

    def span(self, batch: int) -> slice | None:
        """Which of `batch` rows get the update; None for no row.

        Raises UserError where half of them are to get it, and there is no half: one row that serves
        both branches would lose it.
        """
        if self.rows is Rows.NONE:  # dynamo (2.13) guards on `is`, but not on a look-up in a dict
            return None
        if self.rows is Rows.ALL:
            return slice(0, batch)
        if batch % 2:
            raise UserError(
                f"negative: a layer that the LoRA changes was given {batch} rows for both branches, so its part would "
                "be lost there; give each row of the batch its own"
            )
        return slice(0, batch // 2) if self.rows is Rows.FIRST_HALF else slice(batch // 2, batch)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Called by copy and pickle. Raises UserError: a copy would have its update, but no hooks."""
        raise UserError(NO_COPY)


NO_COPY = (
    "pipe: a negative is attached to it, and cannot be copied or pickled with it; call detach_negative(pipe) first, "
    "and attach the negative to the copy"
)
"""The error of whatever holds an attached negative, when that is copied or pickled."""


_PLAIN = RowChoice()
"""The choice of layers that `install` has not changed, which stays NONE.

PEFT makes the convolutions of an adapter instances of the class of the layer under the adapter.
"""


class Factors(nn.Module):
    """A layer's low-rank update, the child `low_rank` of the layer, with which it moves.

    A cast for storage does not reach the factors, as diffusers keeps PEFT's factors out of its
    layerwise casting: they are small, and float8 turns most of a trained update into zeros. The
    factors are buffers that are not in the state dict.
    """

    down: torch.Tensor
    """(r, in) of a Linear, (r, in, h, w) of a Conv2d, whose stride, padding and dilation it gets.
    """
    up: torch.Tensor
    """(out, r) of a Linear, (out, r, 1, 1) of a Conv2d, times the update's scale."""

    def __init__(self, down: torch.Tensor, up: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)

    @property
    def nbytes(self) -> int:
        """The bytes of both factors."""
        return self.down.nbytes + self.up.nbytes

    def _apply(self, fn, recurse: bool = True) -> Factors:
        """Apply `fn`, such as a move to a device or a cast, but for casts to less than 16 bits."""
        super()._apply(not_below_16_bits(fn), recurse)
        return self


def _keep_precision(layer: nn.Module, cast_to: Any, *args: Any, **kwargs: Any) -> None:
    """`layer.to(...)`, which `cast_to` is, with factors that move and keep their dtypes.

    It is what layerwise casting calls before and after each forward of a layer. A network's own
    `to`, which casts the factors with the weights, does not call that of its layers.
    """
    factors: Factors | None = layer._modules.get("low_rank")  # type: ignore[assignment]
    if factors is None:
        cast_to(*args, **kwargs)
        return
    down, up = factors.down, factors.up
    cast_to(*args, **kwargs)
    if factors.down.dtype != down.dtype:
        factors.down, factors.up = down.to(factors.down.device), up.to(factors.up.device)


# A hook that wraps a layer's forward keeps the function of the class that the layer had then, also
# after the negative has left. So each forward below computes the plain layer too, names the plain
# class instead of super(), and finds out from the layer itself whether there is an update.


def _add_to_rows(layer: nn.Linear, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The output (B, ..., out) of a plain Linear at x (B, ..., in), with its update in the chosen
    rows."""
    rows = getattr(layer, "choice", _PLAIN).span(len(x))
    if rows is None:
        return out
    factors: Factors = layer.low_rank  # type: ignore[assignment]
    low = F.linear(x[rows], factors.down.to(x.dtype))
    # addmm_ adds the product in place, without another pass over the rows. Under autocast the
    # dtypes of output and factor differ.
    up = factors.up.to(out.dtype)
    out[rows].view(-1, len(up)).addmm_(low.reshape(-1, up.shape[1]).to(out.dtype), up.t())
    return out


class LowRankLinear(nn.Linear):
    """A Linear that `install` has given a low-rank update; its weight, bias, name and hooks stay."""

    choice: RowChoice = _PLAIN
    low_rank: Factors

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, ..., in) to (B, ..., out), in the layer's dtype."""
        return _add_to_rows(self, x, nn.Linear.forward(self, x))

    def to(self, *args: Any, **kwargs: Any) -> LowRankLinear:
        """Move or cast this layer alone; the update keeps its precision."""
        _keep_precision(self, super().to, *args, **kwargs)
        return self


class LowRankConv2d(nn.Conv2d):
    """A Conv2d that `install` has given a low-rank update, in the way of LowRankLinear."""

    choice: RowChoice = _PLAIN
    low_rank: Factors

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in, H, W) to (B, out, H', W'), in the layer's dtype."""
        out = nn.Conv2d.forward(self, x)
        rows = getattr(self, "choice", _PLAIN).span(len(x))
        if rows is None:
            return out
        low = self._conv_forward(x[rows], self.low_rank.down.to(x.dtype), None)
        out[rows] += F.conv2d(low, self.low_rank.up.to(low.dtype))
        return out

    def to(self, *args: Any, **kwargs: Any) -> LowRankConv2d:
        """Move or cast this layer alone; the update keeps its precision."""
        _keep_precision(self, super().to, *args, **kwargs)
        return self


def low_rank_class(plain: type[nn.Linear]) -> type[nn.Linear]:
    """A class like LowRankLinear over a library's kind of quantised Linear, whose product it keeps."""

    class LowRankQuantised(plain):  # type: ignore[misc, valid-type]
        choice: RowChoice = _PLAIN
        low_rank: Factors

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """(B, ..., in) to (B, ..., out), in the input's dtype."""
            return _add_to_rows(self, x, plain.forward(self, x))

        def to(self, *args: Any, **kwargs: Any) -> LowRankQuantised:
            """Move or cast this layer alone; the update keeps its precision."""
            _keep_precision(self, super().to, *args, **kwargs)
            return self

    return LowRankQuantised

"""A negative with full weights: two networks share the rows or the calls of both branches."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
from torch import nn

from selfnpo_fast.guidance.following import Follows
from selfnpo_fast.models import Family
from selfnpo_fast.models.batch_rows import rows_of, take_rows
from selfnpo_fast.models.call_rules import Branch
from selfnpo_fast.negatives.weights import match_placement
from selfnpo_fast.runtime.dtypes import not_below_16_bits
from selfnpo_fast.runtime.errors import UserError


def join_rows(first: Any, second: Any) -> Any:
    """One output from a denoiser's outputs for two halves: tuples, or diffusers' output objects, of
    tensors or of lists with one tensor for each sample."""
    if isinstance(first, tuple):
        return tuple(_joined(one, other) for one, other in zip(first, second, strict=True))
    return type(first)(sample=_joined(first.sample, second.sample))


def _joined(first: Any, second: Any) -> Any:
    return [*first, *second] if isinstance(first, list) else torch.cat([first, second])


def _first_tensor(value: Any) -> torch.Tensor:
    """The first tensor of a network's input or output."""
    while not isinstance(value, torch.Tensor):
        value = value[0]
    return value


class Follower(nn.Module):
    """A child of the denoiser; when the denoiser is moved, the child moves another network with it.

    The child registers neither parameters nor modules, so state dicts, parameter counts and
    `save_pretrained` do not see the negative. `to`, `half` and accelerate's offload all call
    `_apply`, which moves the negative too.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._held = (network,)  # a tuple, since nn.Module registers an attribute that is a module

    def _apply(self, fn, recurse: bool = True) -> Follower:
        """Apply `fn`, such as a move or a cast, to the other network, but for casts to 8 bits."""
        self._held[0]._apply(not_below_16_bits(fn), recurse)
        return self


_CHILD = "negative_follower"
"""The name of the denoiser's child."""


class TwoNetworks:
    """The denoiser computes the positive rows, `network` computes the negative rows."""

    def __init__(self, denoiser: nn.Module, network: nn.Module, family: Family) -> None:
        """Adds a `Follower` to the denoiser.

        `network` is brought to the denoiser's device and dtypes, and is put into evaluation mode,
        without gradients. Raises UserError where both are one network; nothing is changed then.
        """
        if network is denoiser:
            raise UserError("negative: it is the pipeline's own denoiser; give a network of its own")
        match_placement(network.requires_grad_(False).eval(), denoiser)
        self._names = list(inspect.signature(type(denoiser).forward).parameters)[1:]
        self._denoiser, self._network, self._family = denoiser, network, family
        self._shared, self._follows = family.shared_parts(denoiser, network), Follows(denoiser, network)
        self._pending = threading.local()
        denoiser.add_module(_CHILD, Follower(network))

    def __str__(self) -> str:
        size = sum(p.nbytes for p in self._network.parameters()) / 2**20
        return f"full weights, {size:.1f} MiB: a second network computes the negative rows"

    def reset(self) -> None:
        """Forget the negative rows of a call in this thread."""
        self._pending.call = None

    def begin(self, args: tuple, kwargs: dict, branch: Branch) -> tuple[tuple, dict] | None:
        """(args, kwargs) of the positive rows of a call with negative rows, where it has any.

        Keeps those of the negative rows for `end`.
        """
        if not branch.is_half:
            self._pending.call = args, kwargs, branch
            return None
        batch = rows_of(args, kwargs, self._family)
        first, last = slice(0, batch // 2), slice(batch // 2, batch)
        negative, positive = (first, last) if branch is Branch.FIRST_HALF else (last, first)
        self._pending.call = *self._part(args, kwargs, negative, batch), branch
        return self._part(args, kwargs, positive, batch)

    def _part(self, args: tuple, kwargs: dict, rows: slice, batch: int) -> tuple[tuple, dict]:
        """(args, kwargs) of some rows of a call."""
        names = [*self._names, *(f"argument {i + 1}" for i in range(len(self._names), len(args)))]
        named = zip(args, names, strict=False)
        return (
            tuple(take_rows(value, rows, batch, name, self._family) for value, name in named),
            {name: take_rows(value, rows, batch, name, self._family) for name, value in kwargs.items()},
        )

    def end(self, output: Any) -> Any:
        """The output of a call, from the denoiser's output for the positive rows.

        Returns None where `begin` was not called. Raises UserError where the networks are on
        different devices.
        """
        call = getattr(self._pending, "call", None)
        self.reset()
        if call is None:
            return None
        args, kwargs, branch = call
        self._check_device(_first_tensor(output).device)
        negative = self.compute(args, kwargs)
        if branch is Branch.NEGATIVE:
            return negative
        return join_rows(negative, output) if branch is Branch.FIRST_HALF else join_rows(output, negative)

    def compute(self, args: tuple, kwargs: dict) -> Any:
        """The negative's output for a call that has negative rows only.

        Raises UserError where a tensor of the call is on another device than the negative.
        """
        given = _first_tensor(args[0] if args else kwargs[self._family.input_name])
        self._check_device(given.device)
        self._shared.follow()
        self._follows.follow()
        return self._network(*args, **kwargs)

    def _check_device(self, device: torch.device) -> None:
        """Raise UserError where the denoiser computes on another device."""
        network_device = next(self._network.parameters()).device
        if network_device != device:
            raise UserError(
                f"negative: it is on {network_device}, the denoiser computes on {device}: offload layer by layer does "
                "not take it along; use enable_model_cpu_offload(), or a LoRA as the negative"
            )

    def check(self) -> None:
        """Called at the start of a pipeline's call: say what acts on the positive only."""
        self._follows.say_unfollowed()

    def remove(self) -> None:
        """Remove the `Follower`, undo what the network has borrowed from the denoiser, and let the
        network go."""
        self._shared.restore()
        self._follows.restore()
        delattr(self._denoiser, _CHILD)
        del self._shared, self._follows, self._network

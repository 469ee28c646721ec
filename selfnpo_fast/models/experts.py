"""The two denoisers of a model as one network: each predicts at its own noise levels.

Shape letter: B samples.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from selfnpo_fast.models.batch_rows import take_rows
from selfnpo_fast.models.family import Family
from selfnpo_fast.runtime.upload import upload

NAMES = ("high", "low")
"""What configs call the denoiser of high noise levels and that of low ones."""


class Experts(nn.Module):
    """Two denoisers of one config, whose children have the names of the pipeline's attributes.

    A sample at a time of at least `boundary` is the first one's, any other the second's. A batch on
    one side of the boundary is one call. Of any other each denoiser is called with its own samples,
    and the outputs are put back in order. The host has to know the times for that: on a GPU it waits
    for them once in each forward.
    """

    trained: tuple[str, ...] | None = None
    """The names of the denoisers that are trained; None of a network that is not trained."""

    def __init__(self, networks: Mapping[str, nn.Module], boundary: float, family: Family) -> None:
        """The denoisers by name, that of high noise first; `boundary` is a time as they are given
        it."""
        super().__init__()
        for name, network in networks.items():
            self.add_module(name, network)
        self.names, self.boundary, self.family = tuple(networks), boundary, family
        self._arguments = list(inspect.signature(type(self.first).forward).parameters)[1:]

    @property
    def first(self) -> Any:
        """The denoiser of high noise levels; what both have in common is read off it."""
        return self._modules[self.names[0]]

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The denoisers by name."""
        return {name: self.get_submodule(name) for name in self.names}

    def train_only(self, names: Iterable[str]) -> None:
        """From now on the denoisers of these names are trained, and the others are frozen."""
        self.trained = tuple(names)
        for name, network in self.networks.items():
            if name not in self.trained:
                network.requires_grad_(False)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        """The outputs (B, ...) of a call with `return_dict=False`.

        While gradients are recorded for training,
        - samples of a denoiser that is not trained give zeros: no gradient comes of them, and a
          pair that has one weighs 0;
        - a trained denoiser without a sample of its own is called with one, whose output is dropped,
          so that every rank has gradients of the same weights, in the same order.
        """
        given = dict(zip(self._arguments, args, strict=False)) | kwargs
        batch = len(given[self.family.input_name])
        sides = self._sides(given[self.family.time_name], batch)
        trained = self.trained if torch.is_grad_enabled() else None
        rows = {name: [i for i, side in enumerate(sides) if side == at] for at, name in enumerate(self.names)}
        for name in self.names:
            if len(rows[name]) == batch and (trained is None or trained == (name,)):
                return self.get_submodule(name)(*args, **kwargs)
        outputs: dict[str, tuple[torch.Tensor, ...]] = {}
        for name in self.names:
            if rows[name] if trained is None else name in trained:
                outputs[name] = self._part(name, args, kwargs, rows[name], batch)
        like = next(iter(outputs.values()))
        for name in self.names:
            if name not in outputs:
                outputs[name] = tuple(part.new_zeros(len(rows[name]), *part.shape[1:]) for part in like)
        order = torch.tensor([i for name in self.names for i in rows[name]]).argsort()
        place = upload(order, like[0].device)
        return tuple(torch.cat(parts)[place] for parts in zip(*(outputs[name] for name in self.names), strict=True))

    def _sides(self, times: torch.Tensor, batch: int) -> list[int]:
        """0 for each sample of the first denoiser, and 1 for each of the second; times without
        numbers, as in a trace, are those of one that is trained."""
        if times.is_meta or isinstance(times, FakeTensor):
            return [0 if self.trained is None else self.names.index(self.trained[0])] * batch
        return (times < self.boundary).long().expand(batch).tolist()

    def _part(self, name: str, args: tuple, kwargs: dict, rows: list[int], batch: int) -> tuple[torch.Tensor, ...]:
        """A denoiser's outputs for some of a call's samples; where there are none, of no rows, by a
        call with the first sample."""
        mend = f"name it in row_names or not_rows of {type(self.family).__name__}"
        first = args[0] if args else kwargs[self.family.input_name]
        index = upload(torch.tensor(rows or [0]), first.device)

        def cut(key: str, value: Any) -> Any:
            return take_rows(value, index, batch, key, self.family, field="model.path", mend=mend)

        own = (cut(key, value) for key, value in zip(self._arguments, args, strict=False))
        named = {key: cut(key, value) for key, value in kwargs.items()}
        return tuple(out[: len(rows)] for out in self.get_submodule(name)(*own, **named))

    # What is asked of a denoiser of diffusers.

    @property
    def config(self) -> Any:
        """The config of both."""
        return self.first.config

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of both, as diffusers says it."""
        return self.first.dtype

    @property
    def _keep_in_fp32_modules(self) -> Any:
        return getattr(self.first, "_keep_in_fp32_modules", None)

    @property
    def _skip_layerwise_casting_patterns(self) -> Any:
        return getattr(self.first, "_skip_layerwise_casting_patterns", None)

    @property
    def _repeated_blocks(self) -> Any:
        return getattr(self.first, "_repeated_blocks", None)

    @property
    def _no_split_modules(self) -> Any:
        return getattr(self.first, "_no_split_modules", None)


def networks_of(denoiser: nn.Module) -> dict[str, nn.Module]:
    """The denoisers by the prefix of their weights' names: one with an empty one, or two experts."""
    if not isinstance(denoiser, Experts):
        return {"": denoiser}
    return {f"{name}.": network for name, network in denoiser.networks.items()}


def new_like(denoiser: nn.Module) -> nn.Module:
    """A network of the class and the config of a denoiser, with random weights."""
    if isinstance(denoiser, Experts):
        networks = {name: new_like(network) for name, network in denoiser.networks.items()}
        return Experts(networks, denoiser.boundary, denoiser.family)
    return type(denoiser).from_config(denoiser.config)  # type: ignore[attr-defined]


def trained_networks(denoiser: nn.Module) -> list[nn.Module]:
    """The denoisers that are trained: itself, or those of the experts that `train_only` has named."""
    if not isinstance(denoiser, Experts):
        return [denoiser]
    return [denoiser.get_submodule(name) for name in denoiser.trained or denoiser.names]

"""Low-rank training: one network whose layers take their low-rank weights as an argument of the call.

    network(x, t, ...)                          with the live weights: the student
    network(x, t, ..., low_rank=LoraWeights.AVERAGE)   with their moving average: the reference
    network(x, t, ..., low_rank=LoraWeights.OFF)       with none: the base

No adapter is ever switched, which would be module state: a rollout in one thread and a backward pass in another may run
through the same layers at once. PEFT makes the layers and knows their names and files; their forward is ours.
(Inference has layers of its own, `guidance/lora_layers.py`: nothing is trained there, and rows of a batch choose.)
"""

from __future__ import annotations

import copy
import enum
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from peft import LoraConfig as PeftConfig
from peft.tuners.lora import layer as peft_layers
from torch import nn
from torch.utils.checkpoint import checkpoint

from selfnpo_fast.config import LoraConfig
from selfnpo_fast.models import Family
from selfnpo_fast.runtime.errors import UserError

LIVE, AVERAGE = "default", "average"
"""PEFT's names of the two sets of weights that a layer holds; the first is PEFT's own default."""


class LoraWeights(enum.Enum):
    """The low-rank weights of one call."""

    OFF = enum.auto()
    LIVE = enum.auto()
    AVERAGE = enum.auto()


class LoraCall(threading.local):
    """What the layers of one network read while a call runs; each thread has its own."""

    def __init__(self) -> None:
        self.weights = LoraWeights.LIVE

    def checkpointing(self, block: nn.Module, *args):
        """Gradient checkpointing as diffusers has it, with the call's weights carried into the recomputation.

        On a GPU autograd recomputes in a thread of its own, which knows nothing of the call.
        """
        contexts = nullcontext(), _CallWeights(self)
        return checkpoint(block.__call__, *args, use_reentrant=False, context_fn=lambda: contexts)


class _CallWeights(AbstractContextManager):
    """Within it the weights of the call are what they were when it was made, in whichever thread."""

    def __init__(self, call: LoraCall) -> None:
        self.call, self.weights = call, call.weights

    def __enter__(self) -> None:
        self.before, self.call.weights = self.call.weights, self.weights

    def __exit__(self, *error) -> None:
        self.call.weights = self.before


class _LowRank:
    """The forward of the layers that PEFT has made: y = W x + b + scale B A x with the call's A and B."""

    call: LoraCall

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, ...) to (B, ...) as the layer below does, in its dtype."""
        out, weights = self.base_layer(x), self.call.weights
        if weights is LoraWeights.OFF:  # compared with `is`: torch.compile guards on that
            return out
        name = AVERAGE if weights is LoraWeights.AVERAGE else LIVE
        down, up = self.lora_A[name], self.lora_B[name]
        return self._plus(out, down(x.to(down.weight.dtype)), up, self.scaling[LIVE])


class LoraLinear(_LowRank, peft_layers.Linear):
    """A Linear with low-rank weights; rows (B, ..., in)."""

    @staticmethod
    def _plus(out: torch.Tensor, low: torch.Tensor, up: nn.Linear, scale: float) -> torch.Tensor:
        rows = out.reshape(-1, out.shape[-1])
        # The product is added where it is made: no pass over the rows of its own.
        return torch.addmm(rows, low.reshape(-1, low.shape[-1]).to(out.dtype), up.weight.t(), alpha=scale).view_as(out)


class LoraConv2d(_LowRank, peft_layers.Conv2d):
    """A Conv2d with low-rank weights; A has the layer's kernel and stride, B is 1x1."""

    @staticmethod
    def _plus(out: torch.Tensor, low: torch.Tensor, up: nn.Conv2d, scale: float) -> torch.Tensor:
        return torch.add(out, up(low).to(out.dtype), alpha=scale)


_OURS = {peft_layers.Linear: LoraLinear, peft_layers.Conv2d: LoraConv2d}


def add_lora(denoiser: nn.Module, config: LoraConfig, seed: int) -> None:
    """Freeze a diffusers denoiser and give its target layers low-rank weights that start as nothing (B = 0).

    From then on the denoiser takes `low_rank` (a `Weights`, LIVE by default) besides its own arguments. UserError where
    `lora.targets` match no layer, or one that cannot have such weights.
    """
    denoiser.requires_grad_(False)
    peft_config = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha if config.alpha is not None else config.rank,
        target_modules=config.targets,
        init_lora_weights="gaussian",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            denoiser.add_adapter(peft_config, adapter_name=LIVE)
        except ValueError as error:
            raise UserError(f"lora.targets: {config.targets} match no layer of the model: {error}") from error
    call = LoraCall()
    for name, layer in list(_layers(denoiser)):
        if type(layer) not in _OURS or getattr(layer.base_layer, "groups", 1) != 1:
            kind = type(layer.base_layer).__name__
            raise UserError(f"lora.targets: {name} is a {kind}; expected Linear layers and ungrouped Conv2d ones")
        # The class is swapped in place, as torch's own parametrizations do: PEFT goes on to know the layer as its own.
        layer.__class__, layer.call = _OURS[type(layer)], call
    _take_argument(denoiser, call)


def _layers(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers that PEFT has changed, by name."""
    return ((name, part) for name, part in denoiser.named_modules() if isinstance(part, peft_layers.LoraLayer))


def _take_argument(denoiser: nn.Module, call: LoraCall) -> None:
    """Let the denoiser's calls choose: hooks take the argument off and tell the layers of this thread."""

    def begin(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        call.weights = kwargs.get("low_rank", LoraWeights.LIVE)
        return args, {name: value for name, value in kwargs.items() if name != "low_rank"}

    def end(module: nn.Module, args: tuple, output) -> None:
        call.weights = LoraWeights.LIVE

    denoiser.register_forward_pre_hook(begin, with_kwargs=True)
    denoiser.register_forward_hook(end, always_call=True)


def add_average(denoiser: nn.Module) -> dict[str, nn.Parameter]:
    """Give the low-rank layers a second set of weights, equal to the live ones and not trained.

    Returns them by the names of the live parameters that they follow.
    """
    for _, layer in _layers(denoiser):
        for sides in (layer.lora_A, layer.lora_B):
            sides[AVERAGE] = copy.deepcopy(sides[LIVE]).requires_grad_(False)
    parameters = dict(denoiser.named_parameters())
    live = [name for name, parameter in parameters.items() if parameter.requires_grad]
    return {name: parameters[name.replace(f".{LIVE}.", f".{AVERAGE}.")] for name in live}


def checkpoint_gradients(denoiser: nn.Module, family: Family) -> None:
    """Gradient checkpointing for a denoiser of the family, with low-rank weights or without."""
    call = next((layer.call for _, layer in _layers(denoiser)), None)
    family.checkpoint_gradients(denoiser, None if call is None else call.checkpointing)


class Variant:
    """A network with one choice of its low-rank weights, called as the network itself is."""

    def __init__(self, network: nn.Module, weights: LoraWeights) -> None:
        self.network, self.weights = network, weights

    def __call__(self, *args, **kwargs):
        return self.network(*args, low_rank=self.weights, **kwargs)

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters of the network (their dtype and device tell its own)."""
        return self.network.parameters()

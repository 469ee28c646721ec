"""Low-rank training: one network whose low-rank weights are an argument of each call.

    network(x, t, ...)                                  the live weights: the student
    network(x, t, ..., low_rank=LoraWeights.AVERAGE)    their moving average: the reference
    network(x, t, ..., low_rank=LoraWeights.OFF)        none: the base

No adapter is ever switched. That would be module state, and a rollout in one thread and a backward
pass in another may run through the same layers at once.

PEFT makes the layers, and knows their names and files. Their forward is replaced here. Inference
has other layers (`guidance/lora_layers.py`): nothing is trained there, and each row of a batch
chooses its weights.
"""

from __future__ import annotations

import copy
import enum
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from peft import LoraConfig as PeftConfig
from peft.tuners.lora import layer as peft_layers
from torch import nn
from torch.utils.checkpoint import checkpoint

from selfnpo_fast.config import LoraConfig
from selfnpo_fast.models import Family
from selfnpo_fast.models.experts import Experts, networks_of, trained_networks
from selfnpo_fast.models.quantised import QuantisedLinear
from selfnpo_fast.runtime.dtypes import network_dtype
from selfnpo_fast.runtime.errors import UserError

LIVE, AVERAGE = "default", "average"
"""PEFT's names of the two sets of weights that a layer holds; the first is PEFT's default."""


class LoraWeights(enum.Enum):
    """The low-rank weights of one call."""

    OFF = enum.auto()
    """None: the base."""
    LIVE = enum.auto()
    """The trained weights: the student."""
    AVERAGE = enum.auto()
    """The moving average of the trained weights: the reference."""


class LoraCall(threading.local):
    """The weights that the layers of one network use in the present call of each thread."""

    def __init__(self) -> None:
        self.weights = LoraWeights.LIVE

    def checkpointing(self, block: nn.Module, *args):
        """Gradient checkpointing as in diffusers; the recomputation uses the weights of the call.

        On a GPU autograd recomputes in another thread, which does not know the call.
        """
        contexts = nullcontext(), _RecomputationWeights(self)
        return checkpoint(block.__call__, *args, use_reentrant=False, context_fn=lambda: contexts)


class _RecomputationWeights(AbstractContextManager):
    """A context, in any thread, with the weights that the call had when this object was built."""

    def __init__(self, call: LoraCall) -> None:
        self.call, self.weights = call, call.weights

    def __enter__(self) -> None:
        self.previous, self.call.weights = self.call.weights, self.weights

    def __exit__(self, *error) -> None:
        self.call.weights = self.previous


class _LowRankLayer:
    """The forward of PEFT's layers: y = W x + b + scale B A x with the A and B of the call."""

    call: LoraCall
    """Shared by all layers of a network."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, ...) to (B, ...), with the shape and the dtype of the base layer's output."""
        out, weights = self.base_layer(x), self.call.weights
        if weights is LoraWeights.OFF:  # compared with `is`: torch.compile guards on that
            return out
        name = AVERAGE if weights is LoraWeights.AVERAGE else LIVE
        down, up = self.lora_A[name], self.lora_B[name]
        return self._add_up(out, down(x.to(down.weight.dtype)), up, self.scaling[LIVE])


class LoraLinear(_LowRankLayer, peft_layers.Linear):
    """A Linear with low-rank weights; its input is (B, ..., in)."""

    @staticmethod
    def _add_up(out: torch.Tensor, low: torch.Tensor, up: nn.Linear, scale: float) -> torch.Tensor:
        """out + scale B low, for the layer's output `out` (B, ..., features) and low = A x."""
        rows = out.reshape(-1, out.shape[-1])
        # Product and sum in one pass over the rows.
        return torch.addmm(rows, low.reshape(-1, low.shape[-1]).to(out.dtype), up.weight.t(), alpha=scale).view_as(out)


class LoraConv2d(_LowRankLayer, peft_layers.Conv2d):
    """A Conv2d with low-rank weights; A has the layer's kernel and stride, B is 1x1."""

    @staticmethod
    def _add_up(out: torch.Tensor, low: torch.Tensor, up: nn.Conv2d, scale: float) -> torch.Tensor:
        """out + scale B low, for the layer's output `out` (B, channels, H, W) and low = A x."""
        return torch.add(out, up(low).to(out.dtype), alpha=scale)


_LAYER_CLASSES = {peft_layers.Linear: LoraLinear, peft_layers.Conv2d: LoraConv2d}
"""The class here by the class of PEFT's layer."""


def make_trainable(denoiser: nn.Module, names: Iterable[str], config: LoraConfig, seed: int) -> None:
    """Choose what of a denoiser is trained: low-rank weights, or with rank 0 all of its weights.

    `names` are `Adapter.trained_denoisers`: of two experts, the others are frozen. Raises like
    `add_lora`.
    """
    if isinstance(denoiser, Experts):
        denoiser.train_only(names)
    if config.rank:
        add_lora(denoiser, config, seed)
        return
    for network in trained_networks(denoiser):
        network.requires_grad_(True)


def add_lora(denoiser: nn.Module, config: LoraConfig, seed: int) -> None:
    """Freeze a diffusers denoiser, and give its target layers low-rank weights with B = 0; of two
    experts those that are trained.

    A quantised layer gets them in the dtype that the network computes in.

    From then on the denoiser also takes the argument `low_rank`, a `LoraWeights` (LIVE by default).

    Raises UserError where `lora.targets` match no layer, or a layer that cannot have such weights.
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
            for network in trained_networks(denoiser):
                network.add_adapter(peft_config, adapter_name=LIVE)
        except ValueError as error:
            raise UserError(f"lora.targets: {config.targets} match no layer of the model: {error}") from error
    call, dtype = LoraCall(), network_dtype(denoiser)
    for name, layer in list(_layers(denoiser)):
        if type(layer) not in _LAYER_CLASSES or getattr(layer.base_layer, "groups", 1) != 1:
            kind = type(layer.base_layer).__name__
            raise UserError(f"lora.targets: {name} is a {kind}; expected Linear layers and ungrouped Conv2d ones")
        # The class is swapped in place, as torch's parametrizations do, so that PEFT still takes
        # the layer for one of its layers.
        layer.__class__, layer.call = _LAYER_CLASSES[type(layer)], call
        if isinstance(layer.base_layer, QuantisedLinear):  # whose stored numbers give PEFT no dtype
            layer.lora_A.to(dtype)
            layer.lora_B.to(dtype)
    _take_argument(denoiser, call)


def _layers(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of the layers with low-rank weights."""
    return ((name, layer) for name, layer in denoiser.named_modules() if isinstance(layer, peft_layers.LoraLayer))


def _take_argument(denoiser: nn.Module, call: LoraCall) -> None:
    """Add hooks that take `low_rank` off a call's arguments and set it for this thread's layers."""

    def begin(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        call.weights = kwargs.get("low_rank", LoraWeights.LIVE)
        return args, {name: value for name, value in kwargs.items() if name != "low_rank"}

    def end(module: nn.Module, args: tuple, output) -> None:
        call.weights = LoraWeights.LIVE

    denoiser.register_forward_pre_hook(begin, with_kwargs=True)
    denoiser.register_forward_hook(end, always_call=True)


def add_average(denoiser: nn.Module) -> dict[str, nn.Parameter]:
    """Give the low-rank layers a second set of weights, equal to the live ones and not trained.

    Returns the parameters of this set, by the names of the live parameters that they follow.
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
    for network in networks_of(denoiser).values():
        family.checkpoint_gradients(network, None if call is None else call.checkpointing)


class Variant:
    """A network with one choice of its low-rank weights; it is called like the network itself."""

    def __init__(self, network: nn.Module, weights: LoraWeights) -> None:
        self.network, self.weights = network, weights

    def __call__(self, *args, **kwargs):
        return self.network(*args, low_rank=self.weights, **kwargs)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the network computes in."""
        return network_dtype(self.network)

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters of the network; callers read its device off them."""
        return self.network.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters of the network by name, low-rank ones too."""
        return self.network.named_parameters()

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All buffers of the network by name."""
        return self.network.named_buffers()

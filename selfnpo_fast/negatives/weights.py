"""A network's weights by name, read one at a time: from files, of a module, or mixed (Eq. 7)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from selfnpo_fast.diffusion.schedule_facts import SCHEDULE_MARKS
from selfnpo_fast.models import family_of
from selfnpo_fast.models.experts import new_like
from selfnpo_fast.negatives.formats import quantisation_of
from selfnpo_fast.negatives.low_rank import Deltas
from selfnpo_fast.negatives.names import WHOLE_MODEL, unwrapped, weight_names
from selfnpo_fast.negatives.sources import ModelFiles
from selfnpo_fast.runtime.errors import UserError, one_line, shortened
from selfnpo_fast.runtime.tensor_files import TensorFile, open_tensors, quantised_as, with_arithmetic


@dataclass(frozen=True)
class WeightReader:
    """A network's weights by name; the reader itself keeps no tensor in memory."""

    source: str
    """Where the weights come from, for messages."""
    shapes: dict[str, tuple[int, ...]]
    """The shape of every tensor by name."""
    read: Callable[[str], torch.Tensor]
    """The tensor of a name. Raises UserError for a file that has become unreadable."""


def mix(
    theta: torch.Tensor, positive: torch.Tensor, delta: torch.Tensor | None, alpha: float, beta: float
) -> torch.Tensor:
    """theta + alpha eta + beta delta (Eq. 7), with eta = positive - theta, as a new tensor.

    The arguments have one shape and one dtype, which the result takes. A delta of None is zero.
    alpha = 1 and alpha = 0 give positive and theta exactly.
    """
    mixed = torch.lerp(theta, positive, alpha)
    return mixed if delta is None else mixed.add_(delta, alpha=beta)


def mixture(
    theta: WeightReader, positive: WeightReader, negative: WeightReader | Deltas, alpha: float, beta: float, source: str
) -> WeightReader:
    """Eq. 7 as a reader, which computes each tensor in float32 when it is read.

    `negative` is theta + delta as full weights, or delta as low-rank updates. Where theta is
    `positive` itself, eta is zero.
    """

    def read(name: str) -> torch.Tensor:
        """One tensor of the mixture."""
        tuned = positive.read(name).float()
        base = tuned if theta is positive else theta.read(name).to(tuned.device).float()
        delta: torch.Tensor | None
        if isinstance(negative, WeightReader):
            delta = negative.read(name).to(base.device).float() - base
        else:
            update = negative.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            delta = update.delta().to(base.device) if update is not None else None
        return mix(base, tuned, delta, alpha, beta)

    return WeightReader(source, positive.shapes, read)


def config_of(model: nn.Module) -> dict:
    """The config of a diffusers model, as config.json holds it."""
    return dict(model.config)  # type: ignore[arg-type]


def has_adapters(module: nn.Module) -> bool:
    """Whether PEFT adapters are loaded on the module."""
    return any(name.endswith(".base_layer") for name, _ in module.named_modules())


def without_adapter(layer: nn.Module) -> nn.Module:
    """The layer that a PEFT adapter wraps, or the layer itself where no adapter is on it."""
    while (base_layer := getattr(layer, "base_layer", None)) is not None:
        layer = base_layer
    return layer


def plain_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's state dict under the names that it has without PEFT adapters; no copies."""
    state = module.state_dict()
    if not has_adapters(module):
        return state
    return {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}


def module_weights(module: nn.Module, source: str) -> WeightReader:
    """A module's weights without PEFT adapters; `read` gives the module's tensors, no copies."""
    state = plain_state(module)
    return WeightReader(source, {name: tuple(value.shape) for name, value in state.items()}, state.__getitem__)


def file_weights(source: ModelFiles, model: nn.Module, field: str) -> WeightReader:
    """Weights in safetensors files, in diffusers' naming or the original authors', by the names of
    `model`, which they are for.

    Names may stand behind what wrappers put before them (`names.unwrapped`). In a checkpoint of a
    whole model the parts next to the denoiser are left out. A file is mapped into memory only while
    one of its tensors is read.

    Raises UserError where a file is truncated, is no safetensors file, or holds quantised weights.
    """
    files = [open_tensors(path, field) for path in source.files]
    file_of_key: dict[str, TensorFile] = {}
    for file in files:
        twice = min(file_of_key.keys() & file.shapes.keys(), default=None)
        if twice is not None:
            raise UserError(f"{field}: {source.name} holds {one_line(twice, 120)} in two files")
        file_of_key |= dict.fromkeys(file.shapes, file)
    form = quantisation_of(file_of_key, source.config)
    if form is not None:
        raise UserError(f"{field}: {source.name} is quantised ({form}); give weights in fp32, bf16 or fp16")
    # Names and shapes come from the headers: no weight is read here.
    key_of_name: dict[str, str] = {}
    for key, name in _names(list(file_of_key), model).items():
        if name in key_of_name:
            first, second = one_line(key_of_name[name], 120), one_line(key, 120)
            raise UserError(f"{field}: {source.name} holds {one_line(name, 120)} twice, as {first} and as {second}")
        if quantised_as(file_of_key[key].dtypes[key]):
            raise UserError(
                f"{field}: {source.name} is quantised: {one_line(name, 120)} is stored as "
                f"{file_of_key[key].dtypes[key]}; give weights in fp32, bf16 or fp16"
            )
        key_of_name[name] = key
    shapes = {name: file_of_key[key].shapes[key] for name, key in key_of_name.items()}

    def read(name: str) -> torch.Tensor:
        """One tensor from its file."""
        key = key_of_name[name]
        return file_of_key[key].read([key])[key]

    return WeightReader(source.name, shapes, read)


def _names(keys: list[str], model: nn.Module) -> dict[str, str]:
    """The name of the model's weight that each key of a file stands for, as far as it is the
    denoiser's.

    A key that stands for none keeps its name, which then does not fit the model.
    """
    family = family_of(model)
    known = weight_names(model, list(plain_state(model)))
    for prefix in (*WHOLE_MODEL, f"{family.denoiser_name}."):
        if any(key.startswith(prefix) for key in keys):
            keys = [key for key in keys if key.startswith(prefix)]
            break
    names = {key: unwrapped(key, known, family) for key in keys if key not in SCHEDULE_MARKS}
    return {key: known.get(name, name) for key, name in names.items()}


def check_class(config: dict, model: nn.Module, source: str, field: str) -> None:
    """Raise UserError where `config` is that of another architecture than the model's.

    Options are compared one by one, since some of them change the network but no shape.
    """
    cls, inert = type(model), family_of(model).inert_options
    if config.get("_class_name") != cls.__name__:
        shown = shortened(config.get("_class_name"), 60).strip("'\"")
        raise UserError(f"{field}: {source} does not fit the model: it is a {shown}, the model a {cls.__name__}")
    model_config = config_of(model)
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if name == "self" or name in inert or parameter.default is inspect.Parameter.empty:
            continue
        value, expected = (values.get(name, parameter.default) for values in (config, model_config))
        if not _same(value, expected):
            shown = shortened(value, 60).strip("'\"")
            raise UserError(
                f"{field}: {source} does not fit the model: its {name} is {shown}, the model's {expected}; "
                "train it from this model"
            )


def _same(a, b) -> bool:
    """Whether two options are equal; one value also stands for a list of equal values."""
    a, b = (list(v) if isinstance(v, tuple) else v for v in (a, b))
    if isinstance(a, list) != isinstance(b, list):
        values, value = (a, b) if isinstance(a, list) else (b, a)
        return all(v == value for v in values) and value is not None
    return a == b


def check_shapes(weights: WeightReader, expected: dict[str, tuple[int, ...]], field: str) -> None:
    """Raise UserError where a name or a shape differs from `expected`."""
    for name in sorted(expected.keys() | weights.shapes.keys()):
        shape, wanted = weights.shapes.get(name), expected.get(name)
        if shape != wanted:
            raise UserError(
                f"{field}: {weights.source} does not fit the model: {one_line(name, 120)} has shape "
                f"{shortened(shape)}, the model has {wanted}; train it from this model"
            )


def materialise(weights: WeightReader, model: nn.Module, field: str) -> nn.Module:
    """A network with these weights and the class, dtypes and device of `model`.

    The network is in evaluation mode and needs no gradients. Next to it, only one tensor of each
    source is in memory at a time.

    Raises UserError where a weight is not finite, or where all are equal to those of `model`.
    """
    from accelerate import init_empty_weights

    differs = has_adapters(model)
    state = {}
    for name, like in plain_state(model).items():
        device = torch.device("cpu") if like.is_meta else like.device
        state[name] = value = weights.read(name).to(device, like.dtype, copy=True)
        if not with_arithmetic(value).isfinite().all():
            raise UserError(
                f"{field}: {weights.source} is damaged, or too large for {like.dtype}: {name} is not finite"
            )
        differs = differs or like.is_meta or not torch.equal(with_arithmetic(value), with_arithmetic(like))
    if not differs:
        raise UserError(f"{field}: {weights.source} equals the positive model: guidance would have no effect")
    with init_empty_weights():
        network = new_like(model)
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


def match_placement(network: nn.Module, positive: nn.Module) -> None:
    """Bring a network to the positive's device, and each tensor to the dtype of the positive's.

    The positive is of the same class; some of its layers may be in float32 on purpose. A positive
    on the meta device, whose weights are offloaded, leaves the network's device as it is.
    """
    named = {
        name.replace(".base_layer.", "."): value
        for name, value in (*positive.named_parameters(), *positive.named_buffers())
    }
    first = next(positive.parameters())
    device = None if first.is_meta else first.device
    own = (*network.named_parameters(), *network.named_buffers())
    dtypes = {id(value): named[name].dtype for name, value in own if name in named}
    network._apply(lambda value: value.to(device, dtypes.get(id(value), value.dtype)))

"""A network's weights by name, read one tensor at a time: of files, of a module, or computed from such (Eq. 7)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from selfnpo_fast.models import Family, family_of
from selfnpo_fast.negatives.low_rank import Deltas
from selfnpo_fast.negatives.sources import ModelFiles, open_safetensors
from selfnpo_fast.runtime.errors import UserError, one_line


@dataclass(frozen=True)
class WeightReader:
    """Tensors by name, none of them held: `read` makes one, and to drop it gives its memory back."""

    source: str
    """For messages."""
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], torch.Tensor]
    """Raises UserError for a file that became unreadable."""


def mix(
    theta: torch.Tensor, positive: torch.Tensor, delta: torch.Tensor | None, alpha: float, beta: float
) -> torch.Tensor:
    """theta + alpha eta + beta delta (Eq. 7) with eta = positive - theta; any shape, in the arguments' dtype.

    A new tensor; alpha = 1 and alpha = 0 give positive and theta exactly. None for a delta of zero.
    """
    mixed = torch.lerp(theta, positive, alpha)
    return mixed if delta is None else mixed.add_(delta, alpha=beta)


def mixture(
    theta: WeightReader, positive: WeightReader, negative: WeightReader | Deltas, alpha: float, beta: float, source: str
) -> WeightReader:
    """Eq. 7 as weights: float32, of which nothing is computed before it is read.

    `negative` is theta + delta, or delta itself as low-rank updates. theta may be `positive` itself: eta is zero then.
    """

    def read(name: str) -> torch.Tensor:
        """One tensor of the mixture, computed now."""
        tuned = positive.read(name).float()
        base = tuned if theta is positive else theta.read(name).to(tuned.device).float()
        if isinstance(negative, WeightReader):
            delta = negative.read(name).to(base.device).float() - base
        else:
            update = negative.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            delta = update.delta().to(base.device) if update is not None else None
        return mix(base, tuned, delta, alpha, beta)

    return WeightReader(source, positive.shapes, read)


def has_adapters(module: nn.Module) -> bool:
    """Whether PEFT adapters are loaded on the module."""
    return any(name.endswith(".base_layer") for name, _ in module.named_modules())


def plain_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict that the module has without PEFT adapters: its own weights under their own names."""
    state = module.state_dict()
    if not has_adapters(module):
        return state
    return {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}


def module_weights(module: nn.Module, source: str) -> WeightReader:
    """A module's own weights, whatever adapters are on it; `read` gives the very tensors."""
    state = plain_state(module)
    return WeightReader(source, {name: tuple(value.shape) for name, value in state.items()}, state.__getitem__)


def file_weights(source: ModelFiles, family: Family, config: dict, field: str) -> WeightReader:
    """WeightReader of safetensors files in diffusers' naming or the original one of Stable Diffusion.

    `config` is that of the denoiser that they are for. A file is mapped only as long as one tensor of it is in use.
    Raises UserError where a file is truncated or no safetensors file, or holds what are no plain weights.
    """
    file_of_key = {key: path for path in source.files for key in open_safetensors(path, field)}
    try:
        key_of_name = family.from_original_names(list(file_of_key), config) or {key: key for key in file_of_key}
    except ValueError as error:
        raise UserError(f"{field}: {source.name} {one_line(error)}") from error

    def read(name: str) -> torch.Tensor:
        """One tensor from its file, which is mapped for as long as this takes."""
        path = file_of_key[key_of_name[name]]
        try:
            with safe_open(path, "pt") as file:
                return file.get_tensor(key_of_name[name])
        except (OSError, SafetensorError) as error:
            raise UserError(f"{field}: cannot load {path}: {one_line(error)}") from error

    shapes = {}
    for path in source.files:
        with safe_open(path, "pt") as file:
            for name, key in key_of_name.items():
                if file_of_key[key] == path:
                    part = file.get_slice(key)
                    if not part.get_dtype().startswith(("F", "BF")):
                        raise UserError(
                            f"{field}: {source.name} is quantised: {name} is stored as {part.get_dtype()}; "
                            "give weights in fp32, bf16 or fp16"
                        )
                    shapes[name] = tuple(part.get_shape())
    return WeightReader(source.name, shapes, read)


def check_class(config: dict, model: nn.Module, source: str, field: str) -> None:
    """UserError where a config.json is another architecture's than the model's, in a way that shapes may not show."""
    cls, inert = type(model), family_of(model).inert_options
    if config.get("_class_name") != cls.__name__:
        shown = one_line(ValueError(config.get("_class_name")), 60)
        raise UserError(f"{field}: {source} does not fit the model: it is a {shown}, the model a {cls.__name__}")
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if name == "self" or name in inert or parameter.default is inspect.Parameter.empty:
            continue
        theirs, ours = (values.get(name, parameter.default) for values in (config, dict(model.config)))
        if not _same(theirs, ours):
            shown = one_line(ValueError(theirs), 60)
            raise UserError(
                f"{field}: {source} does not fit the model: its {name} is {shown}, the model's {ours}; "
                "train it from this model"
            )


def _same(a, b) -> bool:
    """Equal as JSON tells them apart, one value also standing for a list of it."""
    a, b = (list(v) if isinstance(v, tuple) else v for v in (a, b))
    if isinstance(a, list) != isinstance(b, list):
        values, value = (a, b) if isinstance(a, list) else (b, a)
        return all(v == value for v in values) and value is not None
    return a == b


def check_shapes(weights: WeightReader, expected: dict[str, tuple[int, ...]], field: str) -> None:
    """UserError where names or shapes are others than `expected`."""
    for name in sorted(expected.keys() | weights.shapes.keys()):
        found, wanted = weights.shapes.get(name), expected.get(name)
        if found != wanted:
            raise UserError(
                f"{field}: {weights.source} does not fit the model: {name} has shape {found}, "
                f"the model has {wanted}; train it from this model"
            )


def materialise(weights: WeightReader, model: nn.Module, field: str) -> nn.Module:
    """A network of the model's class, dtypes and device with these weights, in evaluation mode, without gradients.

    Besides the result one tensor of each source is in memory at a time. Raises UserError for weights that are not
    finite, or all equal to the model's own.
    """
    from accelerate import init_empty_weights

    own = plain_state(model)
    adapters = has_adapters(model)
    differs = adapters
    state = {}
    for name, like in own.items():
        device = torch.device("cpu") if like.is_meta else like.device
        state[name] = value = weights.read(name).to(device, like.dtype, copy=True)
        if not value.isfinite().all():
            raise UserError(f"{field}: {weights.source} is damaged: {name} is not finite")
        differs = differs or like.is_meta or not torch.equal(value, like)
    if not differs:
        raise UserError(f"{field}: {weights.source} equals the positive model: guidance would have no effect")
    with init_empty_weights():
        network = type(model).from_config(model.config)
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)

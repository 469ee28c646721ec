"""Loading networks and schedulers of diffusers, and checks that hold for any network.

A config is bounded before a network is built from it, every tensor of a network has to be in the
files, and no class is taken that the family does not name. Errors are ValueErrors, which the
adapter turns into one line with the part's name.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from selfnpo_fast.models.folder import DIFFUSERS_WEIGHTS, ModelFolder, Weights
from selfnpo_fast.runtime.errors import one_line, shortened
from selfnpo_fast.runtime.limits import MAX_LAYERS, MAX_WIDTH

COUNTS = ("channels", "dim", "groups", "heads", "layers", "size")
"""What the names of counts in a network's config have in them."""
NUMBERED = frozenset({"dual_attention_layers"})
"""Options of networks that say which layers are meant, and not how many there are."""
NEEDED_OPTIONS = frozenset({"steps_offset", "timestep_spacing"})
"""Options of schedulers that may not be null."""
SPACINGS = ("linspace", "leading", "trailing")
"""The values of timestep_spacing."""


def check_config(config: Mapping[str, Any], classes: Sequence[str] = ()) -> None:
    """ValueError where a network's config names another class than `classes`, asks for quantised
    weights, or for more than any network has."""
    named = config.get("_class_name")
    if classes and named is not None and named not in classes:
        raise ValueError(f"its _class_name is {shortened(named, 60)}; expected {' or '.join(classes)}")
    if said := config.get("quantization_config"):
        form = said.get("quant_method") if isinstance(said, dict) else said
        raise ValueError(f"it is quantised ({one_line(form, 60)}); give weights in float32, bf16 or fp16")
    layers, longest = 1, 1
    for key, value in config.items():
        if key.startswith("_"):  # notes of diffusers
            continue
        numbers, length = _numbers(value)
        if length > MAX_LAYERS:
            raise ValueError(f"{one_line(key, 60)} is a list of more than {MAX_LAYERS:,} entries")
        longest = max(longest, length)
        if any(abs(number) > MAX_WIDTH for number in numbers):
            raise ValueError(f"{one_line(key, 60)} is {shortened(value)}; a network has at most {MAX_WIDTH:,}")
        if any(number < 0 for number in numbers) and any(word in key for word in COUNTS):
            raise ValueError(f"{one_line(key, 60)} is {shortened(value)}, which is below 0")
        if "layers" in key and key not in NUMBERED:
            layers *= max([1, *(int(number) for number in numbers)])
    if layers * longest > MAX_LAYERS:
        raise ValueError(f"its config asks for {layers * longest:,} layers; a network has at most {MAX_LAYERS:,}")


def full_config(cls: Any, config: Mapping[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    """The config of a network of diffusers with the defaults of its class `cls`, checked."""
    check_config(config, classes)
    known = inspect.signature(cls.__init__).parameters
    return {name: value.default for name, value in known.items() if value.default is not value.empty} | dict(config)


def _numbers(value: Any) -> tuple[list[float], int]:
    """The finite numbers in a config's value, at any depth, and the number of its entries.

    At most as many as a config's lists may have are looked at: more are refused by their number.
    """
    numbers, entries, left = [], 0, [value]
    while left and entries <= MAX_LAYERS:
        value = left.pop()
        if isinstance(value, Mapping):
            value = list(value.values())
        if isinstance(value, list | tuple):
            entries += len(value)
            left += value[: MAX_LAYERS + 1]
        elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) != float("inf"):
            numbers.append(value)
    return numbers, entries


def load_network(cls: Any, folder: ModelFolder, part: str, variant: str | None, dtype: torch.dtype) -> nn.Module:
    """A network of diffusers with the weights of `part` in `dtype`, in evaluation mode."""
    config = folder.json(f"{part}/config.json")
    check_config(config)
    weights = folder.weights(part, DIFFUSERS_WEIGHTS, variant)
    with torch.device("meta"):
        check_amount(cls.from_config(config), weights)
    network, info = cls.from_pretrained(
        str(weights.folder),
        subfolder=part,
        variant=weights.variant,
        torch_dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    check_loaded(network, info)
    return network.eval()


_tried: set[tuple] = set()
"""What `try_forward` has seen succeed."""


@torch.no_grad()
def try_forward(
    build: Callable[[], nn.Module], run: Callable[[nn.Module], torch.Tensor], shape: tuple[int, ...], facts: str
) -> None:
    """ValueError where a network's config does not fit together, or its output is not of `shape`.

    The network is built and run without numbers, on the meta device, once in a process for each
    shape and `facts`. A network that looks at numbers is passed over.
    """
    if (shape, facts) in _tried:
        return
    with torch.device("meta"):
        network = build().eval()
    try:
        found = tuple(run(network).shape)
    except Exception as error:  # the shapes of a config fail in any of a dozen ways
        if "meta" not in str(error):
            raise ValueError(f"its config does not fit together: {one_line(error, 160)}") from error
        found = shape
    if found != shape:
        raise ValueError(f"its config does not fit: it gives {found} where {shape} is expected")
    _tried.add((shape, facts))


def load_scheduler(name: Any, config: dict[str, Any]) -> Any:
    """The scheduler of diffusers of this class name, with the config of its file."""
    import diffusers

    named = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (inspect.isclass(named) and issubclass(named, diffusers.SchedulerMixin)):
        raise ValueError(f"it names an unknown scheduler: {shortened(name, 60)}")
    check_config(config)
    _check_options(named, config)
    return named.from_config(config | {"_class_name": name})


def _check_options(cls: Any, config: Mapping[str, Any]) -> None:
    """ValueError where an option of a scheduler's config is of another type than its default.

    Some schedulers look at an option for the first time in the middle of drawing a picture.
    """
    known = inspect.signature(cls.__init__).parameters
    for name, value in config.items():
        default = known[name].default if name in known else None
        if isinstance(default, bool) or (value is None and name not in NEEDED_OPTIONS):
            possible = value is None or isinstance(value, bool)
        elif isinstance(default, int):
            possible = isinstance(value, int) and not isinstance(value, bool)
        elif isinstance(default, float):
            possible = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        elif isinstance(default, str):
            possible = isinstance(value, str) and (name != "timestep_spacing" or value in SPACINGS)
        else:
            possible = True
        if not possible:
            raise ValueError(f"its {name} is {shortened(value, 60)}; expected a value such as {default!r}")


def refuse_nan(module: nn.Module) -> None:
    """ValueError where a weight is not finite."""
    for name, parameter in module.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"the weights are damaged: {name} is not finite")


def check_amount(network: nn.Module, weights: Weights) -> None:
    """ValueError where a network without weights is far larger than the files can fill.

    Loaders make what is missing from random numbers first, however large the config says it is.
    """
    wanted = sum(parameter.numel() for parameter in network.parameters())
    there = sum(torch.Size(shape).numel() for shape in weights.shapes.values())
    if wanted > 2 * there + MAX_WIDTH:
        raise ValueError(f"its config asks for {wanted:,} weights and the files hold {there:,}; they do not fit")


def check_loaded(network: nn.Module, info: Mapping[str, Any]) -> None:
    """ValueError where a tensor was missing from the files or of another shape, which loaders only
    warn of, or is not finite."""
    missing, others = sorted(info["missing_keys"]), sorted(info["mismatched_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"the weights lack {missing[0]}{more}; give the files of this very network")
    if others:
        name, found, expected = others[0]
        raise ValueError(f"{name} is of shape {tuple(found)} and the config says {tuple(expected)}")
    refuse_nan(network)

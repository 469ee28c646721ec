"""Loading a negative model: full weights or a LoRA, unmixed or mixed with a fine-tune (Eq. 7).

theta_neg = theta + alpha eta + beta delta, where
- theta is the base,
- theta + eta is the positive model, which is guided,
- theta + delta is the negative as it was trained.

Where no base is given, the positive is the base, and eta is zero.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from selfnpo_fast.diffusion.schedule_facts import ScheduleFacts, check_same_schedule
from selfnpo_fast.models import family_of
from selfnpo_fast.models.experts import Experts
from selfnpo_fast.negatives import formats
from selfnpo_fast.negatives.fingerprint import matches
from selfnpo_fast.negatives.formats import quantisation_of_module, refuse_mixing, served_quantisation
from selfnpo_fast.negatives.lora_files import read_lora, read_record
from selfnpo_fast.negatives.low_rank import Deltas, update_dtype
from selfnpo_fast.negatives.sources import LORA_FILE, ModelFiles, locate
from selfnpo_fast.negatives.weights import (
    WeightReader,
    check_class,
    check_shapes,
    config_of,
    file_weights,
    has_adapters,
    match_placement,
    materialise,
    mix,
    mixture,
    module_weights,
    plain_state,
)
from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.errors import UserError, one_line, shortened
from selfnpo_fast.runtime.tensor_files import open_tensors, with_arithmetic


@dataclass(frozen=True)
class Negative:
    """A negative model for one positive: either a second network, or updates of the positive's."""

    source: str
    """Where the negative came from, for messages."""
    network: nn.Module | None = None
    """In evaluation mode, without gradients, in the positive's dtype and on its device."""
    deltas: Deltas | None = None
    """Low-rank updates of the positive's weights, in the positive's dtype and on its device."""
    schedule: ScheduleFacts | None = None
    """What the negative's files say of its prediction type and noise schedule."""

    def __post_init__(self) -> None:
        assert (self.network is None) != (self.deltas is None), "either a network or deltas"


@dataclass(frozen=True)
class LoadedModel:
    """A model as its files hold it, before it is mixed with others."""

    source: str
    """Where the model came from, for messages."""
    content: WeightReader | Deltas
    """Full weights (theta + delta of a negative), or a LoRA's updates (delta)."""
    record: dict | None = None
    """The record of the model's base (`fingerprint.base_record`); None without one."""
    schedule: ScheduleFacts | None = None
    """What the model's files say of its prediction type and noise schedule."""

    @property
    def is_lora(self) -> bool:
        """Whether the model is a LoRA."""
        return not isinstance(self.content, WeightReader)


def load_negative(
    positive: nn.Module,
    source: str | Path | nn.Module | Negative | Mapping,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    base: str | Path | None = None,
    revision: str | None = None,
    variant: str | None = None,
    schedule: ScheduleFacts | None = None,
) -> Negative:
    """The negative model for a positive denoiser of a known family, which is not changed.

    `source` is one of
    - a training run's output folder, or the folder negative/ in it,
    - a pipeline's or a denoiser's folder in diffusers format,
    - a Hub id, owner/name, which a folder or a .safetensors file may follow; `revision` and
      `variant` are the Hub's and diffusers',
    - a safetensors file with full weights or a LoRA,
    - a module, which becomes the negative's network without a copy where nothing is mixed,
    - a Negative; its network is returned unchanged unless alpha, beta or base change it,
    - for a model of two experts, what `experts.by_expert` takes, such as a mapping of such sources.

    `base` is theta: a folder, a Hub id or a file. It is needed for alpha other than 1, and where
    the positive is a fine-tune of the model that the negative was trained from. alpha = 0 takes
    full weights unchanged, next to any positive.

    `schedule` is the positive's. The prediction type and the noise schedule of the negative are
    compared with it, and with the base's, as far as the files say them.

    A LoRA at alpha = 1 needs no second network: it is returned as updates of the positive's
    layers, times beta. All else is a second network, mixed in float32 tensor by tensor.

    Raises UserError, one line, where the source cannot be read, does not fit the positive, is not
    finite, equals the positive, was trained from another base or means another thing by its output,
    and where a network is quantised, save for a positive quantised by bitsandbytes or torchao next
    to a LoRA at alpha = 1. Nothing is changed then.
    """
    check_strengths(alpha, beta)
    positive = getattr(positive, "_orig_mod", positive)  # torch.compile's wrapper
    if isinstance(positive, Experts):
        from selfnpo_fast.negatives.experts import load_experts  # which loads each of them by this function

        options = {"alpha": alpha, "beta": beta, "variant": variant, "schedule": schedule}
        return load_experts(positive, source, base=base, revision=revision, **options)
    form = served_quantisation(positive, mixed=alpha != 1 or base is not None)
    as_it_is = form is None and alpha == beta == 1 and base is None
    if as_it_is and isinstance(source, Negative) and source.network is not None:
        check_same_schedule(source.schedule, schedule)
        return source
    loaded = _load(positive, source, revision, variant)
    check_same_schedule(loaded.schedule, schedule)
    theta = None
    if base is not None:
        theta, schedule_of_base = _load_base(positive, base)
        check_same_schedule(loaded.schedule, schedule_of_base)
    network = source.network if isinstance(source, Negative) else source
    if form is not None:
        loaded = dataclasses.replace(loaded, record=formats.record_of_plain(loaded.record, positive))
    check_base(loaded, theta or _resident_weights(positive), alpha, beta, None if base is None else str(base))
    if not isinstance(loaded.content, WeightReader) and alpha == 1:
        deltas = _scaled(loaded.content, beta, positive, loaded.source)
        return Negative(loaded.source, deltas=deltas, schedule=loaded.schedule)
    if isinstance(network, nn.Module) and is_unmixed(alpha, beta, theta):
        _refuse_adapters(positive, alpha)
        network = _taken_over(network, positive)
    else:
        network = materialise(mixed(loaded, positive, theta, alpha, beta), positive, "negative")
    return Negative(loaded.source, network=network, schedule=loaded.schedule)


def check_strengths(alpha: float, beta: float) -> None:
    """Raise UserError where alpha or beta is outside the range of Eq. 7, 0 to 1."""
    for name, value in (("alpha", alpha), ("beta", beta)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise UserError(
                f"{name}: {shortened(value)} is not possible; expected 0 to 1, as in theta + alpha eta + beta delta"
            )


def is_unmixed(alpha: float, beta: float, theta: WeightReader | None) -> bool:
    """Whether Eq. 7 leaves the full weights of a negative, theta + delta, unchanged.

    theta is None where the positive is the base.
    """
    return beta == 1 and (alpha == 0 or (alpha == 1 and theta is None))


def _load(
    positive: nn.Module, source: str | Path | nn.Module | Negative, revision: str | None, variant: str | None
) -> LoadedModel:
    """The negative, checked against the positive, before it is mixed. Raises UserError."""
    if isinstance(source, Negative) and source.deltas is not None:
        _check_deltas(source.deltas, positive)
        return LoadedModel(source.source, source.deltas, schedule=source.schedule)
    if isinstance(source, Negative):
        assert source.network is not None
        return dataclasses.replace(_load(positive, source.network, revision, variant), schedule=source.schedule)
    if isinstance(source, nn.Module):
        refuse_mixing(positive)
        name = f"the given {type(source).__name__}"
        if type(source) is not type(positive):
            raise UserError(f"negative: {name} does not fit the model, which is a {type(positive).__name__}")
        if source is positive:
            raise UserError(f"negative: {name} is the positive model itself: guidance would have no effect")
        if has_adapters(source):
            raise UserError(f"negative: {name} has PEFT adapters loaded; fuse and unload them first")
        if (form := quantisation_of_module(source)) is not None:
            raise UserError(formats.not_served(source, form, "negative"))
        weights = module_weights(source, name)
        check_class({**config_of(source), "_class_name": type(source).__name__}, positive, name, "negative")
        check_shapes(weights, _shapes(positive), "negative")
        return LoadedModel(name, weights)
    if not isinstance(source, str | os.PathLike):
        raise UserError(
            f"negative: a {type(source).__name__} is not possible; expected a folder, a file, a Hub id or a module"
        )
    files = locate(os.fspath(source), [family_of(positive).denoiser_name], "negative", revision, variant)
    if not files.is_lora:
        refuse_mixing(positive)
    return read_files(files, positive, "negative")


def read_files(files: ModelFiles, model: nn.Module, field: str) -> LoadedModel:
    """Full weights for the architecture of `model`, or a LoRA for it; no weight of `model` is read.

    Raises UserError, one line that starts with `field`, where the files do not fit.
    """
    if files.is_lora:
        deltas = read_lora(files.files[0], model, field)
        record = read_record(files.files[0], field)
        return LoadedModel(files.name, deltas, record, _schedule_of(files, record, field))
    weights = read_full_weights(files, model, field)
    return LoadedModel(files.name, weights, files.record, _schedule_of(files, files.record, field))


def _schedule_of(files: ModelFiles, record: dict | None, field: str) -> ScheduleFacts:
    """What a model's files say of its schedule: the record of a run first, then the scheduler's
    config, then the weights' metadata.

    Raises UserError where one of them is damaged.
    """
    if record is not None and record.get("schedule") is not None:
        try:
            return ScheduleFacts.of_record(record["schedule"], files.name)
        except ValueError as error:
            raise UserError(f"{field}: {files.name}: {one_line(error)}") from error
    if files.scheduler is not None:
        return ScheduleFacts.of_scheduler_config(files.scheduler, files.name, field)
    file = open_tensors(files.files[0], field)
    return ScheduleFacts.of_metadata(file.metadata, list(file.shapes), files.name)


def read_full_weights(files: ModelFiles, model: nn.Module, field: str) -> WeightReader:
    """The weights in files of full weights, checked like `read_files` does."""
    weights = file_weights(files, model, field)
    check_shapes(weights, _shapes(model), field)
    if files.config is not None:
        check_class(files.config, model, files.name, field)
    return weights


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the module by name, without adapters."""
    return {name: tuple(value.shape) for name, value in plain_state(module).items()}


def _resident_weights(positive: nn.Module) -> WeightReader | None:
    """The positive's weights; None where sequential offload keeps them out of the module."""
    weights = module_weights(positive, "the positive model")
    return None if any(value.is_meta for value in positive.parameters()) else weights


def load_base(model: nn.Module, base: str | Path) -> WeightReader:
    """theta, checked against the model's architecture. Raises UserError that starts with `base`."""
    return _load_base(model, base)[0]


def _load_base(model: nn.Module, base: str | Path) -> tuple[WeightReader, ScheduleFacts | None]:
    """theta and what its files say of the schedule. Raises like `load_base`."""
    loaded = read_files(locate(base, [family_of(model).denoiser_name], "base"), model, "base")
    if not isinstance(loaded.content, WeightReader):
        raise UserError(f"base: {base} is a LoRA; give the model that it belongs to")
    return loaded.content, loaded.schedule


def check_base(loaded: LoadedModel, theta: WeightReader | None, alpha: float, beta: float, base: str | None) -> None:
    """Compare the negative's record of its base with theta, the base that it will be used with.

    theta is the base that was given or, where `base` is None, the positive.

    Raises UserError for full weights with another base; a LoRA with another base is a warning.
    """
    if loaded.record is None or theta is None or (not loaded.is_lora and (alpha, beta) == (0, 1)):
        return
    try:
        if not isinstance(loaded.record["path"], str):
            raise TypeError("its path is no text")
        trained_from, same = one_line(loaded.record["path"]), matches(loaded.record["fingerprint"], theta)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"negative: {loaded.source}: its record of the base is damaged: {one_line(error)}") from error
    if same:
        return
    other = "the positive model" if base is None else f"base {base}"
    if loaded.is_lora:
        logger.warning(
            "negative: %s was trained from %s, and %s has other weights: its update is applied all the same",
            loaded.source, trained_from, other,
        )  # fmt: skip
        return
    raise UserError(
        f"negative: {loaded.source} was trained from {trained_from}, and {other} has other weights; give base="
        f"{trained_from!r} for theta + alpha eta + beta delta, or alpha=0 for the negative's weights as they are"
    )


def _refuse_adapters(positive: nn.Module, alpha: float) -> None:
    """Raise UserError where the positive's weights are needed and PEFT adapters change them."""
    if has_adapters(positive) and alpha != 0:
        raise UserError(
            f"alpha: {alpha} needs the positive model's weights, and it has PEFT adapters loaded; fuse and unload them "
            "(fuse_lora, unload_lora_weights) first"
        )


def mixed(
    loaded: LoadedModel, positive: nn.Module | WeightReader, theta: WeightReader | None, alpha: float, beta: float
) -> WeightReader:
    """Eq. 7 as a reader, which mixes each tensor when it is read.

    theta is None where the positive is the base.

    Raises UserError where alpha or beta need weights that are missing: the base's or the
    positive's.
    """
    unmixed = is_unmixed(alpha, beta, theta)
    positive_weights: WeightReader | None
    if isinstance(positive, nn.Module):
        refuse_mixing(positive)
        if loaded.is_lora or not (unmixed and alpha == 0):
            _refuse_adapters(positive, alpha or 1)
        positive_weights = _resident_weights(positive)
    else:
        positive_weights = positive
    if isinstance(loaded.content, WeightReader) and unmixed:
        return loaded.content
    if theta is None and alpha != 1:
        raise UserError(f"alpha: {alpha} needs the base model, from which eta = positive - base; give base=...")
    if positive_weights is None:
        raise UserError("negative: the positive model's weights are offloaded; load the negative before you offload it")
    return mixture(theta or positive_weights, positive_weights, loaded.content, alpha, beta, loaded.source)


def _scaled(deltas: Deltas, beta: float, positive: nn.Module, source: str) -> Deltas:
    """The updates times beta, in dtype and on the device of the positive's layers.

    Raises UserError where beta is 0, and where an update overflows the dtype.
    """
    if beta == 0:
        raise UserError("beta: 0 leaves nothing of the negative: guidance would have no effect; give more than 0")
    scaled = {}
    for path, delta in deltas.items():
        layer = positive.get_submodule(path)
        like: torch.Tensor = layer.weight  # type: ignore[assignment]
        device, dtype = torch.device("cpu") if like.is_meta else like.device, update_dtype(layer, positive)
        down, up = (factor.to(device, dtype) for factor in (delta.down, delta.up))
        if not all(with_arithmetic(factor).isfinite().all() for factor in (down, up)):
            raise UserError(f"negative: {source}: the update of {path} is too large for {dtype}")
        scaled[path] = dataclasses.replace(delta, down=down, up=up, scale=delta.scale * beta)
    return scaled


def _check_deltas(deltas: Deltas, positive: nn.Module) -> None:
    """Raise UserError where updates do not fit the positive's layers, as for a LoRA file."""
    state = {
        f"{path}.lora_{key}.weight": value
        for path, delta in deltas.items()
        for key, value in (("A", delta.down), ("B", delta.up))
    }
    read_lora(state, positive)
    for path, delta in deltas.items():
        if delta.is_too_large():
            raise UserError(
                f"negative: the update of {path} is larger than any weight can be; its scale or its factors are damaged"
            )


def _taken_over(network: nn.Module, positive: nn.Module) -> nn.Module:
    """`network` as the negative's network, brought to the positive's device and dtypes; no copy.

    Raises UserError where a weight is not finite, or where all are equal to the positive's.
    """
    differs = has_adapters(positive)
    positive_state = plain_state(positive)
    for name, value in network.state_dict().items():
        value = with_arithmetic(value)
        if not value.isfinite().all():
            raise UserError(f"negative: the given {type(network).__name__} is damaged: {name} is not finite")
        like = positive_state[name]
        differs = differs or like.is_meta or not torch.equal(*map(with_arithmetic, (value.to(like), like)))
    if not differs:
        raise UserError("negative: the given module equals the positive model: guidance would have no effect")
    match_placement(network, positive)
    return network.eval().requires_grad_(False)


def as_network(positive: nn.Module, negative: Negative) -> nn.Module:
    """The negative as a network: for a LoRA, one of the positive's weights plus the updates.

    Raises UserError for a LoRA where the positive has adapters, is offloaded, or where the sum is
    not finite or equals the positive.
    """
    if negative.network is not None:
        return negative.network
    assert negative.deltas is not None
    weights = mixed(LoadedModel(negative.source, negative.deltas), positive, None, 1.0, 1.0)
    return materialise(weights, positive, "negative")


__all__ = ["LORA_FILE", "LoadedModel", "Negative", "as_network", "load_negative", "mix"]

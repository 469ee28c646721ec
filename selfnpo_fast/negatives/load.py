"""Loading a negative model: full weights or a LoRA, as it is or mixed with a fine-tuned positive (Eq. 7).

theta_neg = theta + alpha eta + beta delta. theta is the base, theta + eta the positive model that is guided, theta +
delta the negative as it was trained. Where no base is given the positive is the base, and eta is zero.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from selfnpo_fast.models import family_of
from selfnpo_fast.negatives.fingerprint import matches
from selfnpo_fast.negatives.lora_files import read_lora, read_record
from selfnpo_fast.negatives.low_rank import Deltas
from selfnpo_fast.negatives.sources import LORA_FILE, ModelFiles, locate
from selfnpo_fast.negatives.weights import (
    WeightReader,
    check_class,
    check_shapes,
    file_weights,
    has_adapters,
    materialise,
    mix,
    mixture,
    module_weights,
    plain_state,
)
from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.errors import UserError, one_line


@dataclass(frozen=True)
class Negative:
    """A negative model that fits the positive it was loaded for: a network of its own, or updates of the positive's."""

    source: str
    """Where it came from, for messages."""
    network: nn.Module | None = None
    """In evaluation mode, without gradients, in the positive's dtype and on its device."""
    deltas: Deltas | None = None
    """Low-rank updates on top of the positive's own weights, in its dtype and on its device."""

    def __post_init__(self) -> None:
        assert (self.network is None) != (self.deltas is None), "either a network or deltas"


@dataclass(frozen=True)
class Loaded:
    """A negative as its files hold it: theta + delta as weights or delta as low-rank updates, and its base's record."""

    source: str
    part: WeightReader | Deltas
    record: dict | None = None

    @property
    def is_lora(self) -> bool:
        """Whether `part` is delta."""
        return not isinstance(self.part, WeightReader)


def load_negative(
    positive: nn.Module,
    source: str | Path | nn.Module | Negative,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    base: str | Path | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> Negative:
    """The negative model for a positive denoiser of a known family, whose weights are left as they are.

    `source`: a training run's output folder or its negative/ part; a pipeline or denoiser folder in diffusers format; a
    Hub id, owner/name, with a folder or a .safetensors file behind it if need be (`revision` and `variant` are of it);
    a safetensors file with full weights or a LoRA; a module, which is taken over; or a Negative, whose network is
    returned as it is unless alpha, beta or base change it.
    `base` is theta, a folder, Hub id or file; needed for alpha other than 1 and where the positive is a fine-tune of
    what the negative was trained from. alpha = 0 takes a negative of full weights as it is, whatever the positive is.

    A LoRA at alpha 1 costs no network: it comes back as updates of the positive's layers, times beta. Everything else
    is a second network, mixed in float32 tensor by tensor.

    Raises UserError, one line, for what cannot be read or does not fit, is not finite, is equal to the positive, or was
    trained from another model; nothing is changed then.
    """
    check_strengths(alpha, beta)
    positive = getattr(positive, "_orig_mod", positive)  # torch.compile's wrapper
    if isinstance(source, Negative) and source.network is not None:
        if alpha == beta == 1 and base is None:
            return source
        source = source.network
    loaded = _load(positive, source, revision, variant)
    theta = None
    if base is not None:
        theta = load_base(positive, base)
    check_base(loaded, theta or _own_weights(positive), alpha, beta, None if base is None else str(base))
    if loaded.is_lora and alpha == 1:
        return Negative(loaded.source, deltas=_scaled(loaded, beta, positive))
    if isinstance(source, nn.Module) and (beta == 1 and (alpha == 0 or (alpha == 1 and theta is None))):
        _refuse_adapters(positive, alpha)
        return Negative(loaded.source, network=_taken_over(source, positive))
    weights = mixed(loaded, positive, theta, alpha, beta)
    return Negative(loaded.source, network=materialise(weights, positive, "negative"))


def check_strengths(alpha: float, beta: float) -> None:
    """UserError where alpha or beta is outside of Eq. 7's range."""
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not 0 <= value <= 1:
            raise UserError(f"{name}: {value} is not possible; expected 0 to 1, as in theta + alpha eta + beta delta")


def _load(positive: nn.Module, source, revision: str | None, variant: str | None) -> Loaded:
    if isinstance(source, Negative):
        _check_deltas(source, positive)
        return Loaded(source.source, source.deltas)
    if isinstance(source, nn.Module):
        name = f"the given {type(source).__name__}"
        if type(source) is not type(positive):
            raise UserError(f"negative: {name} does not fit the model, which is a {type(positive).__name__}")
        if source is positive:
            raise UserError(f"negative: {name} is the positive model itself: guidance would have no effect")
        if has_adapters(source):
            raise UserError(f"negative: {name} has PEFT adapters loaded; fuse and unload them first")
        weights = module_weights(source, name)
        check_class({**source.config, "_class_name": type(source).__name__}, positive, name, "negative")
        check_shapes(weights, _shapes(positive), "negative")
        return Loaded(name, weights)
    found = locate(source, [family_of(positive).denoiser_name], "negative", revision, variant)
    return read_files(found, positive, "negative")


def read_files(found: ModelFiles, model: nn.Module, field: str) -> Loaded:
    """The files of a model that is a fine-tune or an update of `model`, checked against it (its weights are not read).

    Raises UserError, one line that starts with `field`.
    """
    if found.is_lora:
        deltas = read_lora(found.files[0], model, field)
        return Loaded(found.name, deltas, read_record(found.files[0], field))
    weights = file_weights(found, family_of(model), dict(model.config), field)
    check_shapes(weights, _shapes(model), field)
    if found.config is not None:
        check_class(found.config, model, found.name, field)
    return Loaded(found.name, weights, found.record)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in plain_state(module).items()}


def _own_weights(positive: nn.Module) -> WeightReader | None:
    """The positive's weights, or None where they are not in memory (sequential offload keeps them elsewhere)."""
    weights = module_weights(positive, "the positive model")
    return None if any(value.is_meta for value in positive.parameters()) else weights


def load_base(model: nn.Module, base: str | Path) -> WeightReader:
    """theta, checked against the model's architecture. Raises UserError that starts with `base`."""
    loaded = read_files(locate(base, [family_of(model).denoiser_name], "base"), model, "base")
    if loaded.is_lora:
        raise UserError(f"base: {base} is a LoRA; give the model that it belongs to")
    return loaded.part


def check_base(loaded: Loaded, theta: WeightReader | None, alpha: float, beta: float, base: str | None) -> None:
    """Hold the negative's own record of its base against theta: UserError for full weights, a warning for a LoRA.

    theta is the base that was given or, where `base` is None, the positive itself.
    """
    if loaded.record is None or theta is None or (not loaded.is_lora and (alpha, beta) == (0, 1)):
        return
    try:
        trained_from, same = str(loaded.record["path"]), matches(loaded.record["fingerprint"], theta)
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
    if has_adapters(positive) and alpha != 0:
        raise UserError(
            f"alpha: {alpha} needs the positive model's weights, and it has PEFT adapters loaded; fuse and unload them "
            "(fuse_lora, unload_lora_weights) first"
        )


def mixed(
    loaded: Loaded, positive: nn.Module | WeightReader, theta: WeightReader | None, alpha: float, beta: float
) -> WeightReader:
    """Eq. 7 as weights that are computed when they are read; theta None takes the positive as the base.

    Raises UserError where alpha or beta need what is not there: a base, or the positive's own weights.
    """
    as_it_is = beta == 1 and (alpha == 0 or (alpha == 1 and theta is None))
    if isinstance(positive, nn.Module):
        if loaded.is_lora or not (as_it_is and alpha == 0):
            _refuse_adapters(positive, alpha or 1)
        own = _own_weights(positive)
    else:
        own = positive
    if not loaded.is_lora and as_it_is:
        return loaded.part
    if theta is None and alpha != 1:
        raise UserError(f"alpha: {alpha} needs the base model, from which eta = positive - base; give base=...")
    if own is None:
        raise UserError("negative: the positive model's weights are offloaded; load the negative before you offload it")
    return mixture(theta or own, own, loaded.part, alpha, beta, loaded.source)


def _scaled(loaded: Loaded, beta: float, positive: nn.Module) -> Deltas:
    """The updates times beta, in dtype and on the device of the positive's layers."""
    if beta == 0:
        raise UserError("beta: 0 leaves nothing of the negative: guidance would have no effect; give more than 0")
    deltas = {}
    for path, delta in loaded.part.items():
        like = positive.get_submodule(path).weight
        device = torch.device("cpu") if like.is_meta else like.device
        down, up = (factor.to(device, like.dtype) for factor in (delta.down, delta.up))
        if not (down.isfinite().all() and up.isfinite().all()):
            raise UserError(f"negative: {loaded.source}: the update of {path} is too large for {like.dtype}")
        deltas[path] = dataclasses.replace(delta, down=down, up=up, scale=delta.scale * beta)
    return deltas


def _check_deltas(negative: Negative, positive: nn.Module) -> None:
    state = {
        f"{path}.lora_{key}.weight": value
        for path, delta in negative.deltas.items()
        for key, value in (("A", delta.down), ("B", delta.up))
    }
    read_lora(state, positive)


def _taken_over(network: nn.Module, positive: nn.Module) -> nn.Module:
    """A module that is the negative as it is; its weights are looked at and not copied."""
    differs = has_adapters(positive)
    own = plain_state(positive)
    for name, value in network.state_dict().items():
        if not value.isfinite().all():
            raise UserError(f"negative: the given {type(network).__name__} is damaged: {name} is not finite")
        differs = differs or own[name].is_meta or not torch.equal(value.to(own[name]), own[name])
    if not differs:
        raise UserError("negative: the given module equals the positive model: guidance would have no effect")
    like = next(positive.parameters())
    if not like.is_meta:
        network = network.to(like.device)
    if network.dtype != like.dtype:
        network = network.to(like.dtype)
    return network.eval().requires_grad_(False)


def as_network(positive: nn.Module, negative: Negative) -> nn.Module:
    """The negative as a network of its own: with a LoRA a second one is made, the update folded into its weights."""
    if negative.network is not None:
        return negative.network
    weights = mixed(Loaded(negative.source, negative.deltas), positive, None, 1.0, 1.0)
    return materialise(weights, positive, "negative")


__all__ = ["LORA_FILE", "Loaded", "Negative", "as_network", "load_negative", "mix"]

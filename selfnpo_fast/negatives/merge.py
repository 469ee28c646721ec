"""Mixing a negative model once and for all (Eq. 7): from files to files, one tensor at a time."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from selfnpo_fast.diffusion.schedule_facts import ScheduleFacts, check_same_schedule, combined
from selfnpo_fast.models import denoiser_names, family_of
from selfnpo_fast.negatives.experts import Source, bases_by_expert, by_expert
from selfnpo_fast.negatives.fingerprint import DENOISER, base_record
from selfnpo_fast.negatives.load import check_base, check_strengths, mixed, read_files
from selfnpo_fast.negatives.sources import RECORD, locate, parts_of_source
from selfnpo_fast.negatives.weights import WeightReader, mixture
from selfnpo_fast.negatives.write import write_weights
from selfnpo_fast.runtime.dtypes import DTYPES
from selfnpo_fast.runtime.errors import RunError, UserError, one_line, shortened
from selfnpo_fast.runtime.folders import begin_aside, check_writable, finish_aside, remove
from selfnpo_fast.runtime.locks import LOCK


def merge(
    base: str | Path,
    negative: str | Path,
    output: str | Path,
    *,
    positive: str | Path | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    dtype: str = "fp32",
) -> Path:
    """Write theta + alpha eta + beta delta to `output` in diffusers' format; returns that folder.

    Of a model of two experts, those that the negative has are written, each to a folder of its name.

    `base`, `negative` and `positive` (the fine-tune, theta + eta) are sources as for
    `load_negative`, but no modules. `dtype` is fp32, bf16 or fp16. The mixture is computed in
    float32 and rounded once. Only one tensor of each source is in memory at a time, and the folder
    appears once all of it is written.

    Raises UserError where a source cannot be read or does not fit, where the folder is not empty,
    and where the result is not finite or equals the positive; RunError where the folder cannot be
    written.
    """
    check_strengths(alpha, beta)
    if positive is None and alpha != 1:
        raise UserError(f"alpha: {alpha} has no effect without a positive model; give --positive, or leave alpha at 1")
    if dtype not in DTYPES:
        raise UserError(f"dtype: {shortened(dtype)} is not possible; expected one of {', '.join(DTYPES)}")
    folder = new_folder(output)
    # What to mix: one denoiser, or those of two experts that the negative has.
    names = denoiser_names()
    bases = parts_of_source(str(base), names, "base")
    if len(bases) < 2:
        mixtures = [_mixture(None, base, negative, positive, alpha, beta)]
    else:
        own = tuple(bases)
        negatives = by_expert(negative, own)
        positives = {} if positive is None else bases_by_expert(positive, own, negatives, "positive")
        mixtures = [
            _mixture(name, bases[name], each, positives.get(name), alpha, beta) for name, each in negatives.items()
        ]
    # Write next to the folder, and rename at the end.
    aside = None
    try:
        aside = begin_aside(folder)
        for mixed_model in mixtures:
            mixed_model.write(aside, dtype)
        finish_aside(aside, folder)
    except OSError as error:
        raise RunError(f"{folder} could not be written: {one_line(error)}") from error
    finally:
        with suppress(OSError):  # a folder that is left is removed by the next merge
            if aside is not None:
                remove(aside)
    return folder


@dataclass(frozen=True)
class _Mixture:
    """A network to write, of which nothing is computed before it is written."""

    expert: str | None
    """Which of two experts it is; None of a model with one denoiser."""
    model: nn.Module
    """Its class and config; the weights take no memory."""
    result: WeightReader
    """The mixture."""
    tuned: WeightReader
    """The positive."""
    tuned_name: str
    """Where the positive comes from."""
    schedule: ScheduleFacts | None
    """What the sources say of the schedule."""

    def write(self, folder: Path, dtype: str) -> None:
        """Write the denoiser's folder, and the record of its base next to it or, of an expert, in
        it."""
        inside = folder / (self.expert or family_of(self.model).denoiser_name)
        inside.mkdir()
        self.model.save_config(inside)  # type: ignore[operator]
        write_weights(inside, _checked(self.result, self.tuned, dtype), dtype)
        record = base_record(self.tuned_name, None, self.tuned, self.schedule)
        if self.expert is not None:
            record |= {DENOISER: self.expert}
        place = folder if self.expert is None else inside
        (place / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")


def _mixture(
    expert: str | None, base: str | Path, negative: Source, positive: Source | None, alpha: float, beta: float
) -> _Mixture:
    """What to write of one denoiser. Raises UserError as `merge` does."""
    # The base gives the architecture, theta its weights.
    base_files = locate(base, denoiser_names(), "base")
    if base_files.is_lora or base_files.config is None:
        raise UserError(f"base: {base} is no diffusers folder with a config.json; give one, or a Hub id")
    model = empty_model(base_files.config, str(base))
    denoiser = family_of(model).denoiser_name
    loaded_base = read_files(base_files, model, "base")
    theta = loaded_base.content
    assert isinstance(theta, WeightReader)
    # The positive: theta, or a fine-tune, or theta plus the updates of a LoRA.
    tuned, tuned_name, schedules = theta, str(base), [loaded_base.schedule]
    if positive is not None:
        loaded_positive = read_files(locate(str(positive), [denoiser], "positive"), model, "positive")
        check_same_schedule(loaded_positive.schedule, loaded_base.schedule, "positive")
        content = loaded_positive.content
        if not isinstance(content, WeightReader):
            content = mixture(theta, theta, content, 0.0, 1.0, str(positive))
        tuned, tuned_name, schedules = content, str(positive), [loaded_positive.schedule, *schedules]
    # The negative, and the mixture.
    loaded = read_files(locate(str(negative), [denoiser], "negative"), model, "negative")
    for schedule in schedules:
        check_same_schedule(loaded.schedule, schedule)
    check_base(loaded, theta, alpha, beta, str(base))
    result = mixed(loaded, tuned, None if positive is None else theta, alpha, beta)
    return _Mixture(expert, model, result, tuned, tuned_name, combined(tuned_name, [*schedules, loaded.schedule]))


def new_folder(output: str | Path) -> Path:
    """The folder to write, which is empty or does not exist. Raises UserError."""
    folder = check_writable(str(output))
    try:
        if folder.is_dir() and any(entry.name != LOCK for entry in folder.iterdir()):
            raise UserError(f"output: {folder} is not empty; name a new folder")
    except OSError as error:
        raise UserError(f"output: {one_line(error)}; name another folder") from error
    return folder


def empty_model(config: dict, source: str) -> nn.Module:
    """The network of a denoiser's config.json, whose weights take no memory.

    Raises UserError where the class is not known or the config is wrong.
    """
    from accelerate import init_empty_weights

    family = family_of(str(config.get("_class_name")), f"base: {source}")
    try:
        with init_empty_weights():
            return family.new_denoiser(config)
    except Exception as error:  # a constructor raises any type for a wrong config
        raise UserError(f"base: cannot load {source}: {one_line(error)}") from error


def _checked(result: WeightReader, positive: WeightReader, dtype: str) -> WeightReader:
    """`result` in its final dtype. Raises UserError while it is read.

    A tensor that is not finite raises. So does the last tensor where all are equal to the
    positive's.
    """
    target, differs = DTYPES[dtype], False
    seen: set[str] = set()

    def read(name: str) -> torch.Tensor:
        """One tensor, cast and checked."""
        nonlocal differs
        value = result.read(name).to(target).contiguous()
        if not value.isfinite().all():
            raise UserError(f"negative: {result.source} is damaged, or does not fit into {dtype}: {name} is not finite")
        differs = differs or not torch.equal(value, positive.read(name).to(target))
        seen.add(name)
        if not differs and len(seen) == len(result.shapes):
            raise UserError(f"negative: {result.source} equals the positive model: guidance would have no effect")
        return value

    return WeightReader(result.source, result.shapes, read)

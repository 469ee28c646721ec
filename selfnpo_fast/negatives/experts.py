"""Negatives of a model of two experts: which file or folder is for which, and both as one negative."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from selfnpo_fast.models.experts import Experts
from selfnpo_fast.negatives.fingerprint import DENOISER, fingerprint, matches
from selfnpo_fast.negatives.load import Negative, as_network, load_base, load_negative
from selfnpo_fast.negatives.lora_files import read_record
from selfnpo_fast.negatives.sources import locate, parts_of_source
from selfnpo_fast.negatives.weights import module_weights
from selfnpo_fast.runtime.console import say_once
from selfnpo_fast.runtime.errors import UserError, one_line, shortened

Source = str | Path | nn.Module | Negative
"""What a negative is loaded from."""


def by_expert(
    source: Source | Mapping[str, Source], names: Sequence[str], field: str = "negative", revision: str | None = None
) -> dict[str, Source]:
    """What a source holds for each of a pipeline's denoisers, by their names; for some of them, or
    for all.

    A mapping says it. A folder or a Hub id says it by sub-folders of these names, as a run's
    `negative/` does. A single negative says it by its record, or by the name of its folder.

    Raises UserError that begins with `field` where it is not clear.
    """
    if isinstance(source, Mapping):
        unknown = [name for name in source if name not in names]
        if unknown or not source:
            named = shortened(unknown[0]) if unknown else "nothing"
            raise UserError(f"{field}: {named} is no denoiser of the pipeline; it has {' and '.join(names)}")
        return dict(source)
    if len(names) == 1:
        return {names[0]: source}
    if isinstance(source, Experts):
        return dict(source.networks)
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        parts = parts_of_source(path, names, field, revision)
        name = None if parts else _named(path, names, field, revision)
        if parts or name is not None:
            return dict(parts) if name is None else {name: source}
    example = ", ".join(f"{name!r}: ..." for name in names)
    raise UserError(
        f"{field}: the pipeline has {' and '.join(names)}; say which one each negative is for: {{{example}}}"
    )


def bases_by_expert(
    source: Source, names: Sequence[str], wanted: Iterable[str], field: str = "base"
) -> dict[str, Source]:
    """`by_expert` of a model that is needed for all of the denoisers `wanted`. Raises UserError
    where one is missing."""
    found = by_expert(source, names, field)
    absent = next((name for name in wanted if name not in found), None)
    if absent is not None:
        raise UserError(f"{field}: {shortened(str(source))} holds nothing for {absent}; give a model with it")
    return found


def is_own_base(positive: nn.Module, base: str | Path) -> bool:
    """Whether a positive has the weights of its base. Raises UserError where the base cannot be
    read."""
    networks, bases = {"": positive}, {"": base}
    if isinstance(positive, Experts):
        networks, bases = positive.networks, bases_by_expert(base, positive.names, positive.names)
    readers = {name: module_weights(network, "the positive model") for name, network in networks.items()}
    return all(matches(fingerprint(load_base(networks[name], bases[name])), readers[name]) for name in networks)


def _named(path: str, names: Sequence[str], field: str, revision: str | None) -> str | None:
    """Which of the denoisers a single negative says that it is for."""
    files = locate(path, names, field, revision)
    record = read_record(files.files[0], field) if files.is_lora else files.record
    named = (record or {}).get(DENOISER)
    folders = (Path(path).name, Path(path).parent.name)
    return next((name for name in (named, *folders) if name in names), None)


def load_experts(
    positive: Experts, source: Source | Mapping[str, Source], *, base: Any = None, revision: str | None, **options: Any
) -> Negative:
    """The negative of a model of two experts; arguments and errors as for `load_negative`.

    Where the source holds nothing for one of them, that one computes both branches, as in the stock
    pipeline.
    """
    if isinstance(source, Negative):
        return source
    sources = by_expert(source, positive.names, revision=revision)
    bases = {} if base is None else bases_by_expert(base, positive.names, sources)
    loaded = {
        name: load_negative(positive.networks[name], each, base=bases.get(name), revision=revision, **options)
        for name, each in sources.items()
    }
    label = ", ".join(f"{each.source} ({name})" for name, each in loaded.items())
    for name in positive.names:
        if name not in loaded:
            say_once(
                f"negative: {one_line(label, 200)} holds nothing for {name}, which guides as in the stock pipeline"
            )
    schedule = next((each.schedule for each in loaded.values() if each.schedule is not None), None)
    if all(each.deltas is not None for each in loaded.values()):
        deltas = {
            f"{name}.{path}": delta for name, each in loaded.items() for path, delta in (each.deltas or {}).items()
        }
        return Negative(label, deltas=deltas, schedule=schedule)
    networks = {
        name: as_network(network, loaded[name]) if name in loaded else network
        for name, network in positive.networks.items()
    }
    return Negative(label, network=Experts(networks, positive.boundary, positive.family).eval(), schedule=schedule)

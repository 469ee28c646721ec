"""docs/adding_a_model.md names what families have to say: no more than there is, and all that the
shipped ones say."""

from __future__ import annotations

import re
from pathlib import Path

import family_runs

from selfnpo_fast.models import FAMILIES
from selfnpo_fast.models.base import Adapter
from selfnpo_fast.models.family import Family
from selfnpo_fast.models.video import VideoAdapter

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "adding_a_model.md").read_text(encoding="utf-8")


def named(title: str) -> set[str]:
    """The names in the first cells of a section's table."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`(\w+)", cell)}


def said_by(cls: type, base: type) -> set[str]:
    """The public members of a base that a class or a class between the two says anew."""
    between = [c for c in cls.__mro__ if issubclass(c, base) and c is not base]
    return {name for c in between for name in vars(c) if not name.startswith("_") and hasattr(base, name)}


def test_every_name_is_there():
    families, adapters = named("2. The family"), named("1. The adapter")
    annotated = {name for cls in Family.__mro__ for name in getattr(cls, "__annotations__", {})}
    assert {name for name in families if not hasattr(Family, name) and name not in annotated} == set()
    assert {name for name in adapters if not hasattr(Adapter, name)} == set()
    for name in ("latent_sizes", "decode", "encode"):
        assert hasattr(VideoAdapter, name) and f"`{name}`" in PAGE


def test_what_the_shipped_families_say_is_named():
    families, adapters = named("2. The family"), named("1. The adapter")
    for family in FAMILIES.values():
        assert said_by(type(family), Family) - families == set(), type(family).__name__
        if family.adapter is not None:
            assert said_by(family.adapter, Adapter) - adapters == set(), family.adapter.__name__


def test_every_helper_of_the_last_step_is_there():
    root = Path(__file__).resolve().parents[2]
    for path in re.findall(r"`((?:tests|benchmarks|docs|configs)/[\w./]+\.(?:py|md|yaml))`", PAGE):
        assert re.search("[A-Z]{5}", path) or (root / path).is_file(), path
    assert "family_runs.CASES" in PAGE and family_runs.CASES

"""The socket for measures: the two interfaces that a sweep takes, and the roles of measures.

A picture measure scores every picture by itself. A set measure compares all pictures of one arm at
one guidance scale with real samples. Any object with the members of `PictureMeasure` or
`SetMeasure` is a measure; none is registered.

Shape letters: N generated pictures, M real samples, H and W pixels.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

import torch

RESERVED_NAMES = frozenset({"arm", "guidance_scale", "images", "means", "held_out"})
"""Keys of a row in report.json that are no measures; a set measure's name is a key next to them."""

Result = TypeVar("Result")


class PictureMeasure(Protocol):
    """Scores every picture by itself, against its prompt. More is better."""

    name: str
    """The measure's key in report.json; with spaces for underscores, its column in report.md."""

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """The score of every picture.

        `images`: (N, 3, H, W) float32 in [-1, 1], on the CPU.
        `prompts`: the N prompts that the pictures were drawn for.
        Returns (N,): float, or bool for a yes/no measure.
        """
        ...


@dataclass(frozen=True)
class Terms:
    """What a set measure found sample by sample.

    Its value is their mean, and intervals are drawn from them.
    """

    values: torch.Tensor
    """(N,) for generated pictures, (M,) for real samples; float or bool."""
    side: Literal["generated", "real"]
    """Whose terms these are. Pictures are resampled by prompt, real samples one by one."""


class SetMeasure(Protocol):
    """Compares the pictures of one arm at one guidance scale, as a set, with real samples."""

    name: str
    """The measure's key in report.json; with spaces for underscores, its column in report.md."""
    least_images: int
    """The fewest pictures that the measure can compare. A sweep of fewer is refused before any
    picture is drawn."""

    def compare(self, images: torch.Tensor) -> float | Terms:
        """The measure of the set `images`, (N, 3, H, W) float32 in [-1, 1], on the CPU.

        A float is reported as it is; `Terms` are reported as their mean with an interval.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Which measures a sweep's statements rest on, by name.

    Statements that rest on a role which no measure has are left out of reports.
    """

    accuracy: str
    """The picture measure that says whether a picture shows what was asked for, 0 to 1."""
    compared: tuple[str, ...] = ()
    """The picture measures on which paired pictures of two arms play against each other."""
    precision: str | None = None
    """The set measure that says how real the pictures are; more is better.

    It gives terms of generated pictures. It comes with `recall`; without the two there is no
    frontier and no verdict of a gain."""
    recall: str | None = None
    """The set measure that says how much of the real variety is drawn; more is better.

    It gives terms of real samples."""
    distance: str | None = None
    """The set measure that weighs quality and variety together, a float; less is better.

    An arm's best scale is where it is lowest."""


@dataclass(frozen=True, kw_only=True)
class Measures:
    """The measures of a sweep, any number of both kinds.

    Raises ValueError where names or roles contradict.
    """

    picture: Sequence[PictureMeasure]
    """Reported in this order."""
    sets: Sequence[SetMeasure] = ()
    """Reported in this order."""
    roles: Roles
    """Which measures the verdicts rest on."""

    def __post_init__(self) -> None:
        picture, sets = [measure.name for measure in self.picture], [measure.name for measure in self.sets]
        names = [*picture, *sets]
        if len(set(names)) != len(names) or RESERVED_NAMES & set(names):
            raise ValueError(f"measures: names {names} repeat or are among {sorted(RESERVED_NAMES)}; name each apart")
        roles = self.roles
        if missing := {roles.accuracy, *roles.compared} - set(picture):
            raise ValueError(f"roles: {sorted(missing)} are no picture measures; there are {picture}")
        if missing := {roles.precision, roles.recall, roles.distance} - {None, *sets}:
            raise ValueError(f"roles: {sorted(missing)} are no set measures; there are {sets}")
        if (roles.precision is None) != (roles.recall is None):
            raise ValueError("roles: precision and recall are judged together; name both or none")

    @property
    def least_images(self) -> int:
        """The fewest pictures that every set measure can compare; 1 without set measures."""
        return max((measure.least_images for measure in self.sets), default=1)

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """The scores (N,) of images (N, 3, H, W) by every picture measure, by name, on the CPU.

        Raises ValueError where a measure returns another shape.
        """
        scores = {measure.name: measure.score(images, prompts).detach().cpu() for measure in self.picture}
        for name, values in scores.items():
            if values.shape != (len(images),):
                raise ValueError(
                    f"{name}: scores of shape {tuple(values.shape)} for {len(images)} images; return ({len(images)},)"
                )
        return scores

    def compare(self, images: torch.Tensor) -> dict[str, float | Terms]:
        """What every set measure says of images (N, 3, H, W), by name.

        Raises ValueError where a measure does not return what its role needs, or a number that is
        not finite.
        """
        found = {measure.name: measure.compare(images) for measure in self.sets}
        for name, value in found.items():
            self._check_comparison(name, value, len(images))
        return found

    def _check_comparison(self, name: str, value: float | Terms, images: int) -> None:
        kind = value.side if isinstance(value, Terms) else "float"
        roles = self.roles
        needed = {roles.precision: "generated", roles.recall: "real", roles.distance: "float"}.get(name, kind)
        if kind != needed:
            raise ValueError(f"{name}: {kind!r} does not fit the measure's role; return {needed!r}")
        if kind == "float" and not math.isfinite(value):
            raise ValueError(f"{name}: {value} is not finite; look for NaN in the pictures or the measure")
        if kind == "generated" and value.values.shape != (images,):
            raise ValueError(f"{name}: terms of shape {tuple(value.values.shape)} for {images} images; give one each")


class RememberLast(Generic[Result]):
    """Calls `compute(images)` once for all measures that are given the same images tensor in turn.

    Only the result of the last call is kept. The images are known by identity and version, so that
    a change in place computes again; they are not kept alive.
    """

    def __init__(self, compute: Callable[[torch.Tensor], Result]) -> None:
        self._compute = compute
        self._last: tuple[Callable[[], torch.Tensor | None], int | None, Result] | None = None

    def __call__(self, images: torch.Tensor) -> Result:
        """`compute(images)`, or the result of the last call where the images are the same."""
        # Tensors made in inference mode count no versions.
        version = None if images.is_inference() else images._version
        if self._last is not None:
            last_images, last_version, result = self._last
            if last_images() is images and last_version == version:
                return result
        result = self._compute(images)
        self._last = weakref.ref(images), version, result
        return result

"""The captioned pictures of a source: one picture, and the list of all with a count of the others."""

from __future__ import annotations

import os
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch

from selfnpo_fast.data import pixels
from selfnpo_fast.data.rows import shown
from selfnpo_fast.runtime.errors import UserError, one_line
from selfnpo_fast.runtime.files import open_regular
from selfnpo_fast.runtime.limits import MAX_IMAGE_BYTES


@dataclass(frozen=True)
class ClipShape:
    """What is taken of a video: its first frames, `stride` apart."""

    frames: int
    height: int
    """In pixels, as is the width."""
    width: int
    stride: int = 1

    @property
    def needed(self) -> int:
        """How many frames a video has at least."""
        return (self.frames - 1) * self.stride + 1

    def check(self, there: int) -> None:
        """ValueError where a video of so many frames is too short."""
        if there < self.needed:
            every = "" if self.stride == 1 else f", {self.stride} apart"
            raise ValueError(
                f"it has {there:,} frames, and a clip of {self.frames:,}{every} needs {self.needed:,}; lower "
                "model.frames or data.stride, or leave it out"
            )


@dataclass(frozen=True)
class Picture:
    """One captioned picture or video, which is read when it is wanted."""

    label: str
    """The picture's name in messages."""
    caption: str
    """The caption, stripped."""

    @property
    @abstractmethod
    def facts(self) -> tuple[int, int, int]:
        """Numbers that tell whether the picture has changed since it was encoded."""

    @abstractmethod
    def content(self) -> bytes:
        """The encoded picture. Raises ValueError or OSError."""

    def read_square(self, resolution: int) -> torch.Tensor:
        """The central square, (3, resolution, resolution) float32 in [-1, 1].

        Raises UserError with the picture's label where it cannot be read.
        """
        try:
            return pixels.read_square(self.content(), resolution)
        except (ValueError, OSError) as error:
            reason = one_line(error).removeprefix("data.source: ")
            raise UserError(f"data.source: cannot read the image {self.label}: {reason}") from error

    def read_clip(self, clip: ClipShape) -> torch.Tensor:
        """A clip (F, 3, height, width) float32 in [-1, 1].

        Raises UserError with the label where it cannot be read, or has too few frames: a picture
        has one.
        """
        try:
            clip.check(1)
            return pixels.covering(pixels.decoded(self.content()), clip.height, clip.width)[None]
        except (ValueError, OSError) as error:
            reason = one_line(error).removeprefix("data.source: ")
            raise UserError(f"data.source: cannot read a clip from {self.label}: {reason}") from error


@dataclass(frozen=True)
class FilePicture(Picture):
    """A picture that is a whole file, or a byte range of a tar."""

    path: Path
    """The image file, or the tar."""
    offset: int
    """The first byte of the picture in the file `path`."""
    size: int
    """The number of bytes from `offset` on."""
    mtime_ns: int
    """When `path` was last written to, in nanoseconds since 1970."""

    @property
    def facts(self) -> tuple[int, int, int]:
        """Where the picture lies, and when that was last written to."""
        return self.offset, self.size, self.mtime_ns

    def content(self) -> bytes:
        """The bytes of the file, which must be as it was when it was listed."""
        if self.size > MAX_IMAGE_BYTES:
            raise ValueError(f"{self.size:,} bytes are no picture; at most {MAX_IMAGE_BYTES:,} are read")
        with open_regular(self.path, "data.source") as file:
            if os.fstat(file.fileno()).st_mtime_ns != self.mtime_ns:
                raise ValueError(f"{shown(self.path)} has been written to since the run looked at it; start again")
            file.seek(self.offset)
            return file.read(self.size)


class Listing:
    """The pictures of a source in a fixed order, while they are found, and a count of the others."""

    def __init__(
        self, source: str, limit: int, *, column: str | None, skip: bool, field: str, clip: ClipShape | None = None
    ) -> None:
        """`source` as the user wrote it; at most `limit` pictures are taken.

        column   the column or key of captions, or None for the usual one
        skip     count what is bad and go on, instead of raising
        field    the config's field that named the source, for errors
        clip     what is wanted of videos; pictures are wanted without it
        """
        self.source, self.limit, self.column, self.skip, self.field = source, limit, column, skip, field
        self.clip = clip
        self.pictures: list[Picture] = []
        self.passed_over: dict[str, tuple[int, str]] = {}
        """For each reason: how many were passed over, and the name of the first."""
        self.bad: tuple[int, str] = (0, "")
        """How many could not be used, and what was wrong with the first."""
        self.more = False
        """Whether there is more beyond `limit` that was not looked at."""

    @property
    def full(self) -> bool:
        """Whether no more pictures are wanted."""
        return len(self.pictures) >= self.limit

    def pass_over(self, reason: str, name: object) -> None:
        """Count something that looks like a picture, or like a caption, and is not meant to be
        used."""
        count, first = self.passed_over.get(reason, (0, shown(name)))
        self.passed_over[reason] = count + 1, first

    def refuse(self, error: UserError) -> None:
        """Raise `error`, which tells why a picture cannot be used, or count it."""
        if not self.skip:
            raise error
        self.bad = self.bad[0] + 1, self.bad[1] or one_line(error).removeprefix(f"{self.field}: ")


def passed(passed_over: dict[str, tuple[int, str]], bad: tuple[int, str]) -> list[str]:
    """Each reason with its count and the first that was passed over for it."""
    parts = [f"{reason} ({count:,}, such as {first})" for reason, (count, first) in passed_over.items()]
    return parts + ([f"what cannot be used ({bad[0]:,}; the first: {bad[1]})"] if bad[0] else [])


def summary(used: int, passed_over: dict[str, tuple[int, str]], bad: tuple[int, str], more: bool) -> str | None:
    """The line "N of M pictures used; passed over: ..." with counts and reasons; None if all are
    used.

    The arguments are those of a Listing; `bad` may hold those found later.
    """
    parts = passed(passed_over, bad)
    if more:
        parts.append("what lies beyond the limit, not counted")
    total = used + bad[0] + sum(count for count, _ in passed_over.values())
    return f"{used:,} of {total:,} pictures used; passed over: {', '.join(parts)}" if parts else None

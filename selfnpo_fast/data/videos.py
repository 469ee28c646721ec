"""Videos with captions: .mp4 files, and folders whose numbered pictures are the frames of one.

A clip is the first frames of a video, `data.stride` apart, of each the largest central part with the
model's ratio of sides, resized. A video's frame rate and sound are not looked at.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import torch
from PIL import Image

from selfnpo_fast.data import pixels
from selfnpo_fast.data.image_folders import TABLES, beside, inside, is_picture, pass_over, walk
from selfnpo_fast.data.listing import ClipShape, FilePicture, Listing, Picture
from selfnpo_fast.data.pixels import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from selfnpo_fast.data.rows import checked, shown
from selfnpo_fast.runtime.errors import UserError, one_line
from selfnpo_fast.runtime.files import open_regular
from selfnpo_fast.runtime.limits import MAX_VIDEO_FRAMES

NUMBER = re.compile(r"\d+$")
"""What the name of a frame ends in, before its suffix."""


class Video(Picture):
    """One captioned video."""

    def read_square(self, resolution: int) -> torch.Tensor:
        """UserError: a model of pictures is not trained from videos."""
        raise UserError(f"data.source: {self.label} is a video, and the model draws pictures")

    def read_clip(self, clip: ClipShape) -> torch.Tensor:
        """A clip (F, 3, height, width) float32 in [-1, 1]. Raises UserError as in the base."""
        try:
            frames = [pixels.covering(frame, clip.height, clip.width) for frame in self.frames(clip)]
        except UserError as error:
            reason = one_line(error).removeprefix("data.source: ")
            raise UserError(f"data.source: cannot read the video {self.label}: {reason}") from error
        except Exception as error:  # what decoders raise for damaged files has no common base class
            raise UserError(f"data.source: cannot read the video {self.label}: {one_line(error)}") from error
        return torch.stack(frames)

    def frames(self, clip: ClipShape) -> Iterator[Image.Image]:
        """The frames of a clip in RGB. Raises any error."""
        raise NotImplementedError


@dataclass(frozen=True)
class VideoFile(Video):
    """A video that is an .mp4 file."""

    path: Path
    size: int
    mtime_ns: int
    """When the file was last written to, in nanoseconds since 1970."""

    @property
    def facts(self) -> tuple[int, int, int]:
        """Size and time of the file."""
        return 0, self.size, self.mtime_ns

    def frames(self, clip: ClipShape) -> Iterator[Image.Image]:
        """The frames of a clip, by ffmpeg's decoder."""
        with open_regular(self.path, "data.source") as file:
            if os.fstat(file.fileno()).st_mtime_ns != self.mtime_ns:
                raise ValueError("it has been written to since the run looked at it; start again")
            read = 0
            for index, frame in enumerate(_decoded(file, clip.needed)):
                read = index + 1
                if index % clip.stride == 0:
                    yield frame.to_image().rotate(_turn(frame), expand=True)
            clip.check(read)


def _decoded(file: IO[bytes], most: int) -> Iterator[Any]:
    """The first frames of the first video stream of an .mp4 file, at most so many."""
    import av

    # A file object, so that no name in the file can make ffmpeg open another.
    with av.open(file, mode="r", format="mp4") as container:
        if not container.streams.video:
            raise ValueError("there is no video in it")
        stream = container.streams.video[0]
        size = stream.codec_context.width * stream.codec_context.height
        if Image.MAX_IMAGE_PIXELS is not None and size > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"its frames have {size:,} pixels; at most {Image.MAX_IMAGE_PIXELS:,} are read")
        yield from islice(container.decode(stream), most)


def _turn(frame: Any) -> int:
    """By how many degrees a viewer turns a frame, against the clock."""
    return int(getattr(frame, "rotation", 0) or 0) % 360


@dataclass(frozen=True)
class FrameFolder(Video):
    """A video whose frames are the numbered pictures of a folder."""

    files: tuple[FilePicture, ...]
    """The frames in order."""

    @property
    def facts(self) -> tuple[int, int, int]:
        """How many frames there are, their bytes, and when one was last written to."""
        sizes, times = zip(*((file.size, file.mtime_ns) for file in self.files), strict=True)
        return len(self.files), sum(sizes), max(times)

    def frames(self, clip: ClipShape) -> Iterator[Image.Image]:
        """The frames of a clip."""
        clip.check(len(self.files))
        for file in self.files[: clip.needed : clip.stride]:
            try:
                yield pixels.decoded(file.content())
            except ValueError as error:
                raise ValueError(f"{file.path.name}: {one_line(error)}") from error


def is_video(name: str) -> bool:
    """Whether a file of this name is read as a video."""
    return os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES and not name.startswith(".")


def list_videos(folder: Path, listing: Listing) -> None:
    """Add the captioned videos of a folder and of its sub-folders to `listing`.

    A folder's own .mp4 files and folders of frames come first, by name, then those of its
    sub-folders. The caption of `x.mp4`, or of the frames in the folder `x`, is in `x.txt` or
    `x.caption` beside it. Where a folder holds a table, the table's rows take the place of all that.
    Raises UserError for a damaged table.
    """
    for path, folders, files in walk(folder.resolve(), listing):
        tables = [name for name in TABLES if name in files]
        if tables:
            _list_table(path, tables[0], listing)
            folders.clear()
            continue
        framed = {name for name in folders if any(is_picture(file) for file in _names(path / name))}
        folders[:] = [name for name in folders if name not in framed]
        for name in sorted([*framed, *files]):
            if name not in framed and not is_video(name):
                if is_picture(name):
                    listing.pass_over("pictures that are in no folder of frames", path / name)
                else:
                    pass_over(path / name, listing)
            elif listing.full:
                listing.pass_over("beyond the limit", path / name)
            else:
                try:
                    _add(path / name, beside(path, name, set(files), listing), listing)
                except UserError as error:
                    listing.refuse(error)


def list_video(path: Path, listing: Listing) -> None:
    """Add one .mp4 file, with the caption beside it, to `listing`. Raises UserError."""
    _add(path, beside(path.parent, path.name, set(_names(path.parent)), listing), listing)


def _names(folder: Path) -> list[str]:
    """The names in a folder; none of one that cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _list_table(folder: Path, name: str, listing: Listing) -> None:
    """Add the videos that a table names to `listing`."""
    parents: set[Path] = set()
    for number, values in TABLES[name](folder / name, ("file_name", listing.column or "text"), listing.field):
        where = f"{shown(folder / name)}, line {number}"
        try:
            if isinstance(values, UserError):
                raise values
            path = inside(folder, values[0], parents, where, listing.field)
            if listing.full:
                listing.pass_over("beyond the limit", path)
            else:
                _add(path, checked(listing.field, where, values[1]), listing)
        except UserError as error:
            listing.refuse(error)


def _add(path: Path, caption: str, listing: Listing) -> None:
    """Add the video at `path` to `listing`. Raises UserError for what is none."""
    try:
        facts = path.stat()
        if path.is_dir():
            listing.pictures.append(_frame_folder(path, caption, listing))
            return
        if not path.is_file() or not is_video(path.name):
            raise ValueError("it is neither an .mp4 file nor a folder of frames")
    except (OSError, ValueError) as error:  # ValueError: NUL in a name from a table
        raise UserError(f"{listing.field}: cannot read the video {shown(path)}: {one_line(error)}") from error
    listing.pictures.append(VideoFile(shown(path), caption, path, facts.st_size, facts.st_mtime_ns))


def _frame_folder(folder: Path, caption: str, listing: Listing) -> FrameFolder:
    """The video whose frames are the pictures in a folder. Raises ValueError or OSError."""
    numbered: dict[int, FilePicture] = {}
    for name in filter(is_picture, _names(folder)):
        path = folder / name
        number = NUMBER.search(os.path.splitext(name)[0])
        if number is None or len(number[0]) > 18:
            raise ValueError(f"{shown(name)} is no frame: its name does not end in a number")
        if int(number[0]) in numbered:
            raise ValueError(f"{shown(name)} has the number of another frame")
        if not path.is_file():
            raise ValueError(f"{shown(name)} is no regular file")
        facts = path.stat()
        label = shown(path)
        numbered[int(number[0])] = FilePicture(label, caption, path, 0, facts.st_size, facts.st_mtime_ns)
        if len(numbered) > MAX_VIDEO_FRAMES:
            raise ValueError(f"there are more than {MAX_VIDEO_FRAMES:,} frames")
    if not numbered:
        raise ValueError(f"there are no frames in it ({', '.join(sorted(IMAGE_SUFFIXES))})")
    files = tuple(numbered[number] for number in sorted(numbered))
    if listing.clip is not None:
        listing.clip.check(len(files))
    return FrameFolder(shown(folder), caption, files)


def check_decoder(listing: Listing) -> None:
    """UserError where the listing has .mp4 files and there is nothing to decode them with."""
    first = next((video for video in listing.pictures if isinstance(video, VideoFile)), None)
    if first is not None and importlib.util.find_spec("av") is None:
        raise UserError(
            f"{listing.field}: {first.label} needs the package av to be decoded; pip install av, or give folders of "
            "frames"
        )

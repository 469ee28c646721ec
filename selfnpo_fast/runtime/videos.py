"""Videos as .mp4 files, by the optional package av."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from selfnpo_fast.runtime.console import say_once
from selfnpo_fast.runtime.errors import UserError, one_line, shortened
from selfnpo_fast.runtime.folders import whole_file
from selfnpo_fast.runtime.images import to_pil

QUALITY = "18"
"""libx264's constant rate factor: hardly any difference can be seen."""


def check_av(mend: str = "") -> None:
    """UserError where the package av, which writes .mp4 files, is missing; `mend` is another way out."""
    if importlib.util.find_spec("av") is None:
        raise UserError(f"av: the package is missing, which writes .mp4 files; pip install 'selfnpo-fast[video]'{mend}")


def checked_fps(fps: float) -> Fraction:
    """Frames per second as a fraction. Raises UserError for what is no number from 1 to 240."""
    number = math.nan if isinstance(fps, bool) or not isinstance(fps, int | float) else float(fps)
    if not 1 <= number <= 240:
        raise UserError(f"fps: {shortened(fps)} is not possible; expected frames per second, 1 to 240")
    return Fraction(number).limit_denominator(1001)


def write_mp4(frames: torch.Tensor | Sequence[Image.Image], path: str | Path, *, fps: float) -> None:
    """Write a video in H.264; the file is there as a whole or not at all.

    frames    (F, 3, height, width) float in [-1, 1], or F PIL images of one size
    fps       frames per second

    Raises UserError where the package av is missing, for an impossible fps, and for sides that are
    odd, which players do not show, and OSError where the file cannot be written.
    """
    check_av()
    rate = checked_fps(fps)
    pictures = to_pil(frames, least_side=0) if isinstance(frames, torch.Tensor) else [*frames]
    if not pictures or any(picture.size != pictures[0].size for picture in pictures):
        raise UserError("frames: expected at least one, all of one size")
    width, height = pictures[0].size
    if width % 2 or height % 2:
        raise UserError(f"frames: {height} x {width} pixels are no size of an .mp4 file; its sides have to be even")
    import av

    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    if codec != "libx264":
        say_once("av: this build has no libx264; .mp4 files are written as MPEG-4")
    # A file object, so that no name of a file can mean something else to ffmpeg.
    with whole_file(Path(path)) as aside, aside.open("wb") as file:
        try:
            with av.open(file, mode="w", format="mp4") as container:
                stream = container.add_stream(codec, rate=rate, options={"crf": QUALITY} if codec == "libx264" else {})
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                for picture in pictures:
                    frame = av.VideoFrame.from_ndarray(np.asarray(picture.convert("RGB")), format="rgb24")
                    container.mux(stream.encode(frame))
                container.mux(stream.encode())
        except av.error.FFmpegError as error:
            raise OSError(one_line(error)) from error

"""The pixels of an encoded picture as a viewer shows them: turned, on white, in eight bits of RGB.

A colour profile (ICC) is not applied.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from selfnpo_fast.runtime.errors import one_line

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
"""Formats that are read. Others that Pillow knows start programs (EPS) or are seldom meant."""
IMAGE_SUFFIXES = {
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"),
}
"""Of files in these formats, in lower case."""
VIDEO_SUFFIXES = {".mp4"}
"""Of videos that are read, in lower case."""
OTHER_SUFFIXES = {
    *(".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv"),
    *(".heic", ".heif", ".jxl", ".jp2", ".j2k", ".psd", ".svg", ".ico", ".tga", ".ppm", ".pgm"),
    *(".pbm", ".pnm", ".exr", ".hdr", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw", ".orf", ".rw2", ".eps", ".dds"),
}
"""Of pictures and videos that are not read. A source counts them among those that it passes over."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What EXIF's orientation asks a viewer to do (CIPA DC-008, tag 274)."""
_ORIENTATION = 274


def read_square(content: bytes, resolution: int) -> torch.Tensor:
    """The central square of an encoded picture, resized: (3, resolution, resolution) in [-1, 1].

    The result is float32. Raises ValueError as `decoded` does.
    """
    return covering(decoded(content), resolution, resolution)


def decoded(content: bytes) -> Image.Image:
    """An encoded picture in RGB.

    Of an animation it is the first frame. EXIF's orientation is followed, transparent parts show
    white, and 16-bit greys are scaled to 8 bits; modes I and F of Pillow (32-bit TIFF) are taken as
    greys from 0 to 65535 and from 0 to 1. Raises ValueError, with a reason on one line, for what is
    no picture in one of FORMATS, is damaged or has more pixels than Pillow's bound against
    decompression bombs.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            return _on_white(_in_eight_bits(_turned(opened)))
    except UnidentifiedImageError as error:
        raise ValueError(f"it is no {', '.join(FORMATS)}") from error
    except Exception as error:  # what Pillow raises for damaged files has no common base class
        raise ValueError(one_line(error)) from error


def covering(image: Image.Image, height: int, width: int) -> torch.Tensor:
    """The largest central part of an RGB picture with the sides' ratio, resized: (3, height, width)
    float32 in [-1, 1]."""
    scale = min(image.width / width, image.height / height)
    across, down = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = (image.width - across) // 2, (image.height - down) // 2
    image = image.crop((left, top, left + across, top + down))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


def _turned(image: Image.Image) -> Image.Image:
    """The first frame of an opened picture, turned and mirrored as its EXIF data say.

    Pillow's `exif_transpose` also writes the remaining EXIF data anew, and fails where it cannot.
    """
    image.load()
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION))
    except Exception:  # viewers show a picture whose EXIF data are damaged as it lies in the file
        turn = None
    return image if turn is None else image.transpose(turn)


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """A picture of wide greys scaled to L, or to LA where one grey is transparent; others as they
    are. Raises ValueError for values beyond the mode's range."""
    if not image.mode.startswith(("I", "F")):
        return image
    grey, white = np.asarray(image), 1.0 if image.mode == "F" else 65535
    if not (grey.min() >= 0 and grey.max() <= white):  # also where a value is NaN
        raise ValueError(
            f"its greys reach from {grey.min():g} to {grey.max():g} where {white:g} is white; save it in 8 or 16 bits"
        )
    found = Image.fromarray(np.rint(grey * (255.0 / white)).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        found.putalpha(Image.fromarray(np.where(grey == transparent, 0, 255).astype(np.uint8)))
    return found


def _on_white(image: Image.Image) -> Image.Image:
    """An RGB picture: what is transparent shows white."""
    if image.mode == "La":  # has no way to RGBA of its own
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image.convert("RGB")
    transparent = image.info.get("transparency")
    if isinstance(transparent, tuple) and max(transparent) > 255:  # of 16 bits, Pillow has read the upper 8
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")

"""What is read as a picture's pixels, against Pillow's own operations and against plain arithmetic."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from fuzzing import assert_one_line
from PIL import Image, ImageOps

from selfnpo_fast.data.pixels import read_square

SIDE = 8
ORIENTATION = 274


def array(*shape: int, seed: int = 0, high: int = 256, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


def encoded(image: Image.Image, kind: str = "png", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(content: bytes, side: int = SIDE) -> np.ndarray:
    """The levels (side, side, 3), 0 to 255, which have to be whole where nothing is resized."""
    found = read_square(content, side)
    assert found.shape == (3, side, side)
    assert found.dtype == torch.float32
    levels = (found.double().permute(1, 2, 0).numpy() + 1) * 127.5
    np.testing.assert_allclose(levels, levels.round(), rtol=0, atol=1e-4)
    return levels.round()


def on_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """By the definition of alpha, in float64; `alpha` is 0 to 255."""
    share = alpha[..., None] / 255.0
    return rgb * share + 255.0 * (1 - share)


def assert_levels(found: np.ndarray, expected: np.ndarray, within: float = 0) -> None:
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape).astype(np.float64), rtol=0, atol=within)


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tiff"])
def test_exif_orientation_is_followed(kind, orientation):
    """On a square picture, and on one whose crop is not the same before and after the turn."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    for width in (SIDE, SIDE + 5):
        options = {"lossless": True} if kind == "webp" else {}
        content = encoded(Image.fromarray(array(SIDE, width, 3)), kind, exif=exif, **options)
        shown = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        assert shown.size == ((width, SIDE) if orientation < 5 else (SIDE, width))
        left, top = (shown.width - SIDE) // 2, (shown.height - SIDE) // 2
        expected = np.asarray(shown)[top : top + SIDE, left : left + SIDE]
        assert_levels(read(content), expected)


def test_damaged_exif_data_do_not_cost_the_picture():
    exif = b"Exif\0\0II*\0\xff\xff\xff\xff garbage"
    content = encoded(Image.fromarray(array(SIDE, SIDE, 3)), exif=exif)
    assert_levels(read(content), array(SIDE, SIDE, 3))


# Wide greys


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_16_bit_greys_are_scaled(kind):
    narrow = array(SIDE, SIDE)
    content = encoded(Image.fromarray(narrow.astype(np.uint16) * 257), kind)
    assert Image.open(io.BytesIO(content)).mode == "I;16"
    assert_levels(read(content), narrow[..., None])
    wide = array(SIDE, SIDE, high=65536, dtype=np.uint16)
    assert_levels(read(encoded(Image.fromarray(wide), kind)), wide[..., None] / 257, within=0.5)


def test_a_16_bit_grey_is_that_of_a_16_bit_colour_picture():
    """Pillow itself takes the upper 8 of 16 bits of colours: at most one level away."""
    wide = array(SIDE, SIDE, high=65536, dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").repeat(3).tobytes() for row in wide)
    colours = np.asarray(Image.open(io.BytesIO(png(16, 2, rows))).convert("RGB"))
    assert_levels(read(encoded(Image.fromarray(wide))), colours, within=1)


@pytest.mark.parametrize(("dtype", "white"), [(np.int32, 65535), (np.float32, 1.0)])
def test_32_bit_greys(dtype, white):
    narrow = array(SIDE, SIDE)
    content = encoded(Image.fromarray((narrow * (white / 255)).astype(dtype)), "tiff")
    assert Image.open(io.BytesIO(content)).mode in ("I", "F")
    assert_levels(read(content), narrow[..., None])


@pytest.mark.parametrize("value", [-0.5, 1.5, np.nan, np.inf, -1, 65536])
def test_greys_without_a_known_white_are_refused(value):
    grey = np.full((SIDE, SIDE), value, np.float32 if isinstance(value, float) else np.int32)
    with pytest.raises(ValueError, match=r"greys reach from .* save it in 8 or 16 bits") as caught:
        read_square(encoded(Image.fromarray(grey), "tiff"), SIDE)
    assert_one_line(str(caught.value))


# Transparency


def png(depth: int, colour: int, rows: bytes, transparent: bytes = b"") -> bytes:
    """A PNG of SIDE x SIDE, which Pillow cannot write."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", SIDE, SIDE, depth, colour, 0, 0, 0)]
    chunks += [b"tRNS" + transparent] if transparent else []
    chunks += [b"IDAT" + zlib.compress(rows), b"IEND"]
    content = b"\x89PNG\r\n\x1a\n"
    for chunk in chunks:
        content += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return content


@pytest.mark.parametrize("kind", ["png", "webp", "tiff"])
def test_colours_under_transparency_show_white(kind):
    rgba = array(SIDE, SIDE, 4)
    rgba[:4, :, 3] = 0  # hidden colours
    options = {"lossless": True, "exact": True} if kind == "webp" else {}
    content = encoded(Image.fromarray(rgba), kind, **options)
    white = Image.new("RGBA", (SIDE, SIDE), "white")
    assert_levels(read(content), np.asarray(Image.alpha_composite(white, Image.fromarray(rgba)).convert("RGB")))
    assert_levels(read(content), on_white(rgba[..., :3], rgba[..., 3]), within=1)
    assert (read(content)[:4] == 255).all()


def test_grey_with_alpha():
    la = array(SIDE, SIDE, 2)
    content = encoded(Image.fromarray(la, "LA"))
    assert_levels(read(content), on_white(la[..., :1].repeat(3, -1), la[..., 1]), within=1)


def test_one_transparent_colour():
    grey = array(SIDE, SIDE, high=3) * 100
    assert_levels(read(encoded(Image.fromarray(grey), transparency=100)), np.where(grey == 100, 255, grey)[..., None])
    rgb = grey[..., None].repeat(3, -1)
    content = encoded(Image.fromarray(rgb), transparency=(100, 100, 100))
    assert_levels(read(content), np.where(rgb == 100, 255, rgb))
    wide = grey.astype(np.uint16) * 257
    content = encoded(Image.fromarray(wide), transparency=100 * 257)
    assert_levels(read(content), np.where(grey == 100, 255, grey)[..., None])
    rows = b"".join(b"\0" + row.astype(">u2").repeat(3).tobytes() for row in wide)
    content = png(16, 2, rows, struct.pack(">3H", *[100 * 257] * 3))
    assert_levels(read(content), np.where(rgb == 100, 255, rgb))


@pytest.mark.parametrize("transparency", [7, bytes([255, 0, 128]), bytes(range(256))])
def test_palettes_with_transparency(transparency):
    index, palette = array(SIDE, SIDE), array(256, 3, seed=1)
    image = Image.fromarray(index, "P")
    image.putpalette(palette.tobytes())
    alpha = np.full(256, 255)
    if isinstance(transparency, int):
        alpha[transparency] = 0
    else:
        alpha[: len(transparency)] = list(transparency)
    index[0, :4] = [7, 0, 1, 2]
    image = Image.fromarray(index, "P")
    image.putpalette(palette.tobytes())
    content = encoded(image, transparency=transparency)
    assert_levels(read(content), on_white(palette[index], alpha[index]), within=1)


def test_a_gif_with_transparency_shows_white():
    index = array(SIDE, SIDE, high=4)
    image = Image.fromarray(index, "P")
    image.putpalette(bytes([10, 20, 30, 200, 0, 0, 0, 200, 0, 0, 0, 200]))
    found = read(encoded(image, "gif", transparency=1))
    assert (found[index == 1] == 255).all()
    assert (found[index == 2] == [0, 200, 0]).all()


# Other modes and animations


@pytest.mark.parametrize("kind", ["jpeg", "tiff"])
def test_cmyk_is_as_pillow_converts_it(kind):
    content = encoded(Image.fromarray(array(SIDE, SIDE, 4) // 2, "CMYK"), kind)
    opened = Image.open(io.BytesIO(content))
    assert opened.mode == "CMYK"
    assert_levels(read(content), np.asarray(opened.convert("RGB")))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_modes_without_transparency(mode):
    image = Image.fromarray(array(SIDE, SIDE, 3)).convert(mode)
    assert_levels(read(encoded(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_of_an_animation_the_first_frame(kind):
    frames = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("#ff0000", "#00ff00", "#0000ff")]
    options = {"lossless": True} if kind == "webp" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(content)).n_frames == 3
    assert_levels(read(content), np.array([255, 0, 0]))


def test_avif():
    content = encoded(Image.new("RGB", (16, 16), (200, 100, 50)), "avif", quality=100)
    assert_levels(read(content, 16), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


# What is refused


def test_a_decompression_bomb_is_one_line():
    chunks = png(8, 2, bytes(99)).replace(struct.pack(">II", SIDE, SIDE), struct.pack(">II", 1 << 16, 1 << 15), 1)
    header = chunks[12:29]
    content = chunks[:29] + struct.pack(">I", zlib.crc32(header)) + chunks[33:]
    with pytest.raises(ValueError, match="decompression bomb") as caught:
        read_square(content, SIDE)
    assert_one_line(str(caught.value))


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tiff", "bmp", "gif", "avif"])
def test_truncated_pictures_are_one_line(kind):
    content = encoded(Image.fromarray(array(64, 64, 3)), kind)
    for share in (0.2, 0.6, 0.9):
        with pytest.raises(ValueError) as caught:
            read_square(content[: int(share * len(content))], SIDE)
        assert_one_line(str(caught.value))

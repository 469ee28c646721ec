"""Tensors to PIL images, and pages of images with captions."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

CAPTION_SIZE = 13  # pixels
MARGIN = 8  # pixels around a tile of a grid
MIN_TILE = 96  # pixels; smaller pictures are enlarged by a whole factor
SHOWN_FRAMES = 6
"""Frames of a video in a grid."""


def to_pil(images: torch.Tensor, least_side: int = MIN_TILE) -> list[Image.Image]:
    """PIL images of a tensor (N, 3, H, W) in [-1, 1].

    Images smaller than `least_side` pixels are enlarged by a whole factor; 0 keeps their size.
    """
    pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    factor = max(1, -(-least_side // max(pixels.shape[1:3])))
    size = (pixels.shape[2] * factor, pixels.shape[1] * factor)
    return [Image.fromarray(picture).resize(size, Image.Resampling.NEAREST) for picture in pixels]


def image_grid(
    images: torch.Tensor | Sequence[Image.Image],
    columns: int,
    captions: Sequence[str] | None = None,
    title: str | None = None,
) -> Image.Image:
    """A page of images in rows of `columns`, each with its caption wrapped below it.

    `images` is (N, 3, H, W) float in [-1, 1] (small ones are enlarged without smoothing), or PIL
    images of one size.
    """
    tiles = to_pil(images) if isinstance(images, torch.Tensor) else list(images)
    if not tiles or columns < 1:
        raise ValueError(f"columns: {columns} for {len(tiles)} images is not possible; give at least one of each")
    if captions is not None and len(captions) != len(tiles):
        raise ValueError(f"captions: {len(captions)} of them for {len(tiles)} images; give one per image")
    # Sizes: all cells get the room that the longest caption needs.
    font = ImageFont.load_default(CAPTION_SIZE)
    line_height = round(1.3 * CAPTION_SIZE)
    width, height = tiles[0].size
    texts = [_wrap(caption, font, width) for caption in captions or [""] * len(tiles)]
    text_height = line_height * max(len(text) for text in texts)
    from diffusers.utils import make_image_grid

    # A cell per image with its caption below it; blank cells fill the last row.
    cells = []
    for tile, text in zip(tiles, texts, strict=True):
        cell = Image.new("RGB", (width + 2 * MARGIN, height + text_height + 2 * MARGIN), "white")
        cell.paste(tile, (MARGIN, MARGIN))
        draw = ImageDraw.Draw(cell)
        for i, line in enumerate(text):
            draw.text((MARGIN, MARGIN + height + 2 + i * line_height), line, fill="black", font=font)
        cells.append(cell)
    blank = Image.new("RGB", cells[0].size, "white")
    cells += [blank] * (-len(cells) % columns)
    page = make_image_grid(cells, len(cells) // columns, columns)
    # The title above the page.
    if title is None:
        return page
    heading = _wrap(title, font, page.width - 2 * MARGIN)
    titled = Image.new("RGB", (page.width, page.height + MARGIN + line_height * len(heading)), "white")
    for i, line in enumerate(heading):
        ImageDraw.Draw(titled).text((MARGIN, MARGIN + i * line_height), line, fill="black", font=font)
    titled.paste(page, (0, titled.height - page.height))
    return titled


def shown_frames(frames: int) -> list[int]:
    """The indices of the frames of a video that a grid shows: the first, the last, and some evenly
    spaced between them."""
    most = min(frames, SHOWN_FRAMES)
    return [round(i * (frames - 1) / max(1, most - 1)) for i in range(most)]


def frame_grid(frames: torch.Tensor, indices: Sequence[int], captions: Sequence[str]) -> Image.Image:
    """A page of videos, a row for each.

    frames      (N, K, 3, H, W) float in [-1, 1]
    indices     the K frames' places in the videos, from 0
    captions    N, below the rows' first frames
    """
    later = [f"frame {index + 1}" for index in indices[1:]]
    texts = [text for caption in captions for text in (caption, *later)]
    return image_grid(frames.flatten(0, 1), frames.shape[1], texts)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of `text` that fit into `width` pixels."""
    letter = font.getlength("abcdefghijklmnopqrstuvwxyz ") / 27
    return textwrap.wrap(text, max(8, int(width / letter))) or [""]

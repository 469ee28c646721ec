"""Tensors to pictures."""

from __future__ import annotations

import torch
from PIL import Image


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """Pictures (N, 3, H, W) in [-1, 1] as PIL images."""
    array = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in array]


def image_grid(images: torch.Tensor, columns: int, least_side: int = 96) -> Image.Image:
    """One picture of all, row by row; small ones are enlarged by whole factors to `least_side` pixels."""
    from diffusers.utils import make_image_grid

    pictures = to_pil(images)
    factor = max(1, -(-least_side // pictures[0].width))
    pictures = [p.resize((p.width * factor, p.height * factor), Image.Resampling.NEAREST) for p in pictures]
    rows = -(-len(pictures) // columns)
    pictures += [Image.new("RGB", pictures[0].size, "white")] * (rows * columns - len(pictures))
    return make_image_grid(pictures, rows, columns)

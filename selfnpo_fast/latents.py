"""Latents of real images with captions, for rollouts that start from data (Eq. 14)."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

from selfnpo_fast.errors import UserError

ASSETS = Path(__file__).resolve().parent / "assets" / "digits"
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True)
class RealData:
    """Scaled latents (N, C, H, W) float32 and one caption each."""

    latents: torch.Tensor
    captions: list[str]


def load_real_data(source: str, adapter, *, limit: int, seed: int, device: torch.device) -> RealData:
    """The embedded digits' latents for `digits`, otherwise the images of folder `source`, encoded by the model's VAE.

    A folder holds images with captions in metadata.jsonl or metadata.csv (`file_name` and `text`), or in a .txt file
    beside each image. Images are cropped to a centred square and resized. Raises UserError naming the bad file.
    """
    if source == "digits":
        return _embedded(adapter, limit)
    folder = Path(os.path.expanduser(source))
    if not os.path.isdir(folder):  # which, unlike Path.is_dir, takes names of any length
        raise UserError(f"data.source: no such folder: {source}; give a folder of images with captions, or 'digits'")
    pairs = _captioned(folder)[:limit]
    if not pairs:
        raise UserError(f"data.source: {source} holds no captioned images (metadata.jsonl, metadata.csv or .txt files)")
    latents = [
        adapter.encode(_read_square(path, adapter.resolution)[None].to(device), seed + i).cpu()
        for i, (path, _) in enumerate(pairs)
    ]
    return RealData(torch.cat(latents), [caption for _, caption in pairs])


def _embedded(adapter, limit: int) -> RealData:
    with safe_open(ASSETS / "latents.safetensors", "pt") as file:
        latents = file.get_tensor("latents")[:limit].float()
        index = file.get_tensor("prompt_index")[:limit].long().tolist()
    if tuple(latents.shape[1:]) != tuple(adapter.latent_shape):
        raise UserError(
            f"data.source: 'digits' holds latents of shape {tuple(latents.shape[1:])}, but the model needs "
            f"{tuple(adapter.latent_shape)}; it fits the embedded digits model alone"
        )
    prompts = (ASSETS / "prompts.txt").read_text().splitlines()
    return RealData(latents, [prompts[i] for i in index])


def _captioned(folder: Path) -> list[tuple[Path, str]]:
    """(image, caption) pairs in a fixed order."""
    for name in ("metadata.jsonl", "metadata.csv"):
        table = folder / name
        if table.is_file():
            return [_row(folder, table, number, row) for number, row in enumerate(_rows(table), 1)]
    images = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    missing = [path.name for path in images if not path.with_suffix(".txt").is_file()]
    if missing:
        raise UserError(f"data.source: {folder / missing[0]} has no caption; put it into {Path(missing[0]).stem}.txt")
    return [(path, _read_text(path.with_suffix(".txt")).strip()) for path in images]


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.source: {path} cannot be read as UTF-8 text: {error}") from error


def _rows(table: Path) -> list[dict]:
    text = _read_text(table)
    if table.suffix == ".csv":
        try:
            return list(csv.DictReader(io.StringIO(text, newline="")))
        except csv.Error as error:
            raise UserError(f"data.source: {table} is not CSV: {error}") from error
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(f"data.source: {table} line {number} is not JSON: {error}") from error
    return rows


def _row(folder: Path, table: Path, number: int, row: object) -> tuple[Path, str]:
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or not isinstance(row.get("text"), str):
        raise UserError(f"data.source: {table} row {number} needs the strings file_name and text")
    path = (folder / row["file_name"]).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise UserError(f"data.source: {table} row {number}: {row['file_name']!r} lies outside {folder}")
    return path, row["text"].strip()


def _read_square(path: Path, resolution: int) -> torch.Tensor:
    """(3, resolution, resolution) float32 in [-1, 1]: centre crop, then resize."""
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"data.source: cannot read the image {path}: {error}") from error
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((resolution, resolution), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1

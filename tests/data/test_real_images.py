"""Real images with captions, and the embedded digits' latents."""

from __future__ import annotations

import csv
import json
import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional

from selfnpo_fast.config import DataConfig, TrainConfig
from selfnpo_fast.data import latent_store
from selfnpo_fast.data.real_images import load_real_data
from selfnpo_fast.models import Family, load_adapter
from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.runtime.world import World
from selfnpo_fast.scoring.digits.domain import digits_domain
from selfnpo_fast.scoring.digits.measures import digits_measures
from selfnpo_fast.scoring.digits.scorer import FittedScorer
from selfnpo_kernels.rng import Draw, NoiseKey, draw_id, normal


class Mirror:
    """An adapter whose latents are the pixels that it is given."""

    path, resolution, latent_shape, vae_sha256, family = "mirror", 8, (3, 8, 8), "0" * 64, Family()

    def encode(self, images: torch.Tensor, ids: torch.Tensor, seed: int) -> torch.Tensor:
        return images


def load(folder: Path | str, limit: int = 100, adapter=None):
    """The real data of `folder`, with a store inside that folder and seed 40."""
    data = DataConfig(source=str(folder), limit=limit, store=str(Path(folder) / "latents"))
    world = World(0, 1, torch.device("cpu"))
    return load_real_data(TrainConfig(data=data, seed=40), adapter or Mirror(), world)


def picture(seed: int, width: int = 8, height: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pixels(image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).astype(np.float64) / 127.5 - 1).permute(2, 0, 1).float()


def save(folder: Path, name: str, array: np.ndarray) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(folder / name)


def assert_holds(data, expected: dict[str, np.ndarray]) -> None:
    """The captions are in order, each with its picture."""
    assert data.captions == list(expected)
    torch.testing.assert_close(data.latents, torch.stack([pixels(p) for p in expected.values()]), rtol=0, atol=1e-6)


def test_captions_beside_the_images(tmp_path):
    for i, name in enumerate(["b.png", "a.bmp", "c.PNG"]):
        save(tmp_path, name, picture(i))
        (tmp_path / name).with_suffix(".txt").write_text(f"  number {i}, café\n", encoding="utf-8")
    (tmp_path / "notes.md").write_text("no image")
    expected = {"number 1, café": picture(1), "number 0, café": picture(0), "number 2, café": picture(2)}
    assert_holds(load(tmp_path), expected)
    assert_holds(load(tmp_path, limit=1), {"number 1, café": picture(1)})


ROWS = {"last.png": 'the "first", a dog', "sub/x.png": "zwölf", "a.png": "line\nbreak"}


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_captions_of_a_table_in_its_order(tmp_path, kind):
    for i, name in enumerate(ROWS):
        save(tmp_path, name, picture(i))
    save(tmp_path, "not-listed.png", picture(9))
    with (tmp_path / f"metadata.{kind}").open("w", encoding="utf-8", newline="") as file:
        if kind == "jsonl":
            for name, text in ROWS.items():
                print(json.dumps({"file_name": name, "text": text, "more": 1}, ensure_ascii=False), file=file)
            print(file=file)
        else:
            writer = csv.writer(file)
            writer.writerow(["text", "file_name"])
            writer.writerows([text, name] for name, text in ROWS.items())
    data = load(tmp_path)
    assert_holds(data, {text: picture(i) for i, text in enumerate(ROWS.values())})


def test_jsonl_lines_end_at_newlines_alone(tmp_path):
    """JSON strings may hold U+2028 and U+0085 unescaped."""
    save(tmp_path, "a.png", picture(0))
    text = "one\u2028two\u0085three"
    line = json.dumps({"file_name": "a.png", "text": text}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(line + "\n", encoding="utf-8")
    assert load(tmp_path).captions == [text]


@pytest.mark.parametrize(("width", "height", "crop"), [(14, 8, np.s_[:, 3:11]), (8, 12, np.s_[2:10, :])])
def test_the_centre_is_kept(tmp_path, width, height, crop):
    array = picture(5, width, height)
    save(tmp_path, "a.png", array)
    (tmp_path / "a.txt").write_text("x")
    assert_holds(load(tmp_path), {"x": array[crop]})


@pytest.mark.parametrize(
    ("width", "height", "crop"),
    [(48, 32, np.s_[:, 8:40]), (20, 31, np.s_[5:25, :]), (6, 5, np.s_[:, 0:5]), (8, 64, np.s_[28:36, :])],
)
def test_crop_then_resize_to_the_resolution(tmp_path, width, height, crop):
    """Against the antialiased bicubic filter of torch, which is Pillow's, on the crop only."""
    # No overshoot beyond 0..255, which Pillow cuts after either axis.
    array = picture(5, width, height) // 2 + 64
    save(tmp_path, "a.png", array)
    (tmp_path / "a.txt").write_text("x")
    square = torch.from_numpy(array[crop].copy()).permute(2, 0, 1)[None].double()
    resized = functional.interpolate(square, (8, 8), mode="bicubic", antialias=True)
    # Pillow rounds to whole levels after either axis: observed 0.9.
    torch.testing.assert_close((load(tmp_path).latents + 1) * 127.5, resized.float(), rtol=0, atol=1.5)


def test_other_modes_become_rgb(tmp_path):
    grey = picture(6)[..., 0]
    save(tmp_path, "a.png", grey)
    (tmp_path / "a.txt").write_text("x")
    assert_holds(load(tmp_path), {"x": np.repeat(grey[..., None], 3, axis=2)})


def write_pictures(folder: Path, count: int) -> list[np.ndarray]:
    arrays = [picture(i, 64, 64) for i in range(count)]
    for i, array in enumerate(arrays):
        save(folder, f"{i:02d}.png", array)
        (folder / f"{i:02d}.txt").write_text(f"picture {i}")
    return arrays


def test_latents_are_the_vaes_scaled_posterior_with_noise_by_place(tmp_path):
    model, folder = tiny.write_sd(tmp_path / "model"), tmp_path / "images"
    arrays = write_pictures(folder, 3)
    data = load(folder, adapter=load_adapter(str(model)))
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae")
    for i, array in enumerate(arrays):
        with torch.no_grad():
            posterior = vae.encode(pixels(array)[None]).latent_dist
        key = NoiseKey(40, torch.tensor([i]), draw_id(Draw.POSTERIOR))
        expected = vae.config.scaling_factor * (posterior.mean + posterior.std * normal(key, posterior.mean.shape[1:]))
        torch.testing.assert_close(data.latents[i : i + 1], expected, rtol=1e-5, atol=1e-6)
    assert data.captions == ["picture 0", "picture 1", "picture 2"]


def test_latents_do_not_depend_on_the_batch(tmp_path, monkeypatch):
    model, folder = tiny.write_sd(tmp_path / "model"), tmp_path / "images"
    write_pictures(folder, 20)
    found = []
    for batch in (1, 16):
        monkeypatch.setattr(latent_store, "BATCH", batch)
        data = DataConfig(source=str(folder), store=str(tmp_path / f"by {batch}"))
        world = World(0, 1, torch.device("cpu"))
        found.append(load_real_data(TrainConfig(data=data), load_adapter(str(model)), world).latents)
    # The convolutions round differently: observed 1.9e-7 where latents reach 0.96.
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=2e-6)


def test_by_default_runs_beside_each_other_share_a_store(tmp_path):
    save(tmp_path / "images", "a.png", picture(0))
    (tmp_path / "images" / "a.txt").write_text("x")
    for run in ("one", "two"):
        config = TrainConfig(data=DataConfig(source=str(tmp_path / "images")), output=str(tmp_path / "runs" / run))
        assert_holds(load_real_data(config, Mirror(), World(0, 1, torch.device("cpu"))), {"x": picture(0)})
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["latents"]
    [folder] = (tmp_path / "runs" / "latents").iterdir()
    assert folder.name.startswith("images-")


def test_the_autoencoders_hash_follows_weights_and_config(tmp_path):
    model = tiny.write_sd(tmp_path / "model")
    before = load_adapter(str(model)).vae_sha256
    tiny.write_sd(tmp_path / "copy")
    assert load_adapter(str(tmp_path / "copy")).vae_sha256 == before
    config = model / "vae" / "config.json"
    text = config.read_text()
    config.write_text(json.dumps(json.loads(text) | {"scaling_factor": 0.13025}))
    assert load_adapter(str(model)).vae_sha256 != before
    config.write_text(text)
    weights = load_file(model / "vae" / "diffusion_pytorch_model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1e-3
    save_file(weights, model / "vae" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    assert load_adapter(str(model)).vae_sha256 != before


def test_digits_latents_show_what_their_captions_say():
    adapter = load_adapter("digits")
    data = load("digits", limit=64, adapter=adapter)
    labels = [digits_domain().parse(caption) for caption in data.captions]
    assert len(labels) == 64
    assert None not in labels
    assert len(set(labels)) > 40
    measures, images = digits_measures(FittedScorer.load()), adapter.decode(data.latents)
    scores = measures.score(images, data.captions)
    assert scores["digit_correct"].float().mean() > 0.95
    assert scores["colour_match"].float().mean() > 0.95
    wrong = measures.score(images, data.captions[1:] + data.captions[:1])
    assert wrong["colour_match"].float().mean() < 0.2


def test_digits_fit_no_other_model(tmp_path):
    adapter = load_adapter(str(tiny.write_sd(tmp_path / "model")), resolution=128)
    with pytest.raises(UserError, match=r"^data\.source: 'digits' holds latents of shape \(4, 8, 8\), but"):
        load("digits", adapter=adapter)


def test_column_and_on_bad_of_the_config(tmp_path):
    save(tmp_path / "images", "a.png", picture(0))
    rows = [{"file_name": "gone.png", "long": "x"}, {"file_name": "a.png", "text": "short", "long": ["long", "longer"]}]
    (tmp_path / "images" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = DataConfig(source=str(tmp_path / "images"), column="long", on_bad="skip", store=str(tmp_path / "stores"))
    world = World(0, 1, torch.device("cpu"))
    assert_holds(load_real_data(TrainConfig(data=data), Mirror(), world), {"long": picture(0)})
    with pytest.raises(UserError, match=r"^data\.source: cannot read the image .*gone\.png"):
        load_real_data(TrainConfig(data=replace(data, on_bad="stop")), Mirror(), world)


def no_captions(folder: Path) -> str:
    save(folder, "a.png", picture(0))
    return "a.png has no caption; put it into a.txt"


def no_images(folder: Path) -> str:
    (folder / "a.txt").write_text("a caption")
    return "holds no captioned images"


def empty_table(folder: Path) -> str:
    (folder / "metadata.csv").write_text("file_name,text\n")
    return "holds no captioned images"


def bad_json(folder: Path) -> str:
    save(folder, "a.png", picture(0))
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n{"file_name":\n')
    return "metadata.jsonl, line 2: no JSON"


def list_for_a_row(folder: Path) -> str:
    (folder / "metadata.jsonl").write_text('["a.png", "x"]\n')
    return "metadata.jsonl, line 1: JSON, but no object"


def number_for_a_text(folder: Path) -> str:
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": 7}\n')
    return "metadata.jsonl, line 1: the caption is int 7, not text"


def short_record(folder: Path) -> str:
    (folder / "metadata.csv").write_text("file_name,text\na.png\n")
    return "metadata.csv, line 2: 1 fields, 'a.png', where the first line has 2"


def outside_by_parent(folder: Path) -> str:
    save(folder.parent, "secret.png", picture(0))
    (folder / "metadata.jsonl").write_text('{"file_name": "../secret.png", "text": "x"}\n')
    return "'../secret.png' lies outside"


def outside_by_root(folder: Path) -> str:
    save(folder.parent, "secret.png", picture(0))
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": str(folder.parent / "secret.png"), "text": "x"}))
    return "secret.png' lies outside"


def outside_by_linked_folder(folder: Path) -> str:
    save(folder.parent, "secrets/secret.png", picture(0))
    (folder / "link").symlink_to(folder.parent / "secrets")
    (folder / "metadata.jsonl").write_text('{"file_name": "link/secret.png", "text": "x"}\n')
    return "'link/secret.png' lies outside .*, or behind a link to a folder"


def nul_in_a_name(folder: Path) -> str:
    (folder / "metadata.jsonl").write_text('{"file_name": "a\\u0000/b.png", "text": "x"}\n')
    return "metadata.jsonl, line 1: .*a.x00/b.png' lies outside"


def surrogate_in_a_name(folder: Path) -> str:
    (folder / "metadata.jsonl").write_text('{"file_name": "a\\ud800.png", "text": "x"}\n')
    return "cannot read the image .*a.*ud800.png"


def no_name(folder: Path) -> str:
    (folder / "metadata.jsonl").write_text('{"file_name": null, "text": "x"}\n')
    return "metadata.jsonl, line 1: file_name is None"


def pipe_as_image(folder: Path) -> str:
    os.mkfifo(folder / "a.png")
    (folder / "a.txt").write_text("x")
    return "cannot read the image .*a.png: it is no regular file"


def device_as_image(folder: Path) -> str:
    (folder / "a.png").symlink_to("/dev/zero")
    (folder / "a.txt").write_text("x")
    return "cannot read the image .*a.png: it is no regular file"


def pipe_as_caption(folder: Path) -> str:
    save(folder, "a.png", picture(0))
    os.mkfifo(folder / "a.txt")
    return "a.txt is no regular file"


def pipe_as_table(folder: Path) -> str:
    os.mkfifo(folder / "metadata.jsonl")
    return "metadata.jsonl is no regular file"


def link_to_nothing(folder: Path) -> str:
    (folder / "a.png").symlink_to("gone.png")
    (folder / "a.txt").write_text("x")
    return "cannot read the image .*a.png: .*No such file"


def long_caption(folder: Path) -> str:
    save(folder, "a.png", picture(0))
    (folder / "a.txt").write_text("x" * 10_001)
    return "a.txt: a caption of 10,001 characters"


def huge_caption(folder: Path) -> str:
    save(folder, "a.png", picture(0))
    with (folder / "a.txt").open("w") as file:
        file.truncate(1 << 40)  # a sparse terabyte
    return "a.txt is larger than 1,048,576 bytes"


def long_caption_in_a_table(folder: Path) -> str:
    save(folder, "a.png", picture(0))
    (folder / "metadata.csv").write_text(f"file_name,text\na.png,{'x' * 10_001}\n")
    return "metadata.csv, line 2: a caption of 10,001 characters"


def nul_in_a_caption(folder: Path) -> str:
    save(folder, "a.png", picture(0))
    (folder / "a.txt").write_text("red\0fox")
    return "a.txt: a NUL character after 'red'"


def no_such_image(folder: Path) -> str:
    (folder / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "x"}\n')
    return "cannot read the image .*gone.png"


def no_image_at_all(folder: Path) -> str:
    (folder / "a.png").write_bytes(b"not a picture")
    (folder / "a.txt").write_text("x")
    return "cannot read the image .*a.png"


def cut_off_image(folder: Path) -> str:
    save(folder, "a.png", picture(0, 64, 64))
    content = (folder / "a.png").read_bytes()
    (folder / "a.png").write_bytes(content[: len(content) // 2])
    (folder / "a.txt").write_text("x")
    return "cannot read the image .*a.png"


def broken_chunk(folder: Path) -> str:
    """Pillow raises SyntaxError for it, which is no OSError."""
    save(folder, "a.png", picture(0, 64, 64))
    content = (folder / "a.png").read_bytes()
    start = content.index(b"IDAT") + 4
    part = b"IDAT" + content[start : start + 100]
    chunk = struct.pack(">I", 100) + part + struct.pack(">I", zlib.crc32(part))
    (folder / "a.png").write_bytes(content[: start - 8] + chunk + b"\0\0\0\1!!!!" + content[start:])
    (folder / "a.txt").write_text("x")
    return "cannot read the image .*a.png"


def caption_not_utf8(folder: Path) -> str:
    save(folder, "a.png", picture(0))
    (folder / "a.txt").write_bytes(b"caf\xe9")
    return "a.txt.* UTF-8"


def table_not_utf8(folder: Path) -> str:
    save(folder, "a.png", picture(0))
    (folder / "metadata.csv").write_bytes(b"file_name,text\na.png,caf\xe9\n")
    return "metadata.csv.* UTF-8"


MISTAKES = [
    no_captions,
    no_images,
    empty_table,
    bad_json,
    list_for_a_row,
    number_for_a_text,
    short_record,
    outside_by_parent,
    outside_by_root,
    outside_by_linked_folder,
    nul_in_a_name,
    surrogate_in_a_name,
    no_name,
    pipe_as_image,
    device_as_image,
    pipe_as_caption,
    pipe_as_table,
    link_to_nothing,
    long_caption,
    huge_caption,
    long_caption_in_a_table,
    nul_in_a_caption,
    no_such_image,
    no_image_at_all,
    cut_off_image,
    broken_chunk,
    caption_not_utf8,
    table_not_utf8,
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_mistakes_are_told_in_one_line(tmp_path, mistake):
    folder = tmp_path / "images"
    folder.mkdir()
    expected = mistake(folder)
    with pytest.raises(UserError, match=f"^data.source: .*{expected}") as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"^data\.source: no such folder, file or dataset: /nowhere/images; "):
        load("/nowhere/images")

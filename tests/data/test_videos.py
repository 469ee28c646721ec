"""Videos as a source of latents: .mp4 files and folders of frames, read, cut, counted and refused."""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import tiny_transformers
import torch
from PIL import Image

from selfnpo_fast.data.image_sources import open_source
from selfnpo_fast.data.latent_store import stored_latents
from selfnpo_fast.data.listing import ClipShape
from selfnpo_fast.models.cogvideox import CogVideoXAdapter
from selfnpo_fast.models.folder import open_folder
from selfnpo_fast.models.size import AskedSize
from selfnpo_fast.models.wan import WanAdapter
from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.runtime.world import World

CLIP = ClipShape(frames=5, height=16, width=32)


def grey(i: int) -> int:
    """The grey of a video's frame i."""
    return 20 + 20 * i


def write_mp4(path: Path, frames: int = 6, size: tuple[int, int] = (64, 32), caption: str | None = "a cat") -> Path:
    """A video of grey frames, each lighter than the last; width and height in pixels."""
    import av  # here, so that tests are collected where the package is missing

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i in range(frames):
            picture = np.full((size[1], size[0], 3), grey(i), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def write_frames(folder: Path, frames: int = 6, caption: str | None = "a dog", name: str = "frame_{}.png") -> Path:
    """A folder of frames of noise, whose names do not sort as their numbers do."""
    folder.mkdir(parents=True)
    for i in range(frames):
        picture = np.random.default_rng(i).integers(0, 256, (16, 32, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / name.format(i + 8))  # 8, 9, 10, ...
    if caption is not None:
        (folder.parent / f"{folder.name}.txt").write_text(caption)
    return folder


def listed(source: Path, clip: ClipShape = CLIP, **options):
    return open_source(str(source), 100, clip=clip, **options).listing()


def greys(clip: torch.Tensor) -> list[float]:
    return [float(frame) for frame in (clip.mean(dim=(1, 2, 3)) + 1) * 127.5]


def test_a_clip_is_the_first_frames_of_an_mp4(tmp_path):
    write_mp4(tmp_path / "videos" / "b.mp4", caption=" two birds\n")
    [video] = listed(tmp_path / "videos").pictures
    assert (video.caption, video.label) == ("two birds", f"{tmp_path}/videos/b.mp4")
    clip = video.read_clip(CLIP)
    assert (clip.shape, clip.dtype) == ((5, 3, 16, 32), torch.float32)
    assert greys(clip) == pytest.approx([grey(i) for i in range(5)], abs=3)
    assert greys(video.read_clip(ClipShape(3, 16, 16, stride=2))) == pytest.approx([grey(0), grey(2), grey(4)], abs=3)
    [alone] = listed(tmp_path / "videos" / "b.mp4").pictures
    assert torch.equal(alone.read_clip(CLIP), clip)


def test_a_video_is_turned_as_a_viewer_turns_it(tmp_path):
    import av

    path = write_mp4(tmp_path / "a.mp4", frames=0)
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        picture = np.zeros((32, 64, 3), dtype=np.uint8)
        picture[:, 32:] = 255  # black to the left, white to the right
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)  # (x, y) goes to (-y, x), y is down
    head, tail = path.read_bytes().split(b"tkhd")
    path.write_bytes(head + b"tkhd" + tail.replace(upright, turned, 1))
    [video] = listed(tmp_path, ClipShape(1, 64, 32)).pictures
    rows = video.read_clip(ClipShape(1, 64, 32)).mean(dim=(0, 1, 3))
    assert rows[:30].max() < -0.9 and rows[34:].min() > 0.9, "what was to the left is above"


def test_frames_of_a_folder_follow_their_numbers(tmp_path):
    write_frames(tmp_path / "videos" / "walk")
    [video] = listed(tmp_path / "videos").pictures
    assert video.caption == "a dog"
    expected = [np.random.default_rng(i).integers(0, 256, (16, 32, 3), dtype=np.uint8) for i in (0, 2, 4)]
    expected = torch.from_numpy(np.stack(expected)).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(video.read_clip(ClipShape(3, 16, 32, stride=2)), expected, rtol=0, atol=1e-6)


def test_the_largest_central_part_of_the_wanted_ratio_is_resized(tmp_path):
    folder = tmp_path / "videos" / "wide"
    folder.mkdir(parents=True)
    picture = np.zeros((20, 100, 3), dtype=np.uint8)
    picture[:, 30:70] = 255  # the central 40 x 20 are white
    for i in range(2):
        Image.fromarray(picture).save(folder / f"{i}.png")
    (folder.parent / "wide.txt").write_text("x")
    [video] = listed(tmp_path / "videos", ClipShape(2, 8, 16)).pictures
    assert (video.read_clip(ClipShape(2, 8, 16)) == 1).all()
    assert (video.read_clip(ClipShape(2, 8, 24)).mean(dim=(0, 1, 2))[[0, -1]] == -1).all()


def test_a_tree_of_videos_has_a_fixed_order_and_counts_the_rest(tmp_path):
    write_mp4(tmp_path / "b.mp4", caption="b")
    write_frames(tmp_path / "a", caption="a")
    write_mp4(tmp_path / "more" / "c.mp4", caption="c")
    (tmp_path / "more" / "d.mov").write_bytes(b"x")
    Image.new("RGB", (8, 8)).save(tmp_path / "cover.png")
    found = listed(tmp_path)
    # A folder of videos that holds a picture, too, is one of frames itself only below the top.
    assert [video.caption for video in found.pictures] == ["a", "b", "c"]
    assert set(found.passed_over) == {"of a kind that is not read", "pictures that are in no folder of frames"}
    assert len(open_source(str(tmp_path), 2, clip=CLIP).listing().pictures) == 2


def test_a_table_names_files_and_folders_of_frames(tmp_path):
    write_mp4(tmp_path / "x.mp4", caption=None)
    write_frames(tmp_path / "clips" / "y", caption=None)
    rows = [{"file_name": "clips/y", "text": "frames"}, {"file_name": "x.mp4", "text": "a file"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [video.caption for video in listed(tmp_path).pictures] == ["frames", "a file"]


def test_what_cannot_be_read_is_one_line_and_is_counted_where_it_may_be_skipped(tmp_path):
    good = write_mp4(tmp_path / "all" / "a.mp4")
    short = write_mp4(tmp_path / "all" / "b.mp4", frames=4)
    cut = write_mp4(tmp_path / "all" / "c.mp4")
    cut.write_bytes(cut.read_bytes()[:400])
    write_mp4(tmp_path / "all" / "d.mp4", caption=None)
    reasons = {
        good: None,
        short: "it has 4 frames, and a clip of 5 needs 5; lower model.frames or data.stride, or leave it out",
        cut: "",
    }
    (tmp_path / "all" / "d.txt").write_text("x")
    videos = {video.path: video for video in listed(tmp_path / "all").pictures}
    assert len(videos) == 4
    for path, reason in reasons.items():
        if reason is None:
            videos[path].read_clip(CLIP)
            continue
        with pytest.raises(UserError) as caught:
            videos[path].read_clip(CLIP)
        assert str(caught.value).startswith(f"data.source: cannot read the video {path}: {reason}")
        assert "\n" not in str(caught.value)
    (tmp_path / "all" / "d.txt").unlink()
    write_frames(tmp_path / "all" / "e", frames=4)
    write_frames(tmp_path / "all" / "f", name="{}x.png")
    for expected, gone in (("has no caption", "d.mp4"), ("it has 4 frames", "e"), ("x.png is no frame", "f")):
        with pytest.raises(UserError, match=expected) as caught:
            listed(tmp_path / "all")
        assert gone in str(caught.value) and "\n" not in str(caught.value)
        (tmp_path / "all" / gone).rename(tmp_path / gone)
    for gone in ("d.mp4", "e", "f"):
        (tmp_path / gone).rename(tmp_path / "all" / gone)
    found = listed(tmp_path / "all", skip=True)
    assert (len(found.pictures), found.bad[0]) == (3, 3)


def test_sources_that_hold_no_videos_are_refused(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "x.tar", tmp_path / "nothing", "owner/name:train"):
        with pytest.raises(UserError, match=r"holds no videos; a model of videos takes an \.mp4 file, or a folder"):
            listed(source)
    with pytest.raises(UserError, match="holds no captioned videos"):
        listed(tmp_path / "empty")
    write_mp4(tmp_path / "videos" / "a.mp4")
    with pytest.raises(UserError, match=r"videos, which a model of pictures does not take \(1, such as"):
        open_source(str(tmp_path / "videos"), 10)


def test_without_a_decoder_files_are_refused_by_name_and_frames_are_read(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "av" else find(name))
    write_frames(tmp_path / "a")
    assert len(listed(tmp_path).pictures) == 1
    write_mp4(tmp_path / "b.mp4")
    for skip in (False, True):
        with pytest.raises(UserError, match=r"b\.mp4 needs the package av to be decoded; pip install av, or"):
            listed(tmp_path, skip=skip)


# Through an autoencoder into the store


@pytest.fixture(scope="module", params=["cogvideox", "wan"])
def adapter(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write, cls = {
        "cogvideox": (tiny_transformers.write_cogvideox, CogVideoXAdapter),
        "wan": (tiny_transformers.write_wan, WanAdapter),
    }[request.param]
    write(folder)
    index = json.loads((folder / "model_index.json").read_text())
    return cls(str(folder), folder=open_folder(str(folder), "tiny"), index=index, asked=AskedSize(32, frames=9))


def store(source: Path, root: Path, adapter, **options):
    world = World(0, 1, torch.device("cpu"), None)
    return stored_latents(str(source), str(root), adapter, limit=100, seed=3, world=world, **options)


def test_clips_become_latents_of_the_store(adapter, tmp_path):
    write_mp4(tmp_path / "videos" / "a.mp4", frames=9)
    write_frames(tmp_path / "videos" / "b", frames=18)
    latents, captions, _ = store(tmp_path / "videos", tmp_path / "store", adapter)
    assert (latents.shape, captions) == ((2, *adapter.latent_shape), ["a cat", "a dog"])
    videos = listed(tmp_path / "videos", ClipShape(9, 32, 32)).pictures
    for i, video in enumerate(videos):
        expected = adapter.encode(video.read_clip(ClipShape(9, 32, 32))[None], torch.tensor([i]), 3)
        assert torch.equal(latents[i : i + 1], expected)
    again, *_ = store(tmp_path / "videos", tmp_path / "store", adapter)
    assert torch.equal(again, latents)
    (tmp_path / "videos" / "a.mp4").unlink()
    strided, captions, _ = store(tmp_path / "videos", tmp_path / "store", adapter, stride=2)
    assert captions == ["a dog"] and not torch.equal(strided[0], latents[1])


def test_a_video_that_is_too_short_stops_the_run_or_is_counted(adapter, tmp_path):
    write_mp4(tmp_path / "videos" / "a.mp4", frames=9)
    write_mp4(tmp_path / "videos" / "b.mp4", frames=3, caption="short")
    with pytest.raises(UserError, match=r"b\.mp4: it has 3 frames, and a clip of 9 needs 9"):
        store(tmp_path / "videos", tmp_path / "store", adapter)
    assert not list((tmp_path / "store").glob("**/store.json")), "nothing that looks whole"
    _, captions, _ = store(tmp_path / "videos", tmp_path / "store", adapter, skip=True)
    assert captions == ["a cat"]
    [recipe] = (tmp_path / "store").glob("*/store.json")
    assert json.loads(recipe.read_text())["bad"][0] == 1

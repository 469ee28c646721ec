"""Videos as .mp4 files: what is written can be read again, as a whole or not at all."""

from __future__ import annotations

import importlib.util
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.runtime.images import frame_grid, shown_frames, to_pil
from selfnpo_fast.runtime.videos import write_mp4


def video(frames: int = 5, height: int = 32, width: int = 48) -> torch.Tensor:
    """Frames of one colour each, (F, 3, H, W) in [-1, 1], which get lighter from left to right."""
    torch.manual_seed(0)
    colours = torch.rand(frames, 3, 1, 1) * 1.2 - 0.8
    return (colours + torch.linspace(0, 0.5, width)).expand(frames, 3, height, width)


def read(path: Path) -> tuple[torch.Tensor, Fraction]:
    """Frames (F, 3, H, W) in [-1, 1] of a file, and its frame rate."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
        return torch.stack(frames).permute(0, 3, 1, 2) / 127.5 - 1, stream.average_rate


@pytest.mark.parametrize("fps", [8, 16, 23.976])
def test_what_is_written_is_read_again(tmp_path, fps):
    path = tmp_path / "with:colon.mp4"
    write_mp4(video(), path, fps=fps)
    found, rate = read(path)
    assert abs(float(rate) - fps) < 1e-3
    assert found.shape == (5, 3, 32, 48)
    # Half the colours' resolution, and the quantisation of the codec.
    assert (found - video()).abs().mean() < 0.02
    assert [entry.name for entry in tmp_path.iterdir()] == ["with:colon.mp4"]


def test_pil_images_give_the_same_file(tmp_path):
    write_mp4(video(), tmp_path / "a.mp4", fps=8)
    write_mp4(to_pil(video(), least_side=0), tmp_path / "b.mp4", fps=8)
    found, expected = (read(tmp_path / name)[0] for name in ("a.mp4", "b.mp4"))
    assert (found - expected).abs().mean() < 0.02  # the codec rounds by where its buffers lie


def test_a_file_that_cannot_be_finished_is_not_there(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"mine")
    monkeypatch.setattr("selfnpo_fast.runtime.videos.np.asarray", lambda *_: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        write_mp4(video(), path, fps=8)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("frames", "fps", "line"),
    [
        (video(height=33), 8, r"frames: 33 x 48 pixels are no size of an \.mp4 file; its sides have to be even"),
        (video()[:0], 8, "frames: expected at least one, all of one size"),
        (video(), 0, "fps: 0 is not possible; expected frames per second, 1 to 240"),
        (video(), float("nan"), "fps: nan is not possible"),
        (video(), True, "fps: True is not possible"),
        (video(), "8", "fps: '8' is not possible"),
    ],
)
def test_what_is_not_possible_is_one_line_and_writes_nothing(tmp_path, frames, fps, line):
    with pytest.raises(UserError, match=f"^{line}") as caught:
        write_mp4(frames, tmp_path / "a.mp4", fps=fps)
    assert "\n" not in str(caught.value)
    assert not [*tmp_path.iterdir()]


def test_without_av_one_line_names_the_extra(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "av" else find(name))
    with pytest.raises(UserError, match=r"^av: the package is missing, .*; pip install 'selfnpo-fast\[video\]'$"):
        write_mp4(video(), tmp_path / "a.mp4", fps=8)


def test_a_grid_shows_the_first_and_the_last_frame():
    assert [shown_frames(count) for count in (1, 2, 5, 6)] == [[*range(count)] for count in (1, 2, 5, 6)]
    assert shown_frames(81) == [0, 16, 32, 48, 64, 80]
    clips = torch.stack([video(7, 96, 96), -video(7, 96, 96)])
    indices = shown_frames(7)
    page = frame_grid(clips[:, indices], indices, ["a", "b"])
    assert (page.width, len(indices)) == (6 * (96 + 16), 6)
    for row in range(2):
        for column, index in enumerate(indices):
            left, top = column * 112 + 8, row * page.height // 2 + 8
            tile = page.crop((left, top, left + 96, top + 96))
            assert tile.tobytes() == to_pil(clips[row, index : index + 1])[0].tobytes()

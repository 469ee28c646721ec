"""The store of text embeddings: equal to what encoders give, used again, resumed, shared, checked."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from selfnpo_fast.data import store_files
from selfnpo_fast.data.text_store import stored_text
from selfnpo_fast.models.conditioning import Row
from selfnpo_fast.models.text import BATCH, TextEncoders
from selfnpo_fast.runtime.errors import RunError, UserError
from selfnpo_fast.runtime.folders import why_not_whole
from selfnpo_fast.runtime.world import World

CPU = torch.device("cpu")
PROMPTS = [f"{'long ' * (i % 4)}prompt {i}" for i in range(3 * BATCH + 5)]  # and the empty one: five batches
SPAWN = multiprocessing.get_context("spawn")


class Encoder:
    """An adapter whose rows depend on the prompt alone: words (length, 3) of its own length, and a
    tone (2,)."""

    path = "folder/tiny model"
    conditioning_rows: ClassVar[dict[str, Row]] = {
        "words": Row(shape=(40, 3), ragged=0, mask="words_mask"),
        "tone": Row(shape=(2,), dtype=torch.float32),
    }

    def __init__(self, text: str = "0" * 64, fail_at: str | None = None) -> None:
        self.text_sha256, self.fail_at = text, fail_at
        self.seen: list[str] = []
        self.loaded = self.most = 0

    @contextlib.contextmanager
    def text_encoders(self, device, dtype):
        self.dtype = dtype
        self.loaded += 1
        yield TextEncoders(None, (), {}, lambda _, prompts: self.encode(prompts), lambda row: row, self.path)

    def encode(self, prompts: list[str]) -> dict:
        if self.fail_at in prompts:
            raise RuntimeError("the power fails")
        self.seen += prompts
        self.most = max(self.most, len(prompts))
        return {"words": [words(prompt) for prompt in prompts], "tone": torch.stack([tone(p) for p in prompts])}


def words(prompt: str) -> torch.Tensor:
    return torch.tensor([[ord(letter), i, 0.5] for i, letter in enumerate(prompt)]).reshape(-1, 3)


def tone(prompt: str) -> torch.Tensor:
    return torch.tensor([len(prompt) + 0.1, 1.0])


def get(root: Path, adapter=None, prompts=PROMPTS, *, dtype=torch.bfloat16, rank=0, size=1, group=None):
    world = World(rank, size, CPU, group)
    adapter = adapter or Encoder()
    return stored_text(prompts, str(root), adapter, dtype=dtype, encoder_dtype=torch.float32, world=world)


def assert_right(found, dtype=torch.bfloat16) -> None:
    tensors, lengths = found
    texts = ["", *PROMPTS]
    assert lengths["words"].tolist() == [len(text) for text in texts]
    assert torch.equal(tensors["words"], torch.cat([words(text) for text in texts]).to(dtype))
    assert torch.equal(tensors["tone"], torch.stack([tone(text) for text in texts]))


def only_store(root: Path) -> Path:
    [folder] = (path for path in root.iterdir() if path.is_dir())
    assert set(root.iterdir()) <= {folder, folder.with_suffix(".lock")}
    return folder


def test_rows_are_those_of_the_encoder_and_a_later_run_encodes_nothing(tmp_path):
    first, second = Encoder(), Encoder()
    assert_right(get(tmp_path, first))
    assert first.seen == ["", *PROMPTS]
    assert first.most == BATCH, "memory holds one batch"
    assert_right(get(tmp_path, second))
    assert (second.seen, second.loaded) == ([], 0)
    folder = only_store(tmp_path)
    names = {"words.safetensors", "tone.safetensors", "batches.jsonl", "store.json", "manifest.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert folder.name.startswith("tiny-model-")
    assert json.loads((folder / "store.json").read_text())["recipe"]["prompts"] == len(PROMPTS)


def test_what_decides_the_rows_has_a_store_of_its_own(tmp_path):
    get(tmp_path)
    for change in (
        {"adapter": Encoder(text="1" * 64)},
        {"prompts": PROMPTS[:-1]},
        {"prompts": PROMPTS[::-1]},
        {"dtype": torch.float32},
    ):
        before = len(list(tmp_path.iterdir()))
        get(tmp_path, **change)
        assert len(list(tmp_path.iterdir())) == before + 1, change


@pytest.mark.parametrize("damage", ["", "half a line", "rows cut", "rows beyond"])
def test_a_killed_run_goes_on_where_it_was(tmp_path, damage):
    with pytest.raises(UserError, match="the power fails"):
        get(tmp_path, Encoder(fail_at=PROMPTS[2 * BATCH]))
    partial = only_store(tmp_path)
    assert partial.name.endswith(".partial")
    done = 2 * BATCH
    with (partial / "batches.jsonl").open("r+b") as lines, (partial / "words.safetensors").open("r+b") as rows:
        if damage == "half a line":
            lines.seek(0, os.SEEK_END)
            lines.write(b'{"rows": 64, "le')
        if damage == "rows cut":
            rows.truncate(rows.seek(0, os.SEEK_END) - 1)
            done -= BATCH
        if damage == "rows beyond":
            rows.seek(0, os.SEEK_END)
            rows.write(b"x" * 1000)
    second = Encoder()
    assert_right(get(tmp_path, second))
    assert second.seen == PROMPTS[done:]
    assert why_not_whole(only_store(tmp_path)) is None


class Stuck(Encoder):
    """Encodes three batches, and hangs at the next."""

    def encode(self, prompts: list[str]) -> dict:
        while len(self.seen) > 2 * BATCH:
            time.sleep(3600)
        return super().encode(prompts)


def _encode_without_end(root: str) -> None:
    get(Path(root), Stuck())


def test_after_sigkill_in_the_middle(tmp_path):
    process = SPAWN.Process(target=_encode_without_end, args=(str(tmp_path),))
    process.start()
    lines: list[Path] = []
    while not (lines and lines[0].read_bytes().count(b"\n") >= 2):
        assert process.is_alive()
        lines = list(tmp_path.glob("*.partial/batches.jsonl"))
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    second = Encoder()
    assert_right(get(tmp_path, second))
    assert 0 < len(second.seen) <= 2 * BATCH + 5


@pytest.mark.parametrize("file", ["words.safetensors", "store.json"])
def test_a_damaged_store_is_refused_by_name(tmp_path, file):
    get(tmp_path)
    folder = only_store(tmp_path)
    raw = bytearray((folder / file).read_bytes())
    raw[-3] ^= 1
    (folder / file).write_bytes(raw)
    with pytest.raises(UserError, match=rf"^prompts\.store: {folder} is damaged: .*; delete it, and its prompts are"):
        get(tmp_path)
    shutil.rmtree(folder)
    assert_right(get(tmp_path))


def test_a_full_disk_costs_a_line(tmp_path, monkeypatch):
    def full(_) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store_files.os, "fsync", full)
        with pytest.raises(RunError, match=r"^prompts\.store: .*No space left on device\); what is encoded is kept$"):
            get(tmp_path)
    assert_right(get(tmp_path))


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"^prompts\.store: .*; name another folder$"):
        get(tmp_path / "file")


def _rank(rank: int, meeting: str, root: str, seen) -> None:
    store = torch.distributed.FileStore(meeting, 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    adapter = Encoder()
    found = get(Path(root), adapter, rank=rank, size=2, group=torch.distributed.new_group(backend="gloo"))
    assert_right(found)
    seen.put((rank, adapter.seen))
    torch.distributed.destroy_process_group()


def test_two_ranks_share_the_work_and_write_the_file_of_one(tmp_path):
    get(tmp_path / "one")
    seen = SPAWN.Queue()
    arguments = str(tmp_path / "meeting"), str(tmp_path / "two"), seen
    ranks = [SPAWN.Process(target=_rank, args=(rank, *arguments)) for rank in range(2)]
    for process in ranks:
        process.start()
    by_rank = dict(seen.get() for _ in ranks)
    for process in ranks:
        process.join()
    assert sorted(by_rank[0] + by_rank[1]) == sorted(["", *PROMPTS])
    assert by_rank[1][:BATCH] == PROMPTS[:BATCH]
    one, two = only_store(tmp_path / "one"), only_store(tmp_path / "two")
    assert (one.name, (one / "manifest.json").read_text()) == (two.name, (two / "manifest.json").read_text())

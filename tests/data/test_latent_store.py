"""The store of encoded images: used again, resumed, shared by ranks, mapped, and checked."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import multiprocessing
import os
import signal
import tarfile
import threading
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selfnpo_fast.data import store_files
from selfnpo_fast.data.latent_store import stored_latents
from selfnpo_fast.data.store_files import fingerprint
from selfnpo_fast.models import Family
from selfnpo_fast.runtime import console
from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.errors import RunError, UserError
from selfnpo_fast.runtime.folders import why_not_whole
from selfnpo_fast.runtime.world import World
from selfnpo_kernels import Draw, NoiseKey, draw_id, normal

COUNT = 50  # three batches of 16, and two more
SPAWN = multiprocessing.get_context("spawn")


class Encoder:
    """An adapter whose latents depend on picture, id and seed, as those of an autoencoder do."""

    path, latent_shape, family = "tiny", (3, 8, 8), Family()

    def __init__(self, resolution: int = 8, vae: str = "0" * 64, pause: float = 0.0, fail_at: int = -1) -> None:
        self.resolution, self.vae_sha256, self.pause, self.fail_at = resolution, vae, pause, fail_at
        self.ids: list[int] = []

    def encode(self, images: torch.Tensor, ids: torch.Tensor, seed: int) -> torch.Tensor:
        if self.fail_at in ids:
            raise RuntimeError("the power fails")
        time.sleep(self.pause)
        self.ids += ids.tolist()
        return images[..., :8, :8] + normal(NoiseKey(seed, ids, draw_id(Draw.POSTERIOR)), self.latent_shape)


def get(images: Path, root: Path, adapter=None, *, limit=1000, seed=3, rank=0, size=1, group=None, **options):
    world = World(rank, size, torch.device("cpu"), group)
    return stored_latents(str(images), str(root), adapter or Encoder(), limit=limit, seed=seed, world=world, **options)


def write_images(folder: Path, count: int = COUNT) -> Path:
    folder.mkdir()
    for i in range(count):
        array = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(array).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"number {i}, café \u2028")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("source") / "images")


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """The latents and captions of a run that nothing interrupted."""
    return get(images, tmp_path_factory.mktemp("whole"))


@pytest.fixture
def logged(monkeypatch):
    """The lines of the log."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", logging.INFO)
    logger.manager._clear_cache()
    yield lines
    logger.manager._clear_cache()


def assert_equal(found, expected) -> None:
    assert torch.equal(found[0], expected[0])
    assert found[1:] == expected[1:]


def only_store(root: Path) -> Path:
    """The one folder in `root`, which holds nothing else but the lock of a store that was killed."""
    [folder] = (path for path in root.iterdir() if path.is_dir())
    assert set(root.iterdir()) <= {folder, folder.with_suffix(".lock")}
    return folder


def test_a_second_run_encodes_nothing_and_says_so(images, whole, tmp_path, logged):
    first, second = Encoder(), Encoder()
    assert_equal(get(images, tmp_path, first), whole)
    assert first.ids == list(range(COUNT))
    assert [line.partition(" into ")[0] for line in logged] == [f"data: encoding {COUNT} images"]
    logged.clear()
    assert_equal(get(images, tmp_path, second), whole)
    assert second.ids == []
    assert logged == [f"data: {images} is encoded already: {only_store(tmp_path)}"]


def test_what_a_store_holds(images, whole, tmp_path):
    get(images, tmp_path)
    folder = only_store(tmp_path)
    assert {path.name for path in folder.iterdir()} == {
        "latents.safetensors", "pictures.jsonl", "store.json", "manifest.json"
    }  # fmt: skip
    facts = json.loads((folder / "store.json").read_text())
    assert facts["shape"] == [COUNT, 3, 8, 8]
    assert (facts["dtype"], facts["model"]) == ("float32", "tiny")
    recipe = facts["recipe"]
    assert (recipe["source"], recipe["limit"], recipe["seed"]) == (str(images), 1000, 3)
    assert (recipe["resolution"], recipe["vae_sha256"]) == (8, "0" * 64)
    assert whole[1][7] == "number 7, café"


def test_the_fingerprint_is_that_of_the_latents(images, whole, tmp_path):
    """It needs no store: the same bits have the same fingerprint wherever they lie."""
    assert whole[2] == fingerprint(whole[0].clone())
    assert whole[2] == hashlib.sha256((get_file(images, tmp_path)).read_bytes()).hexdigest()
    changed = whole[0].clone()
    changed[7, 0, 0, 0] = changed[7, 0, 0, 0].nextafter(torch.tensor(9.0))
    others = [changed, whole[0].flip(0), whole[0][:-1], whole[0].reshape(COUNT, 8, 3, 8)]
    assert len({whole[2], *map(fingerprint, others)}) == 5


def get_file(images: Path, root: Path) -> Path:
    get(images, root)
    return only_store(root) / "latents.safetensors"


def touch(folder: Path) -> dict:
    os.utime(folder / "007.png", ns=(0, 0))
    return {}


def edit_a_caption(folder: Path) -> dict:
    (folder / "007.txt").write_text("another number")
    return {}


def add_an_image(folder: Path) -> dict:
    for suffix in (".png", ".txt"):
        (folder / f"999{suffix}").write_bytes((folder / f"000{suffix}").read_bytes())
    return {}


def test_tars_are_encoded_once_and_then_not_opened(images, whole, tmp_path):
    pattern = tmp_path / "{0..1}.tar"
    paths = sorted(images.iterdir())
    for shard, part in enumerate((paths[:40], paths[40:])):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for path in part:
                tar.add(path, path.name)
    assert_equal(get(pattern, tmp_path / "stores"), whole)
    facts = (tmp_path / "1.tar").stat()
    (tmp_path / "1.tar").write_bytes(b"x" * facts.st_size)  # to open it would now be an error
    os.utime(tmp_path / "1.tar", ns=(facts.st_atime_ns, facts.st_mtime_ns))
    second = Encoder()
    assert_equal(get(pattern, tmp_path / "stores", second), whole)
    assert second.ids == []
    os.utime(tmp_path / "1.tar", ns=(0, 0))
    with pytest.raises(UserError, match="as an uncompressed tar"):
        get(pattern, tmp_path / "stores")


CHANGES = {
    "seed": lambda folder: {"seed": 4},
    "limit": lambda folder: {"limit": 10},
    "resolution": lambda folder: {"adapter": Encoder(resolution=16)},
    "autoencoder": lambda folder: {"adapter": Encoder(vae="1" * 64)},
    "a file written to": touch,
    "a caption": edit_a_caption,
    "another image": add_an_image,
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_recipe_is_another_store(change, tmp_path):
    images, root = write_images(tmp_path / "images", 20), tmp_path / "stores"
    get(images, root)
    before = only_store(root)
    options = {"adapter": Encoder(), **CHANGES[change](images)}
    get(images, root, **options)
    assert len(options["adapter"].ids) == {"limit": 10, "another image": 21}.get(change, 20)
    assert len(list(root.iterdir())) == 2
    assert why_not_whole(before) is None


def test_a_store_under_the_name_of_another_is_refused_by_field(images, tmp_path):
    get(images, tmp_path / "a", seed=3)
    get(images, tmp_path / "b", seed=4)
    ours, theirs = only_store(tmp_path / "a"), only_store(tmp_path / "b")
    theirs.rename(theirs.with_name(ours.name))
    with pytest.raises(UserError, match=r"^data\.store: .* is of another recipe: seed 4, not 3; delete or rename it$"):
        get(images, tmp_path / "b", seed=3)


def test_a_run_that_failed_is_resumed(images, whole, tmp_path, logged):
    with pytest.raises(RuntimeError, match="the power fails"):
        get(images, tmp_path, Encoder(fail_at=40))
    assert only_store(tmp_path).suffix == ".partial"
    second = Encoder()
    assert_equal(get(images, tmp_path, second), whole)
    assert second.ids == list(range(32, COUNT))
    assert logged[-1].endswith("going on after 32")
    assert only_store(tmp_path).suffix == ""


HALVES = ["half a latent", "a latent without line", "half a line", "another line", "a line without latent"]


@pytest.mark.parametrize("damage", HALVES)
def test_a_part_that_is_half_written_does_not_count(damage, images, whole, tmp_path):
    with pytest.raises(RuntimeError):
        get(images, tmp_path, Encoder(fail_at=40))
    partial = only_store(tmp_path)
    data, lines = partial / "latents.safetensors", partial / "pictures.jsonl"
    row, kept = 4 * 3 * 8 * 8, 32
    if damage == "half a latent":
        data.write_bytes(data.read_bytes() + b"x" * (row // 2))
    elif damage == "a latent without line":
        data.write_bytes(data.read_bytes() + b"x" * row)
    elif damage == "half a line":
        data.write_bytes(data.read_bytes() + b"x" * row)
        lines.write_bytes(lines.read_bytes() + b'["number 3')
    elif damage == "another line":
        data.write_bytes(data.read_bytes() + b"x" * row)
        lines.write_bytes(lines.read_bytes() + lines.read_bytes().splitlines(keepends=True)[31])
    else:
        data.write_bytes(data.read_bytes()[:-1])
        kept = 31
    second = Encoder()
    assert_equal(get(images, tmp_path, second), whole)
    assert second.ids == list(range(kept, COUNT))


def test_what_precedes_a_repaired_image_is_kept(whole, tmp_path):
    images, root = write_images(tmp_path / "images"), tmp_path / "stores"
    content = (images / "036.png").read_bytes()
    (images / "036.png").write_bytes(content[:-30])
    with pytest.raises(UserError, match=r"cannot read the image .*/036\.png"):
        get(images, root)
    (images / "036.png").write_bytes(content)
    second = Encoder()
    assert_equal(get(images, root, second), whole)
    assert second.ids == list(range(32, COUNT))
    assert only_store(root).suffix == ""


def encode_slowly(images: Path, root: Path) -> None:
    get(images, root, Encoder(pause=0.2))


def test_a_run_that_was_killed_is_resumed(images, whole, tmp_path):
    child = SPAWN.Process(target=encode_slowly, args=(images, tmp_path))
    child.start()
    while not any(path.stat().st_size for path in tmp_path.glob("*/pictures.jsonl")):
        assert child.is_alive()
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert only_store(tmp_path).suffix == ".partial"
    second = Encoder()
    assert_equal(get(images, tmp_path, second), whole)
    assert second.ids[0] in (16, 32, 48)
    assert second.ids == list(range(second.ids[0], COUNT))


def test_a_run_killed_before_the_folder_got_its_name(images, whole, tmp_path, monkeypatch):
    def stopped(*_) -> None:
        raise RuntimeError("the power fails")

    with monkeypatch.context() as patch:
        patch.setattr(store_files, "finish_aside", stopped)
        with pytest.raises(RuntimeError):
            get(images, tmp_path)
    second = Encoder()
    assert_equal(get(images, tmp_path, second), whole)
    assert second.ids == []
    assert why_not_whole(only_store(tmp_path)) is None


def test_a_full_disk_costs_a_line_and_nothing_that_is_whole(images, whole, tmp_path, monkeypatch):
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 4:  # the captions of the second batch
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(store_files.os, "fsync", full)
        with pytest.raises(RunError, match=r"^data\.store: .*No space left on device\); what is encoded is kept$"):
            get(images, tmp_path)
    second = Encoder()
    assert_equal(get(images, tmp_path, second), whole)
    assert second.ids[0] in (16, 32)


def test_a_folder_that_cannot_be_written_is_named(images, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^data\.store: .*; name another folder$"):
        get(images, tmp_path / "file")


def test_two_runs_at_once_encode_once(images, whole, tmp_path, monkeypatch, logged):
    monkeypatch.setattr(store_files, "WAIT", 0.02)
    first, second = Encoder(pause=0.1), Encoder()
    thread = threading.Thread(target=get, args=(images, tmp_path, first))
    thread.start()
    while not list(tmp_path.glob("*/pictures.jsonl")):
        time.sleep(0.01)
    assert_equal(get(images, tmp_path, second), whole)
    thread.join()
    assert first.ids == list(range(COUNT))
    assert second.ids == []
    assert any(f"waiting for process {os.getpid()} on " in line for line in logged)
    assert only_store(tmp_path).suffix == ""


def test_latents_are_mapped_and_not_copied(images, tmp_path):
    latents, *_ = get(images, tmp_path)
    latents, *_ = get(images, tmp_path)
    path = str(only_store(tmp_path) / "latents.safetensors")
    spans = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if path in line]
    start = latents.data_ptr()
    assert any(int(low, 16) <= start and start + latents.nbytes <= int(high, 16) for low, high in spans)
    assert start % 64 == 0
    assert latents.is_contiguous()


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a bit": lambda folder: flip(folder / "latents.safetensors", 5000),
    "a bit of the header": lambda folder: flip(folder / "latents.safetensors", 3),
    "cut short": lambda folder: os.truncate(folder / "latents.safetensors", 9000),
    "no latents": lambda folder: (folder / "latents.safetensors").unlink(),
    "a caption": lambda folder: flip(folder / "pictures.jsonl", 4),
    "no recipe": lambda folder: (folder / "store.json").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "another manifest": lambda folder: (folder / "manifest.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_store_is_refused_in_one_line(damage, images, tmp_path):
    get(images, tmp_path)
    DAMAGES[damage](only_store(tmp_path))
    adapter = Encoder()
    with pytest.raises(UserError, match=r"^data\.store: \S+ is damaged: .*; delete it, and its images") as caught:
        get(images, tmp_path, adapter)
    assert "\n" not in str(caught.value)
    assert adapter.ids == []


def test_latents_have_to_be_finite(images, tmp_path):
    class Broken(Encoder):
        def encode(self, images, ids, seed):
            return torch.where((ids == 20)[:, None, None, None], torch.nan, images)

    with pytest.raises(UserError, match=r"gives no finite latent of .*/020\.png$"):
        get(images, tmp_path, Broken())


BAD = (5, 17, 20, 49)


def damage(images: Path) -> None:
    """One picture of each kind: cut short, no picture, none, and one without a finite latent."""
    content = (images / "005.png").read_bytes()
    (images / "005.png").write_bytes(content[: len(content) // 2])
    (images / "017.png").write_bytes(b"no picture")
    (images / "049.txt").unlink()


class SomeNaN(Encoder):
    """Gives no finite latent of the picture 020, whose index is 20: 049, which is not listed, comes
    after it."""

    def encode(self, images, ids, seed):
        return torch.where((ids == 20)[:, None, None, None], torch.nan, super().encode(images, ids, seed))


def test_bad_pictures_are_skipped_and_counted(whole, tmp_path, logged, monkeypatch):
    """The latents of the others are those of a source without bad ones, bit for bit."""
    monkeypatch.setattr(console, "_said", set())
    images = write_images(tmp_path / "images")
    damage(images)
    root = tmp_path / "stores"
    latents, captions, stored = get(images, root, SomeNaN(), skip=True)
    good = [i for i in range(COUNT) if i not in BAD]
    assert torch.equal(latents, whole[0][good])
    assert captions == [whole[1][i] for i in good]
    assert stored == fingerprint(latents)
    said = (
        f"data: {images}: 46 of 50 pictures used; passed over: what cannot be used (4; the first: {images}/049.png has "
        "no caption; put it into 049.txt)"
    )
    assert logged.count(said) == 1
    logged.clear()
    monkeypatch.setattr(console, "_said", set())
    again = SomeNaN()
    assert_equal(get(images, root, again, skip=True), (latents, captions, stored))
    assert again.ids == []
    assert logged.count(said) == 1


def test_a_store_without_bad_pictures_is_refused_where_they_should_stop(tmp_path):
    images = write_images(tmp_path / "images", 20)
    (images / "007.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"cannot read the image .*/007\.png"):
        get(images, tmp_path / "stores")
    second = Encoder()
    get(images, tmp_path / "stores", second, skip=True)
    assert len(second.ids) == 19
    expected = r"^data\.on_bad: \S+ was encoded without 1 that could not be used .*007\.png.*set data\.on_bad to skip$"
    with pytest.raises(UserError, match=expected):
        get(images, tmp_path / "stores")


def test_a_run_that_skipped_is_resumed(tmp_path):
    """What was skipped is not read again with skip; without skip the run stops at it."""
    images, root = write_images(tmp_path / "images"), tmp_path / "stores"
    (images / "007.png").write_bytes(b"no picture")
    with pytest.raises(RuntimeError, match="the power fails"):
        get(images, root, Encoder(fail_at=40), skip=True)
    second = Encoder()
    latents, *_ = get(images, root, second, skip=True)
    assert second.ids == list(range(32, COUNT))
    assert_latents = get(images, tmp_path / "others", skip=True)
    assert torch.equal(latents, assert_latents[0])
    with pytest.raises(RuntimeError, match="the power fails"):
        get(images, tmp_path / "more", Encoder(fail_at=40), skip=True)
    with pytest.raises(UserError, match=r"cannot read the image .*/007\.png"):
        get(images, tmp_path / "more")


def test_where_all_pictures_are_bad_there_is_no_store(tmp_path):
    images = write_images(tmp_path / "images", 3)
    for path in images.glob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(
        UserError, match=r"^data\.source: none of 3 images can be used; the first: cannot read the image"
    ):
        get(images, tmp_path / "stores", skip=True)
    assert only_store(tmp_path / "stores").suffix == ".partial"


def test_pictures_of_a_table_have_a_store(whole, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = write_images(tmp_path / "images")
    contents = [(images / f"{i:03d}.png").read_bytes() for i in range(COUNT)]
    table = {"image": [{"bytes": content, "path": None} for content in contents], "words": whole[1]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet", row_group_size=9)
    assert_equal(get(tmp_path / "a.parquet", tmp_path / "stores", column="words"), whole)
    second = Encoder()
    assert_equal(get(tmp_path / "a.parquet", tmp_path / "stores", second, column="words"), whole)
    assert second.ids == []


def one_of_two(rank: int, meeting: Path, images: Path, root: Path, results) -> None:
    """One rank of two, which puts what it encoded, or its error, into `results`."""
    store = torch.distributed.FileStore(str(meeting), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(minutes=30))
    group, adapter = torch.distributed.new_group(backend="gloo"), Encoder()
    try:
        latents, *others = get(images, root, adapter, rank=rank, size=2, group=group)
        results.put((rank, adapter.ids, latents.numpy(), *others))
    except UserError as error:
        results.put((rank, adapter.ids, str(error)))
    torch.distributed.destroy_process_group()


def run_two_ranks(images: Path, folder: Path) -> list:
    results = SPAWN.Queue()
    meeting, root = folder / "meeting", folder / "stores"
    ranks = [SPAWN.Process(target=one_of_two, args=(rank, meeting, images, root, results)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    outcomes = sorted((results.get(timeout=1800) for _ in ranks), key=lambda result: result[0])
    for process in ranks:
        process.join()
    return outcomes


def test_two_ranks_share_the_work_and_make_the_latents_of_one(images, whole, tmp_path):
    (_, ids0, *first), (_, ids1, *second) = run_two_ranks(images, tmp_path)
    assert ids0 == [*range(16), *range(32, 48)]
    assert ids1 == [*range(16, 32), 48, 49]
    for latents, *others in (first, second):
        assert_equal((torch.from_numpy(latents), *others), whole)


def test_a_bad_image_ends_both_ranks_with_one_line(tmp_path):
    images = write_images(tmp_path / "images", 20)
    (images / "018.png").write_bytes(b"no picture")  # rank 1's
    (_, _, first), (_, _, second) = run_two_ranks(images, tmp_path)
    assert first == second
    assert first.startswith("data.source: cannot read the image ")
    assert "018.png" in first

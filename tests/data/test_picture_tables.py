"""Parquet files and Hugging Face datasets with encoded pictures as sources; all of it offline."""

from __future__ import annotations

import io
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fuzzing import assert_one_line
from PIL import Image

from selfnpo_fast.data import picture_tables
from selfnpo_fast.data.image_sources import open_source
from selfnpo_fast.data.listing import Listing
from selfnpo_fast.data.prompts import read_prompts
from selfnpo_fast.runtime.errors import UserError

ROWS = 50


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def encoded(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(seed)).save(file, "png")
    return file.getvalue()


def listed(source: Path | str, limit: int = 1000, **options) -> Listing:
    return open_source(str(source), limit, **options).listing()


def assert_holds(listing: Listing, seeds: list[int], order: list[int] | None = None) -> None:
    """The captions of `seeds`, each with its picture, which are read in any `order` of places."""
    assert [picture.caption for picture in listing.pictures] == [f"number {seed}" for seed in seeds]
    for place in order or range(len(seeds)):
        expected = torch.from_numpy(pixels(seeds[place]).astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(listing.pictures[place].read_square(8), expected, rtol=0, atol=1e-6)


def write(path: Path, seeds: list[int], *, raw: bool = False, group: int = 20, **columns: list) -> Path:
    """A parquet file as datasets writes it, or with plain bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [encoded(seed) for seed in seeds]
    if not raw:
        pictures = [{"bytes": content, "path": None} for content in pictures]
    table = {"id": list(seeds), "image": pictures, "text": [f"number {seed}" for seed in seeds], **columns}
    pq.write_table(pa.table(table), path, row_group_size=group)
    return path


@pytest.mark.parametrize("raw", [False, True])
def test_a_parquet_file(tmp_path, raw):
    path = write(tmp_path / "a.parquet", list(range(ROWS)), raw=raw)
    assert_holds(listed(path), list(range(ROWS)))
    assert_holds(listed(path), list(range(ROWS)), order=[49, 0, 19, 20, 21, 39, 40, 3, 3])
    found = listed(path, limit=7)
    assert_holds(found, list(range(7)))
    assert found.more
    assert read_prompts(str(path), column="text", limit=2) == ["number 0", "number 1"]


def test_a_file_that_datasets_wrote(tmp_path):
    features = datasets.Features({"picture": datasets.Image(), "text": datasets.Value("string")})
    rows = {"picture": [Image.fromarray(pixels(i)) for i in range(3)], "text": [f"number {i}" for i in range(3)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "a.parquet"))
    assert_holds(listed(tmp_path / "a.parquet"), [0, 1, 2])


def test_pictures_are_not_read_twice(tmp_path, monkeypatch):
    """One picture after the other opens the file once, and a jump ahead skips row groups."""
    path, opened = write(tmp_path / "a.parquet", list(range(ROWS))), []
    found = listed(path)
    values = picture_tables.ParquetTable.values
    monkeypatch.setattr(
        picture_tables.ParquetTable, "values", lambda self, row: opened.append(row) or values(self, row)
    )
    for picture in found.pictures[:30:2]:
        picture.content()
    assert opened == [0]


def test_a_stream_is_not_begun_again_for_rows_ahead(hub, monkeypatch):
    """Ranks read every so many rows; a dataset on the Hub would be downloaded again for each."""
    found, opened = listed(f"{hub}:train"), []
    values = picture_tables.HubTable.values
    monkeypatch.setattr(picture_tables.HubTable, "values", lambda self, row: opened.append(row) or values(self, row))
    monkeypatch.setattr(picture_tables.ParquetTable, "jump", 0)
    found.pictures[0].content()
    found.pictures[3].content()
    assert opened == [0]


def test_folders_and_patterns_of_parquet_files(tmp_path):
    for shard in range(3):
        write(tmp_path / "data" / f"train-{shard}.parquet", [2 * shard, 2 * shard + 1])
    write(tmp_path / "data" / "test-0.parquet", [100])
    write(tmp_path / "validation" / "0.parquet", [101])
    found = listed(tmp_path)
    assert_holds(found, list(range(6)))
    assert found.passed_over == {"files of other splits": (2, f"{tmp_path}/data/test-0.parquet")}
    assert_holds(listed(tmp_path / "data" / "train-{1..2}.parquet"), [2, 3, 4, 5])
    assert_holds(listed(tmp_path / "validation"), [101])


def test_columns_lists_and_bad_rows(tmp_path):
    columns = {"long": ["a", None, "c", "x" * 10_001], "many": [["a", "b"], ["c"], [], ["d"]]}
    path = write(tmp_path / "a.parquet", [0, 1, 2, 3], **columns)
    found = listed(path, column="many", skip=True)
    assert [picture.caption for picture in found.pictures] == ["a", "c", "d"]
    found = listed(path, column="long", skip=True)
    assert [picture.row for picture in found.pictures] == [0, 2]
    assert found.bad == (2, f"{path}, row 2: the caption is nothing (null), not text; write a string or leave it out")
    with pytest.raises(UserError, match=r"^data\.source: .*a\.parquet, row 2: the caption is nothing"):
        listed(path, column="long")
    with pytest.raises(UserError, match=r"no column 'gone'; there are: 'id', 'image', 'text'.*data\.column"):
        listed(path, column="gone")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"bytes": None, "path": "/etc/passwd"}, "names a file and does not hold the picture"),
        ({"bytes": None, "path": None}, "holds NoneType, no bytes"),
        ({"bytes": b"no picture", "path": None}, "it is no PNG"),
        (None, "holds NoneType, no bytes"),
    ],
)
def test_rows_without_a_picture(tmp_path, value, reason):
    rows = [{"bytes": encoded(0), "path": None}, value]
    pq.write_table(pa.table({"image": rows, "text": ["number 0", "x"]}), tmp_path / "a.parquet")
    good, bad = listed(tmp_path / "a.parquet").pictures
    assert good.content() == encoded(0)
    with pytest.raises(
        UserError, match=f"^data.source: cannot read the image .*a.parquet, row 2: .*{reason}"
    ) as caught:
        bad.read_square(8)
    assert_one_line(str(caught.value))


def test_files_without_pictures_and_damaged_ones(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x"], "n": [1]}), path)
    with pytest.raises(UserError, match=r"^data\.source: .*a\.parquet has no column of pictures"):
        listed(path)
    write(path, list(range(ROWS)))
    whole = path.read_bytes()
    for content in (b"", b"PAR1 nothing PAR1", whole[:-20], whole[: len(whole) // 2], bytes(len(whole))):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"^data\.source: .*a\.parquet: no readable parquet file") as caught:
            listed(path)
        assert_one_line(str(caught.value))


def test_two_columns_of_one_name(tmp_path):
    columns = [pa.array([encoded(0)]), pa.array(["a"]), pa.array(["b"])]
    pq.write_table(pa.Table.from_arrays(columns, names=["image", "text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"^data\.source: .*a\.parquet: no readable parquet file .*exists 2 times"):
        listed(tmp_path / "a.parquet")


def test_damage_and_loss_after_the_listing(tmp_path):
    path = write(tmp_path / "a.parquet", list(range(ROWS)))
    found = listed(path)
    facts, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 500] = bytes(500)
    path.write_bytes(content)
    with pytest.raises(UserError, match="written to since the run looked at it; start again"):
        found.pictures[0].read_square(8)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    failed = 0
    for picture in found.pictures:
        try:
            picture.read_square(8)
        except UserError as error:
            failed += 1
            assert_one_line(str(error), "data.source: cannot read the image ", "a.parquet, row ")
    assert 0 < failed < ROWS
    path.unlink()
    with pytest.raises(UserError, match=r"cannot read the image .*a\.parquet, row 1: .*No such file"):
        found.pictures[0].read_square(8)


# Hugging Face datasets: a folder as the Hub lays it out, which is read as an id is


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split, seeds in {"train": [0, 1, 2, 3], "test": [7]}.items():
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        rows = {"image": [Image.fromarray(pixels(i)) for i in seeds], "text": [f"number {i}" for i in seeds]}
        folder = tmp_path / "hub" / "data"
        folder.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return tmp_path / "hub"


def test_splits_of_a_dataset(hub):
    assert_holds(listed(f"{hub}:test"), [7])
    found = listed(f"{hub}:train", limit=3)
    assert_holds(found, [0, 1, 2], order=[2, 0, 1])
    assert found.more
    assert_holds(listed(hub), [0, 1, 2, 3])  # a folder of parquet files, without datasets
    assert read_prompts(f"{hub}:test", column="text") == ["number 7"]


def test_the_stamp_of_a_dataset_follows_its_files(hub):
    """So do the facts by which a run that goes on knows its pictures again."""
    before, again = (open_source(f"{hub}:train", 10) for _ in range(2))
    assert before.stamp == again.stamp
    os.utime(hub / "data" / "train-00000-of-00001.parquet", ns=(0, 0))
    after = open_source(f"{hub}:train", 10)
    assert after.stamp != before.stamp
    facts = [source.listing().pictures[0].facts for source in (before, again, after)]
    assert facts[0] == facts[1] != facts[2]


def test_datasets_that_cannot_be_read(hub):
    for source, expected in {
        f"{hub}:nope": "nope",
        "nobody-here/nothing-there": "the dataset nobody-here/nothing-there cannot be read .offline: HF_HUB_OFFLINE",
        "nobody-here/nothing there": "no such folder, file or dataset",
        "pictures": "no such folder, file or dataset",
    }.items():
        with pytest.raises(UserError, match=f"^data.source: .*{expected}") as caught:
            listed(source)
        assert_one_line(str(caught.value))
    with pytest.raises(UserError, match=r"no column 'gone'; there are: 'image', 'text'"):
        listed(f"{hub}:train", column="gone")

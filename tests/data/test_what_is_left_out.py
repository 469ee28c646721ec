"""What a source of pictures leaves out, and that a line says so: folders, links, tars, bad pictures."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from fuzzing import assert_one_line
from PIL import Image

from selfnpo_fast.data.image_sources import open_source
from selfnpo_fast.data.listing import Listing, summary
from selfnpo_fast.runtime import limits
from selfnpo_fast.runtime.errors import UserError


def encoded(seed: int, kind: str = "png") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def put(path: Path, content: bytes | str = b"") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def put_pair(folder: Path, stem: str, kind: str = ".png", caption: str = ".txt") -> None:
    put(folder / (stem + kind), encoded(0))
    put(folder / (stem + caption), stem)


def listed(source: Path | str, limit: int = 100, **options) -> Listing:
    return open_source(str(source), limit, **options).listing()


def captions(listing: Listing) -> list[str]:
    return [picture.caption for picture in listing.pictures]


def line(listing: Listing) -> str | None:
    said = summary(len(listing.pictures), listing.passed_over, listing.bad, listing.more)
    assert said is None or len(said.splitlines()) == 1
    return said


# Folders


def test_sub_folders_suffixes_and_caption_files(tmp_path):
    for stem, kind, caption in [
        ("b", ".tiff", ".txt"), ("IMG_1.0", ".gif", ".caption"), ("IMG_1.1", ".JPG", ".txt"), ("x/y/a", ".tif", ".txt"),
        ("x/c", ".avif", ".caption"), ("w/d", ".jfif", ".txt"),
    ]:  # fmt: skip
        put_pair(tmp_path, stem, kind, caption)
    put(tmp_path / "b.caption", "not this one: .txt comes first")
    found = listed(tmp_path)
    assert captions(found) == ["IMG_1.0", "IMG_1.1", "b", "w/d", "x/c", "x/y/a"]
    assert line(found) is None


def test_what_is_passed_over_in_a_folder_is_counted_with_a_reason(tmp_path):
    put_pair(tmp_path, "a")
    put_pair(tmp_path, "b")
    put_pair(tmp_path, "sub/c")
    for name in (".DS_Store", "sub/.DS_Store", "Thumbs.db", "notes.md", ".git/d.png", ".thumbs/e.png"):
        put(tmp_path / name)
    for name in ("._a.png", "sub/._c.png", "d.heic", "e.CR2", "alone.txt", "shard.tar"):
        put(tmp_path / name)
    found = listed(tmp_path, limit=2)
    assert captions(found) == ["a", "b"]
    assert line(found) == (
        f"2 of 9 pictures used; passed over: hidden files (2, such as {tmp_path}/._a.png), captions without a picture "
        f"(1, such as {tmp_path}/alone.txt), of a kind that is not read (2, such as {tmp_path}/d.heic), "
        f"tars or tables beside pictures (1, such as {tmp_path}/shard.tar), "
        f"beyond the limit (1, such as {tmp_path}/sub/c.png)"
    )


def test_what_a_table_does_not_list_is_counted(tmp_path):
    for name in ("a.png", "b.png", "sub/c.png", "sub/d.png"):
        put(tmp_path / name, encoded(0))
    put(tmp_path / "metadata.jsonl", '{"file_name": "sub/c.png", "text": "c"}\n{"file_name": "a.png", "text": "a"}\n')
    found = listed(tmp_path)
    assert captions(found) == ["c", "a"]
    assert line(found) == f"2 of 4 pictures used; passed over: not in metadata.jsonl (2, such as {tmp_path}/b.png)"


def test_a_table_of_a_sub_folder_and_its_column(tmp_path):
    put_pair(tmp_path, "a")
    put(tmp_path / "train" / "x.png", encoded(0))
    put(tmp_path / "train" / "metadata.csv", "file_name,long\nx.png,from the table\n")
    assert captions(listed(tmp_path, column="long")) == ["a", "from the table"]
    with pytest.raises(
        UserError, match=r"^data\.source: .*no column 'text'; there are: 'file_name', 'long'.*data\.column"
    ):
        listed(tmp_path)


def test_of_two_tables_the_first_is_read(tmp_path):
    put(tmp_path / "a.png", encoded(0))
    put(tmp_path / "metadata.jsonl", '{"file_name": "a.png", "text": "from JSON"}')
    put(tmp_path / "metadata.csv", "file_name,text\na.png,from CSV\n")
    found = listed(tmp_path)
    assert captions(found) == ["from JSON"]
    assert found.passed_over == {"tables beside metadata.jsonl": (1, f"{tmp_path}/metadata.csv")}


# Links: a link to a file is that file, a link to a folder is not entered


def test_links(tmp_path):
    put_pair(tmp_path / "elsewhere", "far")
    folder = tmp_path / "images"
    put_pair(folder, "a")
    for suffix in (".png", ".txt"):
        (folder / f"link{suffix}").symlink_to(tmp_path / "elsewhere" / f"far{suffix}")
    (folder / "folder").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    (folder / "circle").symlink_to("circle")
    (tmp_path / "way").symlink_to(folder)
    for source in (folder, tmp_path / "way"):
        found = listed(source)
        assert captions(found) == ["a", "far"]
        assert line(found) == f"2 of 4 pictures used; passed over: linked folders (2, such as {folder}/folder)"


def test_a_table_may_name_a_link_to_a_file(tmp_path):
    """As snapshots in the Hub's cache are laid out: every file is a link to a blob elsewhere."""
    put(tmp_path / "blobs" / "1", encoded(1))
    put(tmp_path / "blobs" / "2", '{"file_name": "a.png", "text": "a"}')
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "a.png").symlink_to("../blobs/1")
    (folder / "metadata.jsonl").symlink_to("../blobs/2")
    found = listed(folder)
    assert captions(found) == ["a"]
    assert found.pictures[0].read_square(8).shape == (3, 8, 8)


# data.on_bad


def bad_folder(folder: Path) -> list[str]:
    put_pair(folder, "fine")
    put(folder / "0 no caption.png", encoded(0))
    put_pair(folder, "1 long")
    put(folder / "1 long.txt", "x" * (limits.MAX_PROMPT_CHARACTERS + 1))
    put_pair(folder, "2 bytes")
    put(folder / "2 bytes.txt", b"caf\xe9")
    os.mkfifo(folder / "3 pipe.png")
    put(folder / "3 pipe.txt", "x")
    return ["has no caption", "a caption of 10,001", "not UTF-8", "no regular file"]


def test_bad_pictures_stop_or_are_counted(tmp_path):
    reasons = bad_folder(tmp_path)
    found = listed(tmp_path, skip=True)
    assert captions(found) == ["fine"]
    assert line(found) == (
        f"1 of 5 pictures used; passed over: what cannot be used (4; the first: {tmp_path}/0 no caption.png has no "
        "caption; put it into 0 no caption.txt)"
    )
    for name, reason in zip(sorted(tmp_path.glob("*.png")), reasons, strict=False):
        with pytest.raises(UserError, match=f"^data.source: .*{reason}"):
            listed(tmp_path)
        name.unlink()
    assert captions(listed(tmp_path)) == ["fine"]


def test_bad_rows_stop_or_are_counted(tmp_path):
    put(tmp_path / "a.png", encoded(0))
    rows = ['{"file_name": "a.png", "text": "first"}', "no JSON", '{"file_name": "a.png"}', '{"file_name": "../a.png"']
    rows += ['{"file_name": "/a.png", "text": "x"}', '{"file_name": "b.png", "text": "x"}']
    rows += ['{"file_name": "a.png", "text": null}', '{"file_name": "a.png", "text": ["last", "of a list"]}']
    put(tmp_path / "metadata.jsonl", "\n".join(rows))
    found = listed(tmp_path, skip=True)
    assert captions(found) == ["first", "last"]
    assert found.bad[0] == 6
    assert "metadata.jsonl, line 2: no JSON" in found.bad[1]
    with pytest.raises(UserError, match=r"metadata\.jsonl, line 2: no JSON"):
        listed(tmp_path)


def test_where_nothing_can_be_used_the_reason_is_named(tmp_path):
    put(tmp_path / "a.png", encoded(0))
    put(tmp_path / "b.heic")
    with pytest.raises(UserError, match=r"holds no captioned images .*of a kind .*b.heic.*, what cannot .*a.png has"):
        listed(tmp_path, skip=True)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_source_that_changes_while_it_is_read(tmp_path, kind):
    source = tmp_path / "images"
    if kind == "folder":
        put_pair(source, "a")
        path = source / "a.png"
    else:
        path = source = write_tar(tmp_path / "a.tar", {"a.png": encoded(0), "a.txt": b"a"})
    [found] = listed(source).pictures
    facts = path.stat()
    put(path, path.read_bytes()[::-1])
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    with pytest.raises(
        UserError, match=r"^data\.source: cannot read the image .*written to since the run looked at it"
    ):
        found.read_square(8)
    path.unlink()
    with pytest.raises(UserError, match=r"^data\.source: cannot read the image .*No such file") as caught:
        found.read_square(8)
    assert_one_line(str(caught.value))


def test_names_that_are_no_text(tmp_path):
    stem = os.fsencode(tmp_path) + b"/caf\xe9\nx"
    for suffix, content in ((b".png", b"no picture"), (b".txt", b"a caption")):
        with open(stem + suffix, "wb") as file:
            file.write(content)
    [found] = listed(tmp_path).pictures
    with pytest.raises(UserError, match=r"cannot read the image .*caf\\udce9\\nx\.png") as caught:
        found.read_square(8)
    assert_one_line(str(caught.value))
    str(caught.value).encode()  # can be printed


def test_folders_that_cannot_be_read(tmp_path, monkeypatch):
    """Access rights do not stop root, so the system call is made to fail."""
    put_pair(tmp_path, "a")
    put_pair(tmp_path, "locked/b")
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(UserError, match=r"^data\.source: cannot read a folder: .*Permission denied: .*locked"):
        listed(tmp_path)
    found = listed(tmp_path, skip=True)
    assert captions(found) == ["a"]
    assert "what cannot be used (1; the first: cannot read a folder" in line(found)


# Tars


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_dotted_keys_are_grouped_as_webdataset_groups_them(tmp_path):
    """The key is IMG_1; 0, 1 and 2 are fields of it, each with a caption of its own."""
    members = {}
    for number in range(3):
        members |= {f"IMG_1.{number}.png": encoded(number), f"IMG_1.{number}.txt": b"caption %d" % number}
    members |= {"a/b.c/IMG_2.crop.png": encoded(3), "a/b.c/IMG_2.txt": b"of the sample"}
    members |= {"IMG_3.png": encoded(4), "IMG_3.mask.png": encoded(5), "IMG_3.caption": b"of the plain one"}
    found = listed(write_tar(tmp_path / "a.tar", members))
    assert captions(found) == ["caption 0", "caption 1", "caption 2", "of the sample", "of the plain one"]
    assert [p.content() for p in found.pictures] == [encoded(seed) for seed in range(5)]
    assert line(found) == (
        f"5 of 6 pictures used; passed over: further pictures of a sample (1, such as {tmp_path}/a.tar, "
        "member 'IMG_3.mask.png')"
    )


def test_keys_are_those_of_datasets_webdataset_reader(tmp_path):
    """datasets' own builder, which has webdataset's expression, groups the same members."""
    from datasets.packaged_modules.webdataset.webdataset import base_plus_ext

    from selfnpo_fast.data import tars

    for name in (
        "a.png",
        "x/y.z/IMG_1.0.png",
        "x/.hidden.png",
        ".a.png",
        "noext",
        "a..png",
        "x/a.b.c.TXT",
        "ä\nb.c.png",
    ):
        found = tars._KEY_AND_FIELD.fullmatch(name)
        expected = base_plus_ext(name)
        assert (found.groups() if found else (None, None)) == expected or "\n" in name


def test_what_is_passed_over_in_tars_is_counted(tmp_path):
    members = {"a.png": encoded(0), "a.txt": b"a", "._a.png": b"", "b.heic": b"", "c.txt": b"alone", "d.cls": b"3"}
    write_tar(tmp_path / "0.tar", members)
    write_tar(tmp_path / "1.tar", {"e.png": encoded(1), "e.txt": b"e", "f.png": encoded(2)})
    shard = f"{tmp_path}/0.tar, member"
    found = listed(tmp_path, skip=True)
    assert captions(found) == ["a", "e"]
    assert line(found) == (
        f"2 of 6 pictures used; passed over: hidden files (1, such as {shard} '._a.png'), of a kind that is not read "
        f"(1, such as {shard} 'b.heic'), captions without a picture (1, such as {shard} 'c.txt'), what cannot be used "
        f"(1; the first: {tmp_path}/1.tar, member 'f.png' has no caption; put a .txt, a .caption, or a .json with a "
        "caption, after it)"
    )
    rest = listed(tmp_path / "1.tar", limit=1)
    assert line(rest) == "1 of 1 pictures used; passed over: what lies beyond the limit, not counted"


def test_tars_in_sub_folders_and_pictures_beside_tars(tmp_path):
    for name in ("train/0", "train/more/1"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_tar(tmp_path / f"{name}.tar", {"a.png": encoded(0), "a.txt": name.encode()})
    put_pair(tmp_path, "train/previews/x")
    found = listed(tmp_path)
    assert captions(found) == ["train/0", "train/more/1"]
    assert line(found) == (
        f"2 of 3 pictures used; passed over: files beside .tar files (1, such as {tmp_path}/train/previews/x.png)"
    )


def test_captions_of_json_members(tmp_path):
    content = b'{"caption": ["one", "two"], "long": "a long one"}'
    path = write_tar(tmp_path / "a.tar", {"a.png": encoded(0), "a.json": content})
    assert captions(listed(path)) == ["one"]
    assert captions(listed(path, column="long")) == ["a long one"]


def header(kind: bytes, size: int, name: bytes = b"x") -> bytes:
    """A header block of a tar, whatever its size says."""
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_headers_of_tars_are_bounded(tmp_path, kind):
    """A header that says it is a terabyte long, in a file that is."""
    path = tmp_path / "a.tar"
    put(path, header(kind, 1 << 40))
    os.truncate(path, (1 << 40) + 4096)
    with pytest.raises(UserError, match=r"a header of 1,099,511,627,776 bytes at byte 0; at most 1,048,576 are read"):
        listed(path)


@pytest.mark.parametrize(
    "records",
    [b"x" * 512, b"9" * 512, b"5 a=b" * 100 + b"x" * 12, b"0 a=b\n", b"8 size=x\n", b"11 size=-5\n", b"999 path=a\n"],
)
def test_damaged_pax_headers_are_refused(tmp_path, records):
    block = records.ljust(512, b"\0")
    content = header(tarfile.XHDTYPE, len(records)) + block + header(tarfile.REGTYPE, 0) + bytes(1024)
    put(tmp_path / "a.tar", content)
    with pytest.raises(UserError, match=r"a\.tar is damaged or cut short at byte|holds no captioned images") as caught:
        listed(tmp_path / "a.tar")
    assert_one_line(str(caught.value))


def test_many_headers_before_a_member_do_not_recurse(tmp_path):
    record = b"12 a=123456\n"
    chain = (header(tarfile.XHDTYPE, len(record)) + record.ljust(512, b"\0")) * 5000
    whole = write_tar(tmp_path / "b.tar", {"a.png": encoded(0), "a.txt": b"a"}).read_bytes()
    put(tmp_path / "a.tar", chain + whole)
    assert captions(listed(tmp_path / "a.tar")) == ["a"]


def test_a_member_that_is_larger_than_the_tar(tmp_path):
    put(tmp_path / "a.tar", header(tarfile.REGTYPE, 1 << 60) + bytes(1024))
    with pytest.raises(UserError, match=r"a\.tar is damaged or cut short at byte 0"):
        listed(tmp_path / "a.tar")


def test_the_number_of_members_is_bounded(tmp_path, monkeypatch):
    from selfnpo_fast.data import tars

    monkeypatch.setattr(tars, "MAX_TAR_MEMBERS", 3)
    write_tar(tmp_path / "a.tar", {f"{i}.cls": b"" for i in range(4)})
    with pytest.raises(UserError, match="has more than 3 members; split it"):
        listed(tmp_path / "a.tar")


@pytest.mark.parametrize("make", [lambda p: os.mkfifo(p), lambda p: p.symlink_to("/dev/zero")])
@pytest.mark.parametrize("name", ["a.tar", "a.parquet"])
def test_only_regular_files_are_sources(tmp_path, make, name):
    make(tmp_path / name)
    for source in (tmp_path / name, tmp_path, str(tmp_path / "{a,b}") + os.path.splitext(name)[1]):
        with pytest.raises(UserError, match=r"^data\.source: .*no regular file|cannot read .*/b\."):
            listed(source)

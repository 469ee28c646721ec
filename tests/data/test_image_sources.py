"""Webdataset tars as a source of captioned images: what is read, passed over, and refused."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzzing import assert_one_line, fuzz, hostile_pickle
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from selfnpo_fast.data.image_sources import open_source
from selfnpo_fast.data.listing import Picture
from selfnpo_fast.runtime.errors import UserError


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def encoded(seed: int, kind: str = "png") -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(seed)).save(file, kind, **({"lossless": True} if kind == "webp" else {}))
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str | tarfile.TarInfo, bytes]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info.isreg():
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(i: int) -> list[tuple[str, bytes]]:
    return [(f"{i:03d}.png", encoded(i)), (f"{i:03d}.txt", f"number {i}".encode())]


def read(source: Path | str, limit: int = 100) -> list[Picture]:
    return open_source(str(source), limit).listing().pictures


def assert_holds(pictures: list[Picture], expected: dict[str, int]) -> None:
    """`expected` has the captions in order, each with the seed of its picture."""
    assert [picture.caption for picture in pictures] == list(expected)
    for found, seed in zip(pictures, expected.values(), strict=True):
        pixels = torch.from_numpy(picture(seed).astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(found.read_square(8), pixels, rtol=0, atol=1e-6)


def test_samples_in_the_order_of_the_tar(tmp_path):
    members = [
        ("z/007.png", encoded(0)),
        ("z/007.txt", "  a café\n".encode()),
        ("z/007.json", b'{"caption": "not this one"}'),
        ("a/b/001.json", json.dumps({"caption": "from JSON", "width": 8}).encode()),
        ("a/b/001.WEBP", encoded(1, "webp")),
        ("002.tXt", b"\xef\xbb\xbfwith a mark"),
        ("002.bmp", encoded(2, "bmp")),
    ]
    pictures = read(write_tar(tmp_path / "a.tar", members))
    assert_holds(pictures, {"a café": 0, "from JSON": 1, "with a mark": 2})
    assert pictures[1].label == f"{tmp_path}/a.tar, member 'a/b/001.WEBP'"


def test_jpegs(tmp_path):
    members = [(f"{i}.{suffix}", encoded(i, "jpeg")) for i, suffix in enumerate(["jpg", "jpeg", "png"])]
    members = [member for i, name in enumerate(members) for member in (name, (f"{i}.txt", b"x"))]
    assert [p.read_square(4).shape for p in read(write_tar(tmp_path / "a.tar", members))] == [(3, 4, 4)] * 3


def odd(name: str, kind: bytes, link: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info, b""


def test_members_of_other_kinds_are_passed_over(tmp_path):
    marker = tmp_path / "marker"
    members = [
        odd("folder", tarfile.DIRTYPE),
        odd("000.jpg/", tarfile.DIRTYPE),
        ("README", b"no suffix"),
        (".hidden.png", b"no key"),
        ("._000.png", b"of a Macintosh"),
        ("000.png", encoded(0)),
        ("000.seg.png", b"another picture"),
        ("000.cls", b"3"),
        ("000.pkl", hostile_pickle(marker)),
        ("000.pth", hostile_pickle(marker)),
        ("000.txt", b"number 0"),
        ("001.txt", b"a caption alone"),
        odd("link", tarfile.SYMTYPE, "/etc/passwd"),
        odd("002.pyd", tarfile.CHRTYPE),
        *sample(3),
    ]
    assert_holds(read(write_tar(tmp_path / "a.tar", members)), {"number 0": 0, "number 3": 3})
    assert not marker.exists()


@pytest.mark.parametrize("name", ["/etc/cron.d/evil", "../../evil", "a/../../evil", "evil\nline", "e" * 300, "\udcff"])
def test_names_lead_nowhere(name, tmp_path):
    folder = tmp_path / "here"
    members = [(f"{name}.png", encoded(0)), (f"{name}.txt", b"number 0"), ("1.png", b"bad"), ("1.txt", b"bad")]
    pictures = read(write_tar(folder / "a.tar", members))
    assert_holds(pictures[:1], {"number 0": 0})
    assert_one_line(pictures[0].label)
    assert list(tmp_path.rglob("*")) == [folder, folder / "a.tar"]


def test_a_folder_of_shards_and_patterns(tmp_path):
    for shard in range(12):
        write_tar(tmp_path / "data" / f"{shard:02d}.tar", sample(2 * shard) + sample(2 * shard + 1))
    (tmp_path / "data" / "00_stats.json").write_text("{}")
    everything = {f"number {i}": i for i in range(24)}
    assert_holds(read(tmp_path / "data"), everything)
    assert_holds(read(tmp_path / "data" / "{00..11}.tar"), everything)
    assert_holds(read(tmp_path / "data" / "0{3,1}.tar"), {f"number {i}": i for i in (6, 7, 2, 3)})
    assert len(read(tmp_path / "data" / "{0,1}{0..1}.tar")) == 8
    assert_holds(read(tmp_path / "data", limit=3), {f"number {i}": i for i in range(3)})


def test_a_limit_reads_no_further(tmp_path):
    write_tar(tmp_path / "0.tar", [*sample(0), *sample(1), ("bad.png", b"")])
    (tmp_path / "1.tar").write_bytes(b"no tar")
    assert len(read(tmp_path, limit=2)) == 2


def test_a_folder_with_images_is_a_folder_of_images(tmp_path):
    write_tar(tmp_path / "backup.tar", sample(1))
    (tmp_path / "a.png").write_bytes(encoded(0))
    (tmp_path / "a.txt").write_text("number 0")
    assert_holds(read(tmp_path), {"number 0": 0})


def test_the_stamp_follows_the_shards(tmp_path):
    path = write_tar(tmp_path / "a.tar", sample(0))
    before = open_source(str(path), 10).stamp
    assert open_source(str(path), 10).stamp == before
    write_tar(path, sample(0) + sample(1))
    assert open_source(str(path), 10).stamp != before


def no_caption(folder: Path) -> str:
    write_tar(folder / "a.tar", [("0.png", encoded(0)), ("1.txt", b"x")])
    return "member '0.png' has no caption"


def two_images(folder: Path) -> str:
    write_tar(folder / "a.tar", [("0.png", encoded(0)), ("0.jpg", encoded(0, "jpeg")), ("0.txt", b"x")])
    return "member '0.png' is one of 2 images of the same key"


def twice(folder: Path) -> str:
    write_tar(folder / "a.tar", [("0.png", encoded(0)), ("0.png", encoded(0)), ("0.txt", b"x")])
    return "member '0.png' is there twice"


def link(folder: Path) -> str:
    write_tar(folder / "a.tar", [odd("0.png", tarfile.SYMTYPE, "/etc/passwd"), ("0.txt", b"x")])
    return "member '0.png' is a link, a device or sparse, no plain file"


def hard_link(folder: Path) -> str:
    write_tar(folder / "a.tar", [*sample(0), odd("1.txt", tarfile.LNKTYPE, "000.txt")])
    return "member '1.txt' is a link, a device or sparse, no plain file"


def sparse(folder: Path) -> str:
    """A sparse member: the bytes in the tar are not those of the file."""
    info = tarfile.TarInfo("0.png")
    info.pax_headers = {"GNU.sparse.map": "0,8", "GNU.sparse.size": "8"}
    write_tar(folder / "a.tar", [(info, b"12345678"), ("0.txt", b"x")])
    return "member '0.png' is a link, a device or sparse, no plain file"


def no_picture(folder: Path) -> str:
    write_tar(folder / "a.tar", [("0.png", b"not a picture"), ("0.txt", b"x")])
    return "cannot read the image .*member '0.png': it is no PNG"


def postscript(folder: Path) -> str:
    """For an EPS file Pillow would start Ghostscript."""
    write_tar(folder / "a.tar", [("0.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"), ("0.txt", b"x")])
    return "cannot read the image .*member '0.png': it is no PNG"


def huge_picture(folder: Path) -> str:
    """A PNG of 2^31 pixels in few bytes."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", 1 << 16, 1 << 15, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(99))]
    png = b"\x89PNG\r\n\x1a\n"
    for chunk in chunks:
        png += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    write_tar(folder / "a.tar", [("0.png", png), ("0.txt", b"x")])
    return "cannot read the image .*member '0.png': .*decompression bomb"


def not_utf8(folder: Path) -> str:
    write_tar(folder / "a.tar", [("0.png", encoded(0)), ("0.txt", b"caf\xe9")])
    return "member '0.txt' cannot be read as UTF-8 text"


def surrogate(folder: Path) -> str:
    write_tar(folder / "a.tar", [("0.png", encoded(0)), ("0.json", b'{"caption": "\\ud800"}')])
    return "member '0.json': half a surrogate pair"


def no_json(folder: Path) -> str:
    write_tar(folder / "a.tar", [("0.png", encoded(0)), ("0.json", b"{")])
    return "member '0.json' cannot be read as JSON with a string `caption`"


def deep_json(folder: Path) -> str:
    write_tar(folder / "a.tar", [("0.png", encoded(0)), ("0.json", b"[" * 500_000)])
    return "member '0.json' cannot be read as JSON with a string `caption`"


def list_of_json(folder: Path) -> str:
    write_tar(folder / "a.tar", [("0.png", encoded(0)), ("0.json", b"[]")])
    return "member '0.json' cannot be read as JSON with a string `caption`"


def no_caption_in_json(folder: Path) -> str:
    write_tar(folder / "a.tar", [("0.png", encoded(0)), ("0.json", b'{"caption": null}')])
    return "member '0.json' cannot be read as JSON with a string `caption`"


def long_caption(folder: Path) -> str:
    write_tar(folder / "a.tar", [("0.png", encoded(0)), ("0.txt", b"x" * (1 << 20) + b"x")])
    return "member '0.txt': 1,048,577 bytes; at most"


def nothing(folder: Path) -> str:
    write_tar(folder / "a.tar", [("0.txt", b"x")])
    return "holds no captioned images .*; passed over: captions without a picture .1, such as .*a.tar, member '0.txt'"


def no_tar(folder: Path) -> str:
    (folder / "a.tar").write_bytes(b"x" * 2000)
    return "cannot read .*a.tar as an uncompressed tar"


def empty_file(folder: Path) -> str:
    (folder / "a.tar").write_bytes(b"")
    return "cannot read .*a.tar as an uncompressed tar"


def compressed(folder: Path) -> str:
    write_tar(folder / "a.tar", sample(0), "w:gz")
    return "cannot read .*a.tar as an uncompressed tar"


def cut_in_a_member(folder: Path) -> str:
    path = write_tar(folder / "a.tar", sample(0) + sample(1))
    path.write_bytes(path.read_bytes()[:1100])
    return "a.tar"


def cut_between_members(folder: Path) -> str:
    path = write_tar(folder / "a.tar", sample(0) + sample(1))
    path.write_bytes(path.read_bytes()[:2048])
    return "a.tar is damaged or cut short at byte 2,048"


def damaged_header(folder: Path) -> str:
    path = write_tar(folder / "a.tar", sample(0) + sample(1))
    content = bytearray(path.read_bytes())
    content[2048 + 3] ^= 1
    path.write_bytes(content)
    return "a.tar is damaged or cut short at byte 2,048"


MISTAKES = [
    no_caption, two_images, twice, link, hard_link, sparse, no_picture, postscript, huge_picture, not_utf8, surrogate,
    no_json, deep_json, list_of_json, no_caption_in_json, long_caption, nothing, no_tar, empty_file, compressed,
    cut_in_a_member, cut_between_members, damaged_header,
]  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_mistakes_are_told_in_one_line(mistake, tmp_path):
    expected = mistake(tmp_path)
    with pytest.raises(UserError, match=f"^data.source: .*{expected}") as caught:
        for found in read(tmp_path):
            found.read_square(8)
    assert_one_line(str(caught.value), str(tmp_path))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{0..3}.tar", "cannot read .*/0.tar"),
        ("{3..0}.tar", "stands for no name"),
        ("{0..999999}.tar", "or for more than 100,000"),
        ("{0..9999}{0..9999}.tar", "or for more than 100,000"),
        ("nowhere.tar", "no such folder, file or dataset: .*nowhere.tar"),
    ],
)
def test_patterns_that_lead_nowhere(pattern, expected, tmp_path):
    with pytest.raises(UserError, match=f"^data.source: .*{expected}"):
        read(tmp_path / pattern)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    name = "long/" * 40 + "1"  # such a name has a header of its own before the member's
    members = [*sample(0), (f"{name}.png", encoded(1)), (f"{name}.json", b'{"caption": "c"}')]
    return write_tar(tmp_path_factory.mktemp("whole") / "a.tar", members)


@fuzz(150)
@given(share=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), cut=st.booleans())
def test_damaged_tars_are_read_or_refused(whole, tmp_path, share, value, cut):
    content = whole.read_bytes()
    offset = int(share * len(content.rstrip(b"\0")))
    changed = content[:offset] if cut else content[:offset] + bytes([value]) + content[offset + 1 :]
    (tmp_path / "a.tar").write_bytes(changed)
    try:
        found = [(picture.read_square(8), picture.caption) for picture in read(tmp_path / "a.tar")]
    except UserError as error:
        assert_one_line(str(error), str(tmp_path))
    else:
        assert found
        assert not cut

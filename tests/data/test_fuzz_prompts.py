"""Prompt files of random content: encodings, damage, scripts; a million lines in bounded memory."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzzing import assert_one_line, fuzz
from hypothesis import example, given
from hypothesis import strategies as st

from selfnpo_fast.data.image_sources import DATASET_ID
from selfnpo_fast.data.prompts import read_prompts
from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.runtime.limits import MAX_LINE_BYTES, MAX_PROMPT_CHARACTERS

ROOT = Path(__file__).parents[2]
KINDS = (".txt", ".jsonl", ".csv", ".parquet")
ENCODINGS = (
    "utf-8",
    "utf-8-sig",
    "utf-16",
    "utf-16-le",
    "utf-16-be",
    "utf-32",
    "latin-1",
    "cp1252",
    "shift_jis",
    "utf-7",
)

# Pieces that text handling tends to break: joined emoji, flags, skin tones, bidi marks and
# isolates, combining marks, separators that str.splitlines takes for line ends, private use,
# non-characters, the ends of planes.
PIECES = [
    *("a cat", "naß", "e\u0301", "Z\u0351\u036b\u0343\u036a", "क्षि", "雨の街", "قطة على", "חתול", "\u202eabc\u202c"),
    *("👩‍🌾", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "👍🏽", "\u200d", "\u200b", "\ufeff", "\u2067ab\u2069"),
    *("\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\xa0", "\u3000", "\t", "\x1b[31m"),
    *("\ue000", "\ufffe", "\uffff", "\ufffd", "\U0001ffff", "\U0010ffff", '"', "'", ",", "\\", "\\u0041"),
    *("{}", "[", "%s", "$(id)", "../..", "-", "#", "=1+1", "&amp;", "<b>"),
]  # fmt: skip
TRICKY = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), min_size=1, max_size=8).map(" ".join)


def writable(text: str) -> bool:
    """Whether a file can hold the text as one line that is not blank."""
    unwritable = {"\0", "\n", "\r"} & set(text) or any(unicodedata.category(c) == "Cs" for c in text)
    return not unwritable and text.strip() != "" and not text.startswith("\ufeff")


PROMPTS = st.lists(TRICKY.filter(writable), min_size=1, max_size=6)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("prompts")


def read(path: Path, **kwargs) -> list[str] | None:
    """The prompts, which have to be stripped, or None where one line with the path refuses them."""
    try:
        prompts = read_prompts(str(path), **kwargs)
    except UserError as error:
        assert_one_line(str(error), str(path))
        assert str(error).startswith("prompts: ")
        return None
    assert prompts
    for prompt in prompts:
        assert prompt == prompt.strip() != ""
        assert len(prompt) <= MAX_PROMPT_CHARACTERS
        assert "\0" not in prompt
        prompt.encode("utf-8")
    return prompts


def write(path: Path, prompts: list[str]) -> Path:
    """UTF-8, by the writer of the format."""
    if path.suffix == ".txt":
        path.write_bytes("".join(f"{prompt}\n" for prompt in prompts).encode())
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["prompt", "n"], *([prompt, i] for i, prompt in enumerate(prompts))])
    else:
        pq.write_table(pa.table({"prompt": prompts}), path)
    return path


@pytest.mark.parametrize("kind", KINDS)
@fuzz(60)
@given(prompts=PROMPTS)
@example(prompts=["👩‍🌾 \u202e אבג \u202c e\u0301", "\u2028a\x85b\x0bc"])
def test_tricky_prompts_come_back(folder, kind, prompts):
    """Character for character: nothing is normalised, reordered, or split where no line ends."""
    assert read(write(folder / f"tricky{kind}", prompts)) == [prompt.strip() for prompt in prompts]


@pytest.mark.parametrize("kind", KINDS[:3])
@fuzz(60)
@given(prompts=PROMPTS, encoding=st.sampled_from(ENCODINGS))
def test_encodings(folder, kind, prompts, encoding):
    """UTF-8, with or without a mark, and of other encodings what has the same bytes in UTF-8."""
    path = write(folder / f"encoded{kind}", prompts)
    content = path.read_bytes().decode().encode(encoding, "replace")
    path.write_bytes(content)
    found = read(path)
    if encoding in ("utf-8", "utf-8-sig"):
        assert found == [prompt.strip() for prompt in prompts]
    elif encoding.startswith(("utf-16", "utf-32")):
        assert found is None, "UTF-16 of a line end holds a NUL or the file starts with a mark"
    elif found is not None and kind == ".txt":
        assert "\n".join(found) == "\n".join(line.strip() for line in content.decode().split("\n") if line.strip())


@pytest.mark.parametrize("kind", KINDS)
@fuzz(80)
@given(
    prompts=PROMPTS,
    cut=st.floats(0, 1),
    share=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
    junk=st.binary(max_size=6)
    | st.sampled_from([b"\0", b"\r", b'"', b"\xef\xbb\xbf", b"\xff\xfe", b"\n\n", b"{", b"\\"]),
)
def test_damaged_files(folder, kind, prompts, cut, share, bit, junk):
    """A flipped bit, and bytes inserted or put instead of the end."""
    path = write(folder / f"damaged{kind}", prompts)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[int(share * len(damaged))] ^= 1 << bit
    end = int(cut * len(damaged))
    for content in (damaged, damaged[:end], damaged[:end] + junk + damaged[end:]):
        path.write_bytes(content)
        read(path)
        read(path, limit=1)


@pytest.mark.parametrize("kind", KINDS[:3])
@fuzz(40)
@given(column=st.text(max_size=12), prompts=PROMPTS, limit=st.integers(-1, 8))
def test_any_column_and_limit(folder, kind, column, prompts, limit):
    path = write(folder / f"column{kind}", prompts)
    if limit < 1:
        with pytest.raises(UserError) as caught:
            read_prompts(str(path), column=column, limit=limit)
        assert_one_line(str(caught.value), str(limit))
    else:
        found = read(path, column=column, limit=limit)
        assert found is None or column in ("prompt", "n") or kind == ".txt"
        assert found is None or len(found) <= limit


@pytest.mark.parametrize("text", ["x", "é", "👩‍🌾", " ", "\t", "\u2028", "a b ", '"', "\\", "[", '{"prompt":', ","])
@pytest.mark.parametrize("kind", KINDS[:3])
def test_huge_lines(folder, kind, text):
    """A line of 16 MB is refused by its length, not by its content."""
    path = folder / f"huge{kind}"
    path.write_bytes(b"prompt\n" * (kind == ".csv") + text.encode() * ((16 * MAX_LINE_BYTES) // len(text.encode())))
    assert read(path) is None


@fuzz(100)
@given(source=st.text(max_size=40) | st.lists(st.sampled_from(PIECES), max_size=4).map("/".join))
def test_any_text_as_a_source(source):
    """Names that are neither there nor ids of datasets are refused before the Hub is asked."""
    if DATASET_ID.fullmatch(source) or ("\0" not in source and os.path.exists(source)):
        return
    with pytest.raises(UserError) as caught:
        read_prompts(source)
    assert_one_line(str(caught.value))


MEASURE = """
import pathlib, sys
from selfnpo_fast.data.prompts import read_prompts
def most():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])
path, limit = sys.argv[1], int(sys.argv[2])
read_prompts(path, limit=1)  # imports
before = most()
prompts = read_prompts(path, limit=limit)
print(len(prompts), prompts[-1], most() - before)
"""
LINES = 10**6


@pytest.fixture(scope="module")
def million(tmp_path_factory) -> Path:
    """A folder with the same million prompts, 200 bytes each, 200 MB, in .txt, .jsonl and .csv."""
    folder = tmp_path_factory.mktemp("million")
    for kind, form in ((".txt", "{}\n"), (".jsonl", '{{"prompt": "{}"}}\n'), (".csv", "{},x\n")):
        with (folder / f"p{kind}").open("w") as file:
            file.write("prompt,n\n" * (kind == ".csv"))
            for start in range(0, LINES, 10_000):
                file.write("".join(form.format(f"{'x' * 190} {i:07d}") for i in range(start, start + 10_000)))
    yield folder
    for path in folder.iterdir():
        path.unlink()


def measured(path: Path, limit: int) -> tuple[int, str, int]:
    """Prompts read, the last one's number, and the growth of the greatest resident memory in KiB.

    From /proc: what getrusage says starts with the memory of the process that forked this one.
    """
    command = [sys.executable, "-c", MEASURE, str(path), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    count, _, last, grown = done.stdout.split()
    return int(count), last, int(grown)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_million_lines_are_streamed(million, kind):
    """Memory follows the prompts that are kept, not the 200 MB on disk."""
    path = million / f"p{kind}"
    assert path.stat().st_size > 190 * LINES
    count, last, grown = measured(path, 1000)
    assert (count, last) == (1000, "0000999")
    assert grown < 2 << 10  # observed 240 KiB
    count, last, grown = measured(path, LINES // 10)
    assert (count, last) == (LINES // 10, f"{LINES // 10 - 1:07d}")
    assert grown < 32 << 10  # observed 25.5 MiB: 247 bytes a prompt, and the list


@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_million_blank_lines_keep_nothing(folder, kind):
    """All rows are read, none is kept, until the last."""
    path = folder / f"blank{kind}"
    blank = {".txt": " \n", ".jsonl": '{"prompt": " "}\n', ".csv": " ,x\n"}[kind]
    last = {".txt": "fox 7 \n", ".jsonl": '{"prompt": "fox 7"}\n', ".csv": "fox 7,x\n"}[kind]
    path.write_text("prompt,n\n" * (kind == ".csv") + last + blank * LINES + last)
    count, last, grown = measured(path, LINES)
    assert (count, last) == (2, "7")
    assert grown < 2 << 10  # observed 0

"""Prompt sources: what is read, what is refused, and in which words."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import tarfile
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzzing import assert_one_line
from hypothesis import given
from hypothesis import strategies as st

from selfnpo_fast.data.prompts import ASSETS, fingerprint, read_prompts
from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.runtime.limits import MAX_LINE_BYTES, MAX_PROMPT_CHARACTERS

KINDS = (".txt", ".jsonl", ".csv", ".parquet")
MIXED = ["a plain prompt", "ein Käfer, naß", "🦊 in the snow 👩‍🌾", "قطة على السطح", "חתול אפור, \u200fשמש", "雨の街"]


def write(path: Path, prompts: list[str], *, column: str = "prompt", bom: bool = False, newline: str = "\n") -> str:
    """Write a file of the kind that its suffix names; tables have other columns, too."""
    encoding = "utf-8-sig" if bom else "utf-8"
    rows = [{"id": i, column: prompt, "note": "a,b"} for i, prompt in enumerate(prompts)]
    if path.suffix == ".parquet":
        pq.write_table(pa.table({name: [row[name] for row in rows] for name in ("id", column, "note")}), path)
    elif path.suffix == ".csv":
        with path.open("w", encoding=encoding, newline="") as file:
            table = csv.DictWriter(file, ["id", column, "note"], quoting=csv.QUOTE_ALL, lineterminator=newline)
            table.writeheader()
            table.writerows(rows)
    else:
        lines = prompts if path.suffix == ".txt" else [json.dumps(row, ensure_ascii=bom) for row in rows]
        path.write_bytes("".join(line + newline for line in lines).encode(encoding))
    return str(path)


def cleaned(prompts: list[str]) -> list[str]:
    return [prompt.strip() for prompt in prompts if prompt.strip()]


def message(source: str | Path, **kwargs) -> str:
    """The UserError that refuses `source`: one short line."""
    with pytest.raises(UserError) as caught:
        read_prompts(str(source), **kwargs)
    text = str(caught.value)
    assert isinstance(caught.value, UserError)
    assert "\n" not in text
    assert text.startswith("prompts: ")
    assert len(text.replace(str(source), "")) < 500
    return text


# What is read


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [False, True])
def test_scripts_emoji_line_ends_and_byte_order_marks(tmp_path, kind, newline, bom):
    path = write(tmp_path / f"prompts{kind}", ["  ", *MIXED, "", "\tlast one  "], bom=bom, newline=newline)
    assert read_prompts(path) == [*MIXED, "last one"]


@pytest.mark.parametrize("kind", KINDS)
def test_limit_and_duplicates(tmp_path, kind):
    path = write(tmp_path / f"p{kind}", ["", "b", "a", "", "b", "c"])
    assert read_prompts(path, limit=3) == ["b", "a", "b"]
    assert read_prompts(path, limit=100) == ["b", "a", "b", "c"]


@pytest.mark.parametrize("kind", KINDS[1:])
def test_column(tmp_path, kind):
    assert read_prompts(write(tmp_path / f"p{kind}", MIXED, column="Bild, Text"), column="Bild, Text") == MIXED


def test_suffix_in_capitals_and_missing_last_line_end(tmp_path):
    path = tmp_path / "P.TXT"
    path.write_bytes(b"one\n\n \ntwo")
    assert read_prompts(str(path)) == ["one", "two"]


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "p.txt", ["at home"])
    assert read_prompts("~/p.txt") == ["at home"]


def test_parquet_text_types(tmp_path):
    words = ["one", "two", "one"]
    for number, kind in enumerate([pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"prompt": pa.array(words).cast(kind)}), path)
        assert read_prompts(str(path)) == words


def test_a_prompt_of_greatest_length(tmp_path):
    prompt = "ß" * MAX_PROMPT_CHARACTERS
    for kind in KINDS:
        assert read_prompts(write(tmp_path / f"p{kind}", [f"  {prompt}  "])) == [prompt]


# Half a surrogate pair (category Cs) cannot be written as UTF-8; a first U+FEFF is the byte order
# mark.
CHARACTERS = st.characters(exclude_characters="\0\ufeff", exclude_categories=["Cs"])
FREE_TEXTS = st.lists(st.text(CHARACTERS, max_size=60), min_size=1, max_size=20).filter(cleaned)
LINE_TEXTS = st.lists(
    st.text(st.characters(exclude_characters="\0\ufeff\n\r", exclude_categories=["Cs"]), max_size=60),
    min_size=1,
    max_size=20,
).filter(cleaned)


@given(prompts=LINE_TEXTS, bom=st.booleans(), newline=st.sampled_from(["\n", "\r\n"]))
def test_round_trip_of_text(tmp_path_factory, prompts, bom, newline):
    path = tmp_path_factory.getbasetemp() / "round.txt"
    assert read_prompts(write(path, prompts, bom=bom, newline=newline)) == cleaned(prompts)


@pytest.mark.parametrize("kind", KINDS[1:])
@given(prompts=FREE_TEXTS, bom=st.booleans())
def test_round_trip_of_tables(tmp_path_factory, kind, prompts, bom):
    path = tmp_path_factory.getbasetemp() / f"round{kind}"
    assert read_prompts(write(path, prompts, bom=bom)) == cleaned(prompts)


@pytest.mark.parametrize("kind", KINDS)
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")))
def test_any_bytes_are_read_or_refused(tmp_path_factory, kind, content):
    path = tmp_path_factory.getbasetemp() / f"any{kind}"
    path.write_bytes(content)
    try:
        prompts = read_prompts(str(path))
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert prompts == cleaned(prompts) != []


@pytest.mark.parametrize("kind", KINDS)
def test_limit_bounds_memory(tmp_path, kind):
    """A thousand prompts of a file of 40 MB. The batches that Arrow allocates are not counted."""
    path = tmp_path / f"big{kind}"
    prompts = [f"prompt {number} {'x' * 380}" for number in range(100_000)]
    write(path, prompts)
    expected = prompts[:1000]
    del prompts
    read_prompts(str(path), limit=1)  # imports
    tracemalloc.start()
    try:
        assert read_prompts(str(path), limit=1000) == expected
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.5e6  # measured: 0.45 to 0.48 MB, of which the thousand prompts are 0.4


def test_one_huge_line_is_refused_in_bounded_memory(tmp_path):
    path = tmp_path / "huge.txt"
    with path.open("wb") as file:
        file.write(b"fine\n")
        file.truncate(1 << 30)  # a sparse gigabyte
    tracemalloc.start()
    try:
        refusal = message(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "line 2" in refusal
    assert peak < 8 * MAX_LINE_BYTES


# What is refused


def refuse(path: Path, content: str | bytes, *words: str) -> None:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    refusal = message(path)
    for word in (str(path), *words):
        assert word in refusal


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("content", [b"", codecs.BOM_UTF8, b"\n\n", b"\r\n"])
def test_empty_file(tmp_path, kind, content):
    refuse(tmp_path / f"p{kind}", content, "empty", "put at least one prompt")


@pytest.mark.parametrize("kind", KINDS)
def test_only_blank_rows(tmp_path, kind):
    assert "blank" in message(write(tmp_path / f"p{kind}", ["", "  "]))


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("bom", [b"", codecs.BOM_UTF8])
def test_not_utf8(tmp_path, kind, bom):
    first = {".txt": b"fine\n", ".jsonl": b'{"prompt": "fine"}\n', ".csv": b"prompt\n"}[kind]
    offset = len(bom) + len(first) + 4
    refuse(tmp_path / f"p{kind}", bom + first + b"caf\xc3\xa9"[:3] + b" \xe9 x\n", "line 2", "0xe9", f"offset {offset}")


def test_not_utf8_after_a_byte_order_mark(tmp_path):
    refuse(tmp_path / "p.txt", codecs.BOM_UTF8 + b"ab\xff", "line 1", "0xff", "offset 5 ", "save it as UTF-8")


def test_utf16_is_named_at_its_first_byte(tmp_path):
    refuse(tmp_path / "p.txt", "a prompt".encode("utf-16"), "line 1", "offset 0 ")


@pytest.mark.parametrize("kind", KINDS[:3])
def test_nul_in_the_file(tmp_path, kind):
    refuse(tmp_path / f"p{kind}", b"prompt\nab\0cd\n" if kind != ".jsonl" else b'\n{"prompt": "ab\0"}', "line 2", "NUL")


def test_nul_in_values(tmp_path):
    refuse(tmp_path / "p.jsonl", '{"prompt": "x"}\n{"prompt": "red\\u0000fox"}', "line 2", "NUL", "'red'")
    refusal = message(write(tmp_path / "p.parquet", ["x", "red\0fox"]))
    assert "row 2" in refusal
    assert "NUL" in refusal


def test_half_a_surrogate_pair(tmp_path):
    refuse(tmp_path / "p.jsonl", '{"prompt": "a \\ud83d b"}', "line 1", "\\ud83d", "surrogate")
    (tmp_path / "whole.jsonl").write_text('{"prompt": "a \\ud83e\\udd8a"}')
    assert read_prompts(str(tmp_path / "whole.jsonl")) == ["a 🦊"]


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_too_long(tmp_path, kind):
    refusal = message(write(tmp_path / f"p{kind}", ["fine", "y" * (MAX_PROMPT_CHARACTERS + 1)]))
    unit, number = {".parquet": ("row", 2), ".csv": ("line", 3)}.get(kind, ("line", 2))
    assert f"{unit} {number}:" in refusal
    assert "10,001" in refusal


def test_json_line_too_long(tmp_path):
    long = json.dumps({"prompt": "fine", "image": "z" * MAX_LINE_BYTES})
    refuse(tmp_path / "p.jsonl", '{"prompt": "fine"}\n' + long, "line 2", "1,048,576 bytes")


def test_bare_carriage_returns(tmp_path):
    refuse(tmp_path / "p.txt", "one\rtwo\rthree", "line 1", "'one'", "carriage return", "LF")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('["a prompt"]', ["no object", "['a prompt']"]),
        ('"a prompt"', ["no object"]),
        ("a prompt", ["no JSON", "a prompt", "one object a line"]),
        ('{"prompt": "a', ["no JSON"]),
        ("[" * 100_000, ["no JSON"]),
        ("9" * 5_000, ["no JSON"]),
        ('{"prompt": null}', ["nothing (null)"]),
        ('{"prompt": 7}', ["int 7", "write a string"]),
        ('{"prompt": []}', ["list []"]),
        ('{"prompt": [["a"]]}', ["list ['a']"]),
        ('{"prompt": {"a": 1}}', ["dict"]),
        ('{"caption": "a", "id": 3}', ["no column 'prompt'", "'caption', 'id'"]),
        ("{}", ["no column 'prompt'", "none"]),
    ],
)
def test_bad_json(tmp_path, line, words):
    words = ["line 3", *(word.replace("['a prompt']", '["a prompt"]') for word in words)]
    refuse(tmp_path / "p.jsonl", f'{{"prompt": "fine"}}\n\n{line}\n', *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("caption,id\na,3\n", ["line 1", "no column 'prompt'", "'caption', 'id'"]),
        ("\nid;prompt\n", ["line 2", "'id;prompt'"]),
        ("id,prompt\n1,fine\n2\n", ["line 3", "1 fields, '2'", "2"]),
        ('prompt\nfine\n"never closed\nmore\n', ["line 3", "no valid CSV", "quote"]),
        ('prompt\n"a"b\n', ["line 2", "no valid CSV"]),
        ('prompt\n"two\nlines",x\n\n"q"r', ["line 5", "no valid CSV"]),
        ('prompt\n"' + "x" * 200_000 + '"\n', ["line 2", "field limit"]),
    ],
)
def test_bad_csv(tmp_path, content, words):
    refuse(tmp_path / "p.csv", content, *words)


def test_csv_header_may_have_spaces(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text('id, prompt\n1,"a fox, running"\n\n2,"she said ""hi"""\n')
    assert read_prompts(str(path)) == ["a fox, running", 'she said "hi"']


def test_bad_parquet(tmp_path):
    path = tmp_path / "p.parquet"
    refuse(path, b"PAR1 no such thing PAR1", "no readable parquet")
    refuse(path, b"", "no readable parquet")
    write(path, MIXED, column="caption")
    assert "no column 'prompt'; there are: 'id', 'caption', 'note'" in message(path)
    assert "row 1: the prompt is int 0" in message(path, column="id")
    pq.write_table(pa.table({"prompt": ["a", None]}), path)
    assert "row 2: the prompt is nothing (null)" in message(path)
    pq.write_table(pa.table({"prompt": pa.array([b"a", b"b\xff"]).view(pa.string())}), path)
    assert "row 2: not UTF-8, byte 0xff at offset 1" in message(path)


def test_damaged_parquet(tmp_path):
    path = tmp_path / "p.parquet"
    whole = Path(write(path, MIXED * 100)).read_bytes()
    for share in (0.1, 0.5, 0.99):
        refuse(path, whole[: int(share * len(whole))], "no readable parquet")
    # The name of a column is not UTF-8.
    refuse(path, whole.replace(b"note", b"n\xe4te"), "no readable parquet")


def test_many_columns_are_not_all_listed(tmp_path):
    refuse(tmp_path / "p.jsonl", json.dumps({f"column {i}": "" for i in range(1000)}), "'column 19', ...")


def test_limit_below_one(tmp_path):
    assert "at least 1" in message(write(tmp_path / "p.txt", MIXED), limit=0)


def test_missing_files_are_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    for source in ("nope.txt", "owner/nope.CSV", "/nope", "./nope", "../nope", "~/nope", "data/nope", "a/b/c"):
        assert "no such file" in message(source)


@pytest.mark.parametrize("source", ["", "a red fox, oil paint", "https://host/p.txt", "nul\0.text", "x" * 5000 + " "])
def test_neither_file_nor_id(source):
    with pytest.raises(UserError, match="neither a file nor the id of a dataset") as caught:
        read_prompts(source)
    assert len(str(caught.value)) < 300


def test_other_things_than_files(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    assert "is a directory" in message(tmp_path / "folder.txt")
    (tmp_path / "p.tsv").write_text("a\tb")
    assert ".txt/.jsonl/.csv/.parquet" in message(tmp_path / "p.tsv")
    assert "no regular file" in message("/dev/null")


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_several_lines_and_of_no_text(tmp_path, kind):
    path = os.fsencode(tmp_path) + b"/caf\xe9\nx" + kind.encode()
    for content in (b"\xff\0", b"\n", b'{"prompt": 1}\n\xff'):
        with open(path, "wb") as file:
            file.write(content)
        with pytest.raises(UserError, match=r"^prompts: .*caf\\udce9\\nx") as caught:
            read_prompts(os.fsdecode(path))
        assert_one_line(str(caught.value))
        str(caught.value).encode()


def test_unreadable_file(tmp_path, monkeypatch):
    path = Path(write(tmp_path / "p.txt", MIXED))

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)  # chmod does not stop root
    assert "Permission denied" in message(path)


# Fingerprints


def test_a_fingerprint_follows_texts_and_order():
    texts = ["a cat", "zwei Käfer", "", "line\nbreak"]
    others = [
        texts[::-1],
        texts[:3],
        [*texts, ""],
        ["a cat\n", *texts[1:]],
        ["a cat", "zwei Käfer", "", "line", "break"],
    ]
    assert fingerprint(texts) == fingerprint(iter(texts))
    assert len(fingerprint(texts)) == 64
    assert len({fingerprint(each) for each in [texts, *others]}) == 6


# Captions of pictures as prompts


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder of two captioned pictures and one without, which need not be pictures for this."""
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for name, caption in {"b": "from a .txt", "sub/a": "from a .caption"}.items():
        (folder / f"{name}.png").write_bytes(b"not read")
        (folder / f"{name}{caption[-4:] if name == 'b' else '.caption'}").write_text(caption)
    return folder


def test_captions_of_a_folder_are_prompts(pictures):
    assert read_prompts(str(pictures)) == ["from a .txt", "from a .caption"]
    assert read_prompts(str(pictures), limit=1) == ["from a .txt"]
    (pictures / "z.png").write_bytes(b"")
    refusal = message(pictures)
    assert refusal.startswith("prompts: ")
    assert "z.png has no caption" in refusal


def test_captions_of_a_table_are_prompts_in_any_column(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a", "other": ["b", "c"]}')
    (tmp_path / "a.png").write_bytes(b"not read")
    assert read_prompts(str(tmp_path)) == ["a"]
    assert read_prompts(str(tmp_path), column="other") == ["b"]


def test_captions_of_tars_are_prompts(tmp_path):
    for number in range(3):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for name, content in {"0.png": b"not read", "0.txt": f"number {number}".encode()}.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    assert read_prompts(str(tmp_path / "1.tar")) == ["number 1"]
    assert read_prompts(str(tmp_path)) == ["number 0", "number 1", "number 2"]
    assert read_prompts(str(tmp_path / "{1..2}.tar")) == ["number 1", "number 2"]


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_of_a_list_the_first_is_used(tmp_path, kind):
    rows = [["a cat", "a feline"], ["two birds"]]
    path = tmp_path / f"p{kind}"
    if kind == ".parquet":
        pq.write_table(pa.table({"prompt": rows}), path)
    else:
        path.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    assert read_prompts(str(path)) == ["a cat", "two birds"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipe_is_not_waited_for(tmp_path, kind):
    os.mkfifo(tmp_path / f"p{kind}")
    assert "no regular file" in message(tmp_path / f"p{kind}")


# Hugging Face datasets


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder that `datasets` loads: splits train and test, of jsonl files."""
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", ["", *MIXED])
    write(folder / "test.jsonl", ["from the test split"])
    return folder


def test_dataset_folder(folder):
    assert read_prompts(str(folder)) == MIXED
    assert read_prompts(str(folder), limit=2) == MIXED[:2]
    assert read_prompts(f"{folder}:test") == ["from the test split"]


def test_dataset_refusals(folder, tmp_path):
    refusal = message(folder, column="caption")
    assert f"{folder}:train: no column 'caption'" in refusal
    assert "'prompt'" in refusal
    assert "row 1: the prompt is int 0" in message(folder, column="id")
    assert "nope" in message(f"{folder}:nope")
    (tmp_path / "nothing").mkdir()
    assert "cannot be read" in message(tmp_path / "nothing")


def test_hub_is_out_of_reach():
    refusal = message("nobody-here/nothing-there")
    assert "dataset nobody-here/nothing-there:train cannot be read" in refusal
    assert "offline: HF_HUB_OFFLINE is set" in refusal


def test_digits():
    domain = json.loads((ASSETS / "digits" / "domain.json").read_text())
    assert read_prompts("digits") == [
        domain["template"].format(digit=digit, ink=ink, background=background)
        for digit in domain["digits"]
        for ink in domain["inks"]
        for background in domain["backgrounds"]
    ]

"""Files of others: what is no regular file, too large, no UTF-8 or no JSON is one line."""

import os

import pytest
import torch
from safetensors.torch import save_file

from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.runtime.files import open_regular, read_json, read_text
from selfnpo_fast.runtime.limits import check_count
from selfnpo_fast.runtime.tensor_files import open_tensors


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to("file")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path, tmp_path / "none", "nul\0", "surrogate\ud800"):
        with pytest.raises(UserError, match=r"^prompts: "):
            open_regular(path, "prompts")
    with open_regular(tmp_path / "link", "prompts") as file:
        assert file.read() == b"text"


def test_text_is_bounded_and_utf8(tmp_path):
    (tmp_path / "text").write_bytes("é".encode())
    assert read_text(tmp_path / "text", "index", 2) == "é"
    with pytest.raises(UserError, match=r"^index: .* is larger than 1 bytes"):
        read_text(tmp_path / "text", "index", 1)
    (tmp_path / "latin").write_bytes(b"\xe9")
    with pytest.raises(UserError, match="not UTF-8"):
        read_text(tmp_path / "latin", "index")


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "", '{"a": 1e5,}', "9" * 5_000])
def test_invalid_json_is_one_line(tmp_path, text):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(UserError, match=r"^model.path: .*index.json is no valid JSON") as caught:
        read_json(tmp_path / "index.json", "model.path")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [0, 10**9, 2.0, True, "4", None])
def test_counts_have_bounds(value):
    check_count("log.every", 1)
    with pytest.raises(UserError, match=r"^log.every: .*expected an integer from 1 to 1,000,000"):
        check_count("log.every", value)


def test_the_shapes_of_tensors_are_those_that_safetensors_reads(tmp_path):
    tensors = {"a": torch.zeros(2, 3), "b.c": torch.zeros(()), "d": torch.zeros(0, 4, dtype=torch.float16)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = open_tensors(tmp_path / "x.safetensors", "field").shapes
    assert found == {name: tuple(value.shape) for name, value in tensors.items()}


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8, (2).to_bytes(8, "little") + b"[]", (9).to_bytes(8, "little") + b"{}"]
)
def test_what_is_no_safetensors_file_costs_a_line(tmp_path, content):
    (tmp_path / "x").write_bytes(content + b'{"a": 1}')
    with pytest.raises(UserError, match=r"^field: cannot load .*x: "):
        open_tensors(tmp_path / "x", "field")

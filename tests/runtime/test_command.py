"""What ends a command is one line and an exit code; a command's threads do not spin for long."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from selfnpo_fast import cli, train
from selfnpo_fast.commands import correlate, doctor, evaluate, merge, sample
from selfnpo_fast.runtime.command import run_command
from selfnpo_fast.runtime.errors import RunError, UserError
from selfnpo_fast.runtime.options import parse_options

ROOT = Path(__file__).parents[2]
COMMANDS = {"train": train, "doctor": doctor, "sample": sample, "evaluate": evaluate, "correlate": correlate,
            "merge": merge}  # fmt: skip


@pytest.fixture(autouse=True)
def no_libraries(monkeypatch) -> None:
    """No command imports the libraries, of which some print a line at their first import."""
    for module in (cli, train):
        monkeypatch.setattr(module, "quiet_libraries", lambda: None)


def failing(error: BaseException):
    def action():
        raise error.with_traceback(None)

    return action


@pytest.fixture
def traces(tmp_path, monkeypatch) -> Path:
    """The folder of temporary files."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("output: \x1b[31mred\nline"), 2, r"error: output: \x1b[31mred\nline"),
        (RunError("the disk is full"), 1, "error: the disk is full"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_was_foreseen_is_one_line_and_no_file(error, code, line, capsys, traces):
    assert run_command(failing(error)) == code
    assert capsys.readouterr() == ("", f"{line}\n")
    assert not list(traces.glob("selfnpo-*"))


MEMORY = {
    "host": MemoryError(),
    "GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nof 80 GiB"),
}


@pytest.mark.parametrize("error", MEMORY.values(), ids=MEMORY)
def test_full_memory_is_one_line_with_a_mend(error, capsys, traces):
    assert run_command(failing(error)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory at ")
    assert "use a smaller batch size" in line
    assert not list(traces.glob("selfnpo-*"))


def test_more_than_the_hosts_memory_is_the_same(capsys, traces):
    assert run_command(lambda: torch.empty(2**55, dtype=torch.uint8).numel()) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory at ")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", [KeyError, OSError])
def test_what_nobody_foresaw_names_its_place_and_a_file(command, kind, monkeypatch, capsys, traces):
    error = kind(28, "No space left on device", "x\n.png")
    monkeypatch.setattr(COMMANDS[command], "parse" if command == "train" else PARSERS[command], failing_in(error))
    assert cli.main([command]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    line = err.splitlines()[-1]  # a library may have printed a line at its first import
    assert "Traceback" not in err
    (file,) = traces.glob("selfnpo-*.traceback.txt")
    module = Path(COMMANDS[command].__file__).relative_to(ROOT)
    assert line.startswith(f"error: {type(error).__name__} at {module}:")
    assert line.endswith(f"; the traceback is in {file}")
    assert file.read_text().startswith("Traceback (most recent call last):\n")
    assert "in failing_parse" in file.read_text()


PARSERS = {name: "parse_with_config" if name == "doctor" else "parse_options" for name in COMMANDS}


def failing_in(error: Exception):
    def failing_parse(*args, **more):
        raise error.with_traceback(None)

    return failing_parse


def test_a_place_that_takes_no_file_gets_the_traceback_on_the_screen(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    assert run_command(failing(KeyError("beta_start"))) == 1
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "Traceback (most recent call last):"
    assert last.startswith("error: KeyError at ")
    assert "the traceback is above" in last


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_is_one_line_in_every_command(command, monkeypatch, capsys):
    monkeypatch.setattr(
        COMMANDS[command], "parse" if command == "train" else PARSERS[command], failing_in(KeyboardInterrupt())
    )
    assert cli.main([command]) == 130
    out, err = capsys.readouterr()
    assert (out, err.splitlines()[-1], "Traceback" in err) == ("", "interrupted", False)


def test_only_the_first_rank_prints_what_all_ranks_raise(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert train.main(["--updates", "0"]) == 2
    assert capsys.readouterr().err == ""
    assert run_command(failing(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "rank 1: interrupted\n"
    error = RunError("its own trouble")
    error.of_one_rank = True
    assert run_command(failing(error)) == 1
    assert capsys.readouterr().err == "rank 1: error: its own trouble\n"
    monkeypatch.setenv("RANK", "abc")
    assert run_command(failing(UserError("RANK: 'abc'"))) == 2
    assert capsys.readouterr().err == "error: RANK: 'abc'\n"


@pytest.mark.parametrize("value", ["a\0b", "a\udcffb"])
@pytest.mark.parametrize("name", ["prompt", "output", "negative"])
def test_text_that_no_file_can_hold_is_refused(name, value):
    with pytest.raises(UserError, match=f"^{name}: .* is not possible; expected text without NUL") as caught:
        parse_options(sample.SampleOptions, [f"--{name}", value], "selfnpo sample")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["# not a comment", "&anchor", "null", "~", "1e3", "[x]", "a: b", "yes"])
def test_a_word_of_the_command_line_stays_as_it_is(text):
    given = parse_options(sample.SampleOptions, ["--prompt", text, "--output", text], "selfnpo sample")
    assert (given.prompt, given.output) == (text, text)


# GNU's OpenMP says what it has read when it is loaded; here it is loaded where torch would be.
LIBRARY = next(Path(find_spec("torch").submodule_search_locations[0], "lib").glob("libgomp*"), None)
LOAD = f"import ctypes, sys; load = lambda *a: ('torch' in sys.modules) or ctypes.CDLL({str(LIBRARY)!r})"
IN_COMMAND = "import {0} as m; m.quiet_libraries = load; m.main({1})"
WAYS = {
    "selfnpo": IN_COMMAND.format("selfnpo_fast.cli", ["sample", "--colour", "red"]),
    "train": IN_COMMAND.format("selfnpo_fast.train", ["--updates", "0"]),
    "benchmarks": "import builtins; import_now = builtins.__import__; "
    "builtins.__import__ = lambda name, *a: load() if name == 'torch' else import_now(name, *a); "
    "import benchmarks.bench_ops",
    "library": "import selfnpo_fast, selfnpo_fast.config; load()",
}


@pytest.mark.skipif(LIBRARY is None, reason="this torch has no OpenMP of GNU")
@pytest.mark.parametrize(("way", "own", "expected"), [
    ("selfnpo", {}, "3000"),
    ("train", {}, "3000"),
    ("benchmarks", {}, "3000"),
    ("library", {}, None),
    ("train", {"GOMP_SPINCOUNT": "7"}, "7"),
    ("train", {"OMP_WAIT_POLICY": "passive"}, "0"),
])  # fmt: skip
def test_openmp_reads_a_short_spin_in_commands_alone(way, own, expected):
    environment = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment |= {"OMP_DISPLAY_ENV": "verbose"} | own
    command = [sys.executable, "-c", f"{LOAD}\n{WAYS[way]}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    (value,) = [line.split("'")[1] for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    assert value == expected if expected is not None else int(value) > 3000


@pytest.mark.parametrize(
    "path", [p for p in (ROOT / "benchmarks").rglob("*.py") if "__main__" in p.read_text()], ids=str
)
def test_every_benchmark_shortens_the_spin_before_it_imports_more(path):
    lines = [line.partition("  #")[0] for line in path.read_text().splitlines()]
    first = next(
        i
        for i, line in enumerate(lines)
        if re.match("(import|from) (numpy|torch|benchmarks|diffusers|selfnpo_fast.doctor)", line)
    )
    assert lines[:first].count("os.environ.update(short_spin())") == 1

"""Screens that fail cost no work, and what is printed holds nothing that a terminal obeys."""

from __future__ import annotations

import ast
import io
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from broken import broken_stream

from selfnpo_fast.runtime.console import logger, setup_logging
from selfnpo_fast.runtime.screen import Screen, printable, progress_bar, safe, safe_screen, show

ROOT = Path(__file__).parents[2]
BROKEN = ["no reader", "full disk", "closed"]


@pytest.mark.parametrize("kind", BROKEN)
def test_the_first_failure_switches_a_stream_off(kind):
    raw = broken_stream(kind)
    with pytest.raises((OSError, ValueError)):
        print("a line", file=raw)
    stream = Screen(broken_stream(kind))
    for _ in range(3):
        print("a line", file=stream, flush=True)
    stream.flush()
    if kind != "closed":
        stream.stream.close()  # what it held goes nowhere, without an error


@pytest.mark.parametrize("kind", BROKEN)
def test_a_bar_and_a_log_go_on_where_the_screen_fails(kind, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stderr", broken_stream(kind))
    setup_logging(0, tmp_path / "train.log")
    with progress_bar(3, "image") as bar:
        for _ in range(3):
            bar.update(1)
            bar.set_postfix_str("loss")
            logger.info("a line")
    assert bar.n == 3
    assert (tmp_path / "train.log").read_text().count("a line") == 3


def test_no_standard_error_is_no_obstacle(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert safe(None) is None
    with safe_screen(), progress_bar(2, "image") as bar:
        bar.update(2)


def test_characters_beyond_the_encoding_are_escaped():
    raw = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    stream = Screen(raw)
    print("caf\u00e9", file=stream, flush=True)
    assert raw.buffer.getvalue() == rb"caf\xe9" + b"\n"


@pytest.mark.parametrize(
    ("output", "code", "error"),
    [("no reader", 0, ""), ("full disk", 1, "error: standard output could not be written: [Errno 28] ")],
)
def test_a_closed_standard_output_ends_a_process_quietly(output, code, error):
    """`selfnpo --help | true`: no traceback, also none when the interpreter flushes at its end."""
    with broken_stream(output) as stream:
        done = subprocess.run(
            [sys.executable, "-m", "selfnpo_fast.cli", "--help"],
            stdout=stream, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
    assert done.returncode == code
    assert done.stderr.startswith(error)
    assert len(done.stderr.splitlines()) == bool(error)


def test_a_process_without_streams_ends_quietly():
    command = [sys.executable, "-m", "selfnpo_fast.cli", "--help"]
    assert subprocess.run(["sh", "-c", '"$@" >&- 2>&-', "sh", *command], cwd=ROOT).returncode == 0


FOREIGN = "Käse \u00a0猫 \u0645\u06cc\u200c 👩\u200d🚀"
HOSTILE = {
    "an escape sequence": ("cat\x1b[2J\x1b]0;title\x07", r"cat\x1b[2J\x1b]0;title\x07"),
    "a C1 control": ("cat\x9b2J", r"cat\x9b2J"),
    "a turned direction": ("cat\u202egnp.exe\u2066", r"cat\u202egnp.exe\u2066"),
    "a line break": ("cat\nerror: forged\r\u2028", r"cat\nerror: forged\r\u2028"),
    "half a character": ("cat\udcff\ud800", r"cat\udcff\ud800"),
    "an invisible tag": ("cat\U000e0041", r"cat\U000e0041"),
    "what is only foreign": (
        "Käse \u00a0猫 \u0645\u06cc\u200c 👩\u200d🚀",
        "Käse \u00a0猫 \u0645\u06cc\u200c 👩\u200d🚀",
    ),
}


@pytest.mark.parametrize(("name", "shown"), HOSTILE.values(), ids=HOSTILE)
def test_names_from_files_are_escaped_where_lines_are_printed(name, shown, capsys, tmp_path):
    assert printable(name) == shown
    setup_logging(0, tmp_path / "train.log")
    logger.warning("passing over %s", name)
    assert capsys.readouterr().err == f"passing over {shown}\n"
    (line,) = (tmp_path / "train.log").read_text().splitlines()
    assert line.endswith(f" WARNING passing over {shown}")
    logging.getLogger("selfnpo").handlers.clear()
    assert printable(f"a\n{name}", keep="\n") == f"a\n{shown}" or "\n" in name
    show(["a", 1])
    assert capsys.readouterr().out == "['a', 1]\n"


def test_all_bars_and_lines_are_made_in_one_place():
    """No other module calls tqdm or print: it would end where the screen fails."""
    allowed = {"screen.py", "command.py"}
    for path in (ROOT / "selfnpo_fast").rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        names = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
        assert path.name in allowed or not names & {"print", "tqdm", "trange"}, path

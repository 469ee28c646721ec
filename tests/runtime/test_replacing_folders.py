"""Folders that replace others: killed at any system call, there is always a whole one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from selfnpo_fast.runtime import folders

KILLED = 77
_EVENTS = ("open", "os.", "shutil.")  # audit events of calls that touch files


def replace(target: Path) -> None:
    aside = folders.begin_aside(target)
    for name in "abc":
        (aside / name).write_text("new")
    folders.finish_aside(aside, target)


def killed_at(call: int, target: Path) -> bool:
    """Replace `target` in a process that dies at its `call`-th system call; whether it came so far."""
    child = os.fork()
    if not child:
        calls = iter(range(call))

        def hook(event: str, _arguments: tuple) -> None:
            if event.startswith(_EVENTS) and next(calls, None) is None:
                os._exit(KILLED)

        sys.addaudithook(hook)  # of the child alone
        replace(target)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED


def contents(folder: Path) -> set[str]:
    return {path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("offered", [True, False])
def test_a_whole_folder_is_there_wherever_the_process_is_killed(offered, tmp_path, monkeypatch):
    if not offered:
        monkeypatch.setattr(folders, "exchange", lambda one, other: False)
    seen, call = [], 0
    while True:
        parent = tmp_path / str(call)
        target = parent / "negative"
        target.mkdir(parents=True)
        for name in "abc":
            (target / name).write_text("old")
        if not killed_at(call, target):
            break
        if not offered:  # what the next run does before it writes there
            seen.append(target.exists())
            folders.put_back(parent)
        assert sorted(path.name for path in target.iterdir()) == ["a", "b", "c"], call
        assert contents(target) in ({"old"}, {"new"}), call
        seen.append(contents(target))
        replace(target)
        assert contents(target) == {"new"}
        assert [path.name for path in parent.iterdir()] == ["negative"], "leftovers are gone"
        call += 1
    assert {"old"} in seen
    assert {"new"} in seen
    assert (False in seen) == (not offered), "two renames do leave a hole, which the test reaches"


def test_what_cannot_be_renamed_is_put_back_at_once(tmp_path, monkeypatch):
    target, calls = tmp_path / "negative", []
    replace(target)
    (target / "a").write_text("old")
    monkeypatch.setattr(folders, "exchange", lambda one, other: False)
    rename = Path.rename

    def fails_once(self, other):
        calls.append(other)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", fails_once)
    with pytest.raises(OSError, match="No space"):
        replace(target)
    assert (target / "a").read_text() == "old"


def test_a_manifest_lists_what_has_to_be_there(tmp_path):
    (tmp_path / "a").write_text("a")
    with pytest.raises(FileNotFoundError):
        folders.write_manifest(tmp_path, ["a", "b"])
    folders.write_manifest(tmp_path, ["a"])
    assert folders.why_not_whole(tmp_path) is None


NO_MANIFESTS = [b"[" * 200_000, b"\xff\xfe{}", b"[]", b"3", b'{"a": 3}', b'{"\\u0000": {"bytes": 1}}']


@pytest.mark.parametrize("content", NO_MANIFESTS)
def test_a_manifest_that_is_none_is_a_reason(content, tmp_path):
    (tmp_path / folders.MANIFEST).write_bytes(content)
    reason = folders.why_not_whole(tmp_path)
    assert reason
    assert len(reason) < 600
    assert "\n" not in reason


def test_a_pipe_in_place_of_a_manifest_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / folders.MANIFEST)
    assert "no regular file" in folders.why_not_whole(tmp_path)

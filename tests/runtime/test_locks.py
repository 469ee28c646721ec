"""Two writers of one folder: one goes on, the other is told who holds the folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from selfnpo_fast.runtime import console, folders, locks
from selfnpo_fast.runtime.errors import RunError, UserError
from selfnpo_fast.runtime.folders import begin_aside, check_run_folder, clear_run_folder, finish_aside, remove_leftovers
from selfnpo_fast.runtime.locks import LOCK, hold, holder, only_writer

WRITER = """
import sys
from pathlib import Path
from selfnpo_fast.runtime.errors import RunError, UserError
from selfnpo_fast.runtime.locks import only_writer
try:
    with only_writer(Path(sys.argv[1])):
        print("alone", flush=True)
        sys.stdin.read()
except UserError as error:
    print(error, flush=True)
"""


def start_writer(folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught, only_writer(folder):
        pass
    return str(caught.value)


def test_of_many_writers_at_once_one_goes_on(tmp_path):
    folder = tmp_path / "new" / "run"
    writers = [start_writer(folder) for _ in range(6)]
    said = [writer.stdout.readline().strip() for writer in writers]
    assert said.count("alone") == 1
    winner = writers[said.index("alone")]
    told = f"output: {folder} is being written by process {winner.pid} on {socket.gethostname()} since "
    assert all(line == "alone" or line.startswith(told) for line in said), said
    for writer in writers:
        writer.communicate()
    assert not (tmp_path / "new").exists(), "nothing was written, and nothing is left"


def test_who_is_refused_leaves_its_folders_to_the_holder(tmp_path, monkeypatch):
    """It has made them, and the other has taken the lock first."""
    folder, real = tmp_path / "new" / "run", locks.hold
    with contextlib.ExitStack() as holder:

        def late(path: Path):
            path.parent.mkdir(parents=True)
            monkeypatch.setattr(locks, "hold", real)
            holder.enter_context(only_writer(folder))
            return real(path)

        monkeypatch.setattr(locks, "hold", late)
        with pytest.raises(UserError, match="is being written by"), only_writer(folder):
            pass
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_killed_writer_is_free_and_its_line_is_replaced(tmp_path):
    writer = start_writer(tmp_path)
    assert writer.stdout.readline() == "alone\n"
    assert f"process {writer.pid} on" in refusal(tmp_path)
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert f"process {writer.pid} on" in (tmp_path / LOCK).read_text(), "nobody has removed it"
    with only_writer(tmp_path) as alone:
        assert alone
        assert holder(tmp_path / LOCK).startswith(f"process {os.getpid()} on ")
    assert list(tmp_path.iterdir()) == []


def test_only_folders_that_stay_empty_are_removed(tmp_path):
    (tmp_path / "there").mkdir()
    with only_writer(tmp_path / "there"):
        pass
    with only_writer(tmp_path / "a" / "b"):
        (tmp_path / "a" / "kept").touch()
    with pytest.raises(KeyError), only_writer(tmp_path / "c"):
        (tmp_path / "c" / "kept").touch()
        raise KeyError
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {"there", "a", "a/kept", "c", "c/kept"}


def test_a_lock_file_that_vanishes_while_it_is_opened_is_made_again(tmp_path, monkeypatch):
    """The writer before has removed its file between our opening and our locking of it."""
    path, flock = tmp_path / LOCK, fcntl.flock

    def late(descriptor, operation):
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    lock = hold(path)
    assert os.path.samestat(os.fstat(lock.descriptor), path.stat())
    assert hold(path) is None
    lock.release()


def test_a_lock_that_somebody_has_replaced_stays(tmp_path):
    path = tmp_path / LOCK
    lock = hold(path)
    path.unlink()
    path.write_text("of somebody else")
    lock.release()
    assert path.read_text() == "of somebody else"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_once(number, tmp_path, monkeypatch, capsys):
    def unsupported(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    console.setup_logging(0)
    for _ in range(2):
        with only_writer(tmp_path) as first, only_writer(tmp_path) as second:
            assert (first, second) == (False, False)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path}: this file system has no locks ")
    assert line.endswith("two runs are not kept apart")


def test_a_folder_that_cannot_be_locked_names_the_field(tmp_path):
    (tmp_path / LOCK).mkdir()
    assert refusal(tmp_path).startswith("output: [Errno 21] Is a directory: ")
    assert refusal(tmp_path).endswith("; name another folder")


def test_a_lock_file_that_leads_elsewhere_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "mine")
    assert "Too many levels of symbolic links" in refusal(tmp_path / "run")
    assert (tmp_path / "mine").read_text() == "precious"


def test_what_a_holder_has_written_cannot_forge_lines(tmp_path):
    lock = hold(tmp_path / LOCK)
    (tmp_path / LOCK).write_bytes(b"\xff process\n\nerror: forged " + b"x" * 10_000)
    assert len(refusal(tmp_path)) < 600
    assert "\n" not in refusal(tmp_path)
    lock.release()


# Hidden files, and folders aside.


def test_hidden_files_neither_fill_a_run_folder_nor_are_deleted(tmp_path):
    for name in (".DS_Store", ".nfs0001", LOCK):
        (tmp_path / name).touch()
    assert check_run_folder(str(tmp_path), resume=False, overwrite=False) == tmp_path
    for name in ("metrics.jsonl", ".writing-config.yaml.host-1"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="is not empty"):
        check_run_folder(str(tmp_path), resume=False, overwrite=False)
    assert check_run_folder(str(tmp_path), resume=False, overwrite=True) == tmp_path
    clear_run_folder(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".DS_Store", ".nfs0001", LOCK}


def test_what_a_living_process_writes_is_never_removed(tmp_path):
    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (own,) = [begin_aside(tmp_path / "own")]
    host = own.name.removeprefix(".writing-own.").rpartition("-")[0]
    entries = {
        "living": f".writing-update-0000002.{host}-{living.pid}",
        "living, deleting": f".deleting-update-0000001.{host}-{living.pid}",
        "dead": f".writing-update-0000003.{host}-{dead.pid}",
        "dead, deleting": f".deleting-update-0000003.{host}-{dead.pid}",
        "another host": f".writing-update-0000004.another-{dead.pid}",
        "before processes had names": ".writing-update-0000005",
    }
    for name in entries.values():
        (tmp_path / name).mkdir()
    kept = {entries[key] for key in ("living", "living, deleting", "another host")}
    finish_aside(begin_aside(tmp_path / "update-0000006"), tmp_path / "update-0000006")
    assert {path.name for path in tmp_path.iterdir()} == {*kept, own.name, "update-0000006"}
    remove_leftovers(tmp_path, locked=True)
    assert {path.name for path in tmp_path.iterdir()} == {"update-0000006"}
    living.communicate(b"\n")


def test_an_attempt_that_failed_is_begun_again(tmp_path, monkeypatch):
    target = tmp_path / "update-0000001"
    first = begin_aside(target)
    (first / "half").touch()
    monkeypatch.setattr(folders.shutil, "rmtree", lambda path: None)  # a deletion that stops
    (target).mkdir()
    folders.remove(target)
    monkeypatch.undo()
    second = begin_aside(target)
    assert list(second.iterdir()) == []
    target.mkdir()
    finish_aside(second, target)
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_file_is_there_as_a_whole_or_not_at_all(error, tmp_path):
    path = tmp_path / "picture.png"
    for text in ("first", "second"):
        with folders.whole_file(path) as aside:
            aside.write_text(text)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text
    with pytest.raises(type(error)), folders.whole_file(path) as aside:
        aside.write_text("half")
        raise error
    with pytest.raises(FileNotFoundError), folders.whole_file(path):
        pass  # nothing was written
    assert [entry.name for entry in tmp_path.iterdir()] == ["picture.png"]
    assert path.read_text() == "second"
    with pytest.raises(RunError, match=r"could not be written: \[Errno 28\]"), folders.writing(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")

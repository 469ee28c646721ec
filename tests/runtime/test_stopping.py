"""Requests to stop, in real processes: which signals are one request, and which one kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from selfnpo_fast.runtime import stopping
from selfnpo_fast.runtime.stopping import Stopped, check_stop

ROOT = Path(__file__).parents[2]

RUN = """
import hashlib, os, sys, time
from selfnpo_fast.runtime import stopping
from selfnpo_fast.runtime.console import setup_logging

class World:  # one rank
    is_main = True
    def any(self, flag): return flag
    def gather(self, value): return [value]

setup_logging(0)
stopping.STUCK = 0.1

def announce(text):
    print(text, flush=True)

def work(seconds=0.0):
    "Work until the request is there, and for some time after it."
    with stopping.StopRequest(World()) as stop:
        announce("ready")
        try:
            while True:
                stopping.check_stop("between rounds")
                time.sleep(0.005)
        except stopping.Stopped as stopped:
            time.sleep(seconds)
            announce(stopped)

def compute():
    "The main thread computes in a library for some time, which no signal interrupts, and looks then."
    with stopping.StopRequest(World()):
        announce("ready")
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**6)
        try:
            stopping.check_stop("between rounds")
        except stopping.Stopped as stopped:
            announce(stopped)

def stuck():
    "The main thread waits in a library, which no signal interrupts."
    import ctypes, threading
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    def ready():
        while ctypes.c_int.from_buffer(mutex).value != 2:  # as glibc marks a mutex that is waited for
            time.sleep(0.001)
        announce("ready")
    with stopping.StopRequest(World()):
        threading.Thread(target=ready, daemon=True).start()
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)
"""


def start(code: str, *, ignored: int | None = None, **environment: str) -> subprocess.Popen:
    """A process that runs `code` after RUN, once it is ready."""
    plain = {name: value for name, value in os.environ.items() if name not in stopping.LAUNCHERS}

    def prepare() -> None:
        # A process ignores what its parent ignored, as a shell's background jobs and nohup do.
        for number in stopping.SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        if ignored is not None:
            signal.signal(ignored, signal.SIG_IGN)

    process = subprocess.Popen(
        [sys.executable, "-c", RUN + code],
        cwd=ROOT,
        env=plain | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
    )
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


def said(process: subprocess.Popen) -> str:
    """The next line of its log."""
    return process.stderr.readline()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_each_of_the_signals_is_a_request_and_said_at_once(name):
    process = start("work(0.1)")
    process.send_signal(getattr(signal, name))
    assert said(process) == f"{name}: the run saves and stops; a later Ctrl-C ends it without a checkpoint\n"
    out, log = process.communicate()
    assert (out, log, process.returncode) == (f"{name}: stopped between rounds\n", "", 0)


@pytest.mark.parametrize(
    "signals",
    [("SIGINT", "SIGINT"), ("SIGINT", "SIGTERM", "SIGTERM"), ("SIGTERM", "SIGINT"), ("SIGHUP", "SIGTERM", "SIGUSR1")],
)
def test_what_a_launcher_sends_on_is_the_same_request(signals):
    """DeepSpeed's launcher gets the Ctrl-C of the terminal too, and then sends SIGTERM to its ranks."""
    process = start("work(0.3)")
    process.send_signal(getattr(signal, signals[0]))
    assert said(process).startswith(signals[0])
    for name in signals[1:]:
        process.send_signal(getattr(signal, name))
    out, log = process.communicate()
    assert (out, log, process.returncode) == (f"{signals[0]}: stopped between rounds\n", "", 0)


def test_the_first_signal_is_the_one_that_came_first():
    """Python runs the handlers of signals that wait by their numbers: SIGINT (2) before SIGTERM (15)."""
    process = start("compute()")
    process.send_signal(signal.SIGTERM)
    assert said(process).startswith("SIGTERM")
    process.send_signal(signal.SIGINT)
    out, log = process.communicate()
    assert (out, log, process.returncode) == ("SIGTERM: stopped between rounds\n", "", 0)


@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM"])
def test_a_later_ctrl_c_kills_and_a_later_sigterm_does_not(first):
    process = start("stopping.FORWARDED = 0\ntry:\n    work(60)\nexcept KeyboardInterrupt:\n    sys.exit('killed')")
    process.send_signal(getattr(signal, first))
    assert said(process).startswith(first)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, log = process.communicate()
    assert (out, log, process.returncode) == ("", "killed\n", 1)


def test_a_later_ctrl_c_kills_a_main_thread_that_waits_in_a_library():
    process = start("stopping.FORWARDED = 0\nstuck()")
    process.send_signal(signal.SIGINT)
    assert said(process).startswith("SIGINT"), "said though the main thread runs no Python"
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    _, log = process.communicate()
    assert (log, process.returncode) == ("error: interrupted, without a checkpoint\n", 130)


def test_a_signal_that_nohup_ignores_stays_ignored():
    process = start("work()", ignored=signal.SIGHUP)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate()
    assert out == "SIGTERM: stopped between rounds\n"


LAUNCHER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(child.pid, flush=True)
time.sleep(600)
"""


def start_launched(**environment: str) -> tuple[subprocess.Popen, int]:
    """A process that has started `work()` as its child, and the child's id."""
    plain = {name: value for name, value in os.environ.items() if name not in stopping.LAUNCHERS}
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, RUN + "work()"],
        cwd=ROOT,
        env=plain | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    pid = int(launcher.stdout.readline())
    assert launcher.stdout.readline() == "ready\n", launcher.stderr.read()
    return launcher, pid


@pytest.mark.parametrize("variable", ["CROSS_RANK", "TORCHELASTIC_RUN_ID"])
def test_a_rank_whose_launcher_is_killed_stops(variable):
    launcher, _ = start_launched(**{variable: "0"})
    launcher.kill()
    out, log = launcher.communicate()  # ends when the child has closed its output, too
    assert out == "the launcher is gone: stopped between rounds\n"
    assert log.startswith("the launcher is gone: the run saves and stops")


def test_an_orphan_that_no_launcher_has_started_goes_on():
    """As after `selfnpo train &` in a shell that ends."""
    launcher, child = start_launched()
    launcher.kill()
    launcher.wait()
    time.sleep(3 * stopping.LOOK)
    os.kill(child, signal.SIGTERM)
    assert launcher.communicate()[0] == "SIGTERM: stopped between rounds\n"


def test_outside_of_a_run_nothing_is_watched():
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    check_stop("between rounds")
    assert not stopping.asked_to_stop()
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before


class TwoRanks:
    """A world whose other rank, rank 1, was asked to stop."""

    is_main = True

    def any(self, flag: bool) -> bool:
        return True

    def gather(self, value):
        return [value, "SIGUSR1"]


def test_the_request_of_another_rank_stops_this_one():
    with stopping.StopRequest(TwoRanks()), pytest.raises(Stopped, match="SIGUSR1: stopped between rounds"):
        check_stop("between rounds")

"""A request to stop a run: by a signal, or by the death of the launcher that started its rank.

A run looks at the request where it can end without loss: between two updates, and between rounds of
encoding images and prompts and of filling slots.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING

from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.errors import RunError

if TYPE_CHECKING:
    from selfnpo_fast.runtime.world import World

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
FORWARDED = 1.0
"""Seconds after the first signal in which a SIGINT is the same request: a launcher passes it on."""
STUCK = 5.0
"""Seconds that the main thread has to notice that it is killed, where it waits in a library."""
LOOK = 0.5
"""Seconds between two looks at the launcher."""
LAUNCHERS = ("CROSS_RANK", "TORCHELASTIC_RUN_ID")
"""Variables that DeepSpeed's launcher and torchrun set: the parent of such a rank is its launcher.

The parent of any other process may end as it likes: a shell, nohup, tmux.
"""
LAUNCHER_GONE = "the launcher is gone"
"""The request's name where the launcher has died."""

_parent = 0
_current: StopRequest | None = None


def remember_parent() -> None:
    """Take the present parent of this process as its launcher.

    The import of this module calls it: a launcher may die while the libraries are imported.
    """
    global _parent
    _parent = os.getppid()


remember_parent()


class Stopped(RunError):
    """A run that has ended because it was asked to: one line, and success."""


class StopRequest:
    """Turns signals into a request, while it is entered; only one at a time is.

    The first SIGINT, SIGTERM, SIGHUP or SIGUSR1 is the request, and so is the death of the
    launcher. One line says so at once, on each host. Later ones are the same request, except for a
    SIGINT more than FORWARDED seconds after the first: that acts as it would without this class. A
    signal that was ignored before, as SIGHUP is under nohup, stays ignored.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.signal: str | None = None
        """The name of the first signal, or LAUNCHER_GONE; None before a request."""
        self._handlers: dict[int, object] = {}
        """The handlers that this class has replaced, by signal."""
        self._since: float | None = None
        self._killed, self._noticed = False, threading.Event()
        self._launched = any(name in os.environ for name in LAUNCHERS)

    def __enter__(self) -> StopRequest:
        global _current
        if threading.current_thread() is not threading.main_thread():
            return self  # Python hands signals to the main thread alone
        _current = self
        for number in SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._handlers[number] = signal.signal(number, self._on_signal)
        # Python writes the number of each signal to this socket at once, also while the main thread
        # computes or waits in a library.
        self._written, self._read = socket.socketpair()
        self._written.setblocking(False)
        self._read.settimeout(LOOK)
        self._wakeup = signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="stop-request", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        global _current
        if _current is not self:
            return
        _current = None
        self._restore()
        signal.set_wakeup_fd(self._wakeup)
        self._noticed.set()
        self._written.close()  # ends the thread
        self._thread.join()
        self._read.close()

    def _restore(self) -> None:
        """Put the replaced handlers back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _on_signal(self, number: int, _frame) -> None:
        """The handler, in the main thread. It only notes: what it interrupts may hold any lock."""
        if self._killed:
            self._noticed.set()
            self._restore()
            signal.raise_signal(signal.SIGINT)
        elif self.signal is None:
            self.signal = signal.Signals(number).name

    def _listen(self) -> None:
        """The thread: says the request, and tells a request that comes twice from a kill."""
        while True:
            try:
                numbers = self._read.recv(64)
                if not numbers:
                    return
            except TimeoutError:
                numbers = b""
            for number in numbers:
                if number in SIGNALS and self._is_kill(number):
                    self._kill()
                    return
            if self._launched and self._since is None and os.getppid() != _parent:
                self._first(self.signal or LAUNCHER_GONE)

    def _is_kill(self, number: int) -> bool:
        """Notes a signal that has just come; whether it is a kill."""
        if self._since is None:
            self._first(signal.Signals(number).name)
            return False
        return number == signal.SIGINT and time.monotonic() - self._since > FORWARDED

    def _first(self, name: str) -> None:
        """Note and say the request, once on each host."""
        # Python runs the handlers of signals that wait by their numbers; this thread reads the
        # signals as they came.
        self.signal = name
        self._since = time.monotonic()
        if os.environ.get("LOCAL_RANK", "0") == "0":
            level = "warning" if self.world.is_main else "error"  # other ranks log errors alone
            getattr(logger, level)("%s: the run saves and stops; a later Ctrl-C ends it without a checkpoint", name)

    def _kill(self) -> None:
        """Let SIGINT act as it would without this class."""
        self._killed = True
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # also wakes it from a wait
        if not self._noticed.wait(STUCK):
            logger.error("error: interrupted, without a checkpoint")
            os._exit(130)

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; all ranks call this together."""
        if not self.world.any(self.signal is not None):
            return False
        own, name = self.signal, next(name for name in self.world.gather(self.signal) if name)
        self.signal = name
        if own is None and self._since is None:  # only other ranks were asked, and each host says so
            self._first(name)
        return True


def check_stop(doing: str) -> None:
    """Raise Stopped on all ranks where any rank was asked to stop.

    All ranks call this at the same places, in their main thread. Elsewhere it does nothing: in
    other threads, and where no run has entered a StopRequest.

    `doing` says what stops, and what becomes of it.
    """
    if _is_watched() and _current.agreed():
        raise Stopped(f"{_current.signal}: stopped {doing}")


def asked_to_stop() -> bool:
    """Whether this rank was asked to stop, for work that it does without the others."""
    return _is_watched() and _current.signal is not None


def _is_watched() -> bool:
    return _current is not None and threading.current_thread() is threading.main_thread()

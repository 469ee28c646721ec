"""What may end a run from outside: a request to stop, and the loss of another rank."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import threading
from collections.abc import Callable

from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.errors import RunError, one_line
from selfnpo_fast.runtime.world import World

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PATIENCE = 45.0
"""Seconds: longer than a host's loss takes to be noticed, and within a minute."""
GRACE = 10.0
GONE = "its process or its host is gone"


class StopRequest:
    """Turns the first SIGTERM or Ctrl-C into a request that the training loop honours after its update.

    The second one acts as it would without us.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, _frame) -> None:
        self.signal = signal.Signals(number).name
        self._restore()


class PeerWatch:
    """A thread that ends this process when another rank is gone, with a line that says which.

    A collective with a dead peer hangs (NCCL) or fails without a name (gloo). Every rank keeps a connection to rank 0
    open, on which nothing is sent while all is well: the kernel closes it with the process that held it, and probes a
    silent host every few seconds. A rank that leaves with an error of its own says so first. Rank 0 tells the others.
    """

    def __init__(self, world: World, on_loss: Callable[[str], None]) -> None:
        self.world, self.on_loss = world, on_loss
        self._selector = selectors.DefaultSelector()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peer-watch", daemon=True)

    def __enter__(self) -> PeerWatch:
        if self.world.size > 1:
            self._connect()
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _) -> None:
        if self.world.size == 1:
            return
        together = kind is None or issubclass(kind, RunError)  # all ranks are leaving, then
        if not together and issubclass(kind, RuntimeError):
            self._thread.join(PATIENCE)  # a collective failed: the thread is about to learn which rank is to blame
        self._stopped.set()
        self._thread.join()
        if together:
            self.world.barrier()  # nobody closes a connection that another still watches
        else:
            self._tell(self.world.rank, f"it has left: {one_line(error)}")
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()
        self._selector.close()

    def _connect(self) -> None:
        """Rank 0 listens, the others connect and say who they are."""
        address = os.environ["MASTER_ADDR"]
        if self.world.is_main:
            family = socket.getaddrinfo(address, None)[0][0]
            with socket.create_server(("", 0), family=family, backlog=self.world.size) as server:
                self.world.gather(server.getsockname()[1])
                for _ in range(self.world.size - 1):
                    connection, _ = server.accept()
                    rank = int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big")
                    self._add(connection, rank)
        else:
            connection = socket.create_connection((address, self.world.gather(None)[0]), timeout=PATIENCE)
            connection.sendall(self.world.rank.to_bytes(4, "big"))
            self._add(connection, 0)
        self.world.barrier()

    def _add(self, connection: socket.socket, rank: int) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # After 10 s of silence the kernel asks every 5 s; a host that is gone is noticed after 30 s.
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        connection.setblocking(False)
        self._selector.register(connection, selectors.EVENT_READ, rank)

    def _run(self) -> None:
        while not self._stopped.is_set():
            for key, _ in self._selector.select(timeout=0.2):
                lost, reason = self._read(key)
                # Where one rank finds an error in the user's input, this one is about to find it, too.
                if not self._stopped.wait(0 if reason == GONE else GRACE):
                    self._tell(lost, reason)
                    self.on_loss(f"rank {lost} is lost: {reason}")
                return

    def _read(self, key: selectors.SelectorKey) -> tuple[int, str]:
        """The lost rank and why: as told, or the other end of a connection that closed."""
        try:
            told = key.fileobj.recv(4096).decode(errors="replace")
        except OSError:
            told = ""
        rank, _, reason = told.partition(" ")
        return (int(rank), reason) if rank.isdigit() else (key.data, GONE)

    def _tell(self, lost: int, reason: str) -> None:
        for key in self._selector.get_map().values():
            if key.data != lost:
                with contextlib.suppress(OSError):
                    key.fileobj.send(f"{lost} {reason}".encode()[:4096])


def leave_at_once(message: str) -> None:
    """The end of a rank whose peer is gone: its main thread may hang in a collective, so nothing is unwound."""
    logger.error("error: %s", message)
    os._exit(1)

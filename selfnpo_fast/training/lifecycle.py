"""The loss of another rank, which ends a run from outside (`runtime.stopping`: requests to stop)."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
from collections.abc import Callable

from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.errors import RunError, one_line
from selfnpo_fast.runtime.world import World

PATIENCE = 45.0
"""Seconds: longer than it takes to notice that a host is lost, and less than a minute."""
GRACE = 10.0
"""Seconds in which a rank may find by itself the error that another rank has left with."""
GONE = "its process or its host is gone"
"""The reason where a connection closed without a word."""


class PeerWatch:
    """A thread that ends this process when another rank is gone, with a line that names that rank.

    A collective with a dead peer hangs (NCCL), or fails without naming the peer (gloo).

    Every rank keeps a connection to rank 0, on which nothing is sent while all is well. The kernel
    closes the connection together with the process that held it, and probes a silent host every
    few seconds. A rank that leaves with an error sends the error first. Rank 0 passes the news on
    to the other ranks.
    """

    def __init__(self, world: World, on_loss: Callable[[str], None]) -> None:
        """`on_loss` is called in the thread, with a message that names the rank and the reason."""
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
        # A run ends, or a RunError is raised, on all ranks together.
        together = kind is None or issubclass(kind, RunError)
        # A collective has failed: the thread is about to learn which rank is to blame, and ends the
        # process then.
        if not together and issubclass(kind, RuntimeError):
            self._thread.join(PATIENCE)
        # Stop watching.
        self._stopped.set()
        self._thread.join()
        # No rank closes a connection that another still watches; a rank that leaves without the
        # others sends them its error.
        if together:
            self.world.barrier()
        else:
            self._tell(self.world.rank, f"it has left: {one_line(error)}")
        # Close all connections.
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()
        self._selector.close()

    def _connect(self) -> None:
        """Connect every rank with rank 0; each sends the number of its rank."""
        address = os.environ["MASTER_ADDR"]
        if self.world.is_main:
            # Listen on a free port, which all ranks learn through the process group.
            family = socket.getaddrinfo(address, None)[0][0]
            with socket.create_server(("", 0), family=family, backlog=self.world.size) as server:
                self.world.gather(server.getsockname()[1])
                for _ in range(self.world.size - 1):
                    connection, _ = server.accept()
                    rank = int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big")
                    self._add(connection, rank)
        else:
            # Connect to that port.
            connection = socket.create_connection((address, self.world.gather(None)[0]), timeout=PATIENCE)
            connection.sendall(self.world.rank.to_bytes(4, "big"))
            self._add(connection, 0)
        self.world.barrier()

    def _add(self, connection: socket.socket, rank: int) -> None:
        """Watch the connection to a rank."""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # After 10 s of silence the kernel probes every 5 s; a lost host is noticed after 30 s.
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        connection.setblocking(False)
        self._selector.register(connection, selectors.EVENT_READ, rank)

    def _run(self) -> None:
        """The thread: wait for the first news, pass them on, and call `on_loss`."""
        while not self._stopped.is_set():
            for key, _ in self._selector.select(timeout=0.2):
                lost, reason = self._read(key)
                # Where another rank finds an error in the user's input, this rank is about to find
                # the same error, and stops the thread.
                if not self._stopped.wait(0 if reason == GONE else GRACE):
                    self._tell(lost, reason)
                    self.on_loss(f"rank {lost} is lost: {reason}")
                return

    def _read(self, key: selectors.SelectorKey) -> tuple[int, str]:
        """The lost rank and the reason.

        A message names both. A connection that closed without one has lost the rank at its end.
        """
        try:
            message = key.fileobj.recv(4096).decode(errors="replace")
        except OSError:
            message = ""
        rank, _, reason = message.partition(" ")
        return (int(rank), reason) if rank.isdigit() else (key.data, GONE)

    def _tell(self, lost: int, reason: str) -> None:
        """Send the loss of a rank over all connections but that to the rank itself."""
        for key in self._selector.get_map().values():
            if key.data != lost:
                with contextlib.suppress(OSError):
                    key.fileobj.send(f"{lost} {reason}".encode()[:4096])


def leave_at_once(message: str) -> None:
    """End the process of a rank whose peer is gone.

    Nothing is unwound: the main thread may hang in a collective.
    """
    logger.error("error: %s", message)
    os._exit(1)

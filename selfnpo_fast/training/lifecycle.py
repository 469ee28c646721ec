"""The loss of another rank, which ends a run from outside (`runtime.stopping`: requests to stop)."""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable

from selfnpo_fast.runtime.console import logger, say_once
from selfnpo_fast.runtime.errors import RunError, one_line
from selfnpo_fast.runtime.world import World

PATIENCE = 45.0
"""Seconds: longer than it takes to notice that a host is lost, and less than a minute."""
GRACE = 10.0
"""Seconds in which a rank may find by itself the error that another rank has left with."""
SECRET = 32
"""Bytes of the secret by which ranks know each other."""
GREETING = SECRET + 4
"""Bytes that a rank sends first: the secret and its number."""
MOST_STRANGERS = 64
"""Connections beyond those of the ranks that may wait at once to prove that they are ranks."""
LONGEST = 4096
"""Bytes of a message."""
GONE = "its process or its host is gone"
"""The reason where a connection closed without a word."""


class PeerWatch:
    """A thread that ends this process when another rank is gone, with a line that names that rank.

    A collective with a dead peer hangs (NCCL), or fails without naming the peer (gloo).

    Every rank keeps a connection to rank 0, on which nothing is sent while all is well. The kernel
    closes the connection together with the process that held it, and probes a silent host every
    few seconds. A rank that leaves with an error sends the error first. Rank 0 passes the news on
    to the other ranks. It listens only until all are connected, at the address at which the ranks
    have met, and takes no connection that does not know a secret of the process group.
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
        """Connect every rank with rank 0. Raises RunError on all ranks where that fails."""
        address = os.environ["MASTER_ADDR"]
        hosts = set(self.world.gather(socket.gethostname()))
        with contextlib.ExitStack() as until_connected:
            servers = []

            def listen() -> tuple[int, bytes]:
                """The port and the secret."""
                servers.append(until_connected.enter_context(_listen(address, self.world.size, len(hosts) == 1)))
                return servers[0].getsockname()[1], secrets.token_bytes(SECRET)

            # All ranks learn them through the process group.
            port, secret = self.world.on_main(listen)

            def connect() -> None:
                """Rank 0 takes the others' connections; they connect to it."""
                if self.world.is_main:
                    for rank, connection in _accept(servers[0], secret, self.world.size).items():
                        self._add(connection, rank)
                else:
                    self._add(_greet(address, port, secret, self.world.rank), 0)

            self.world.together(connect)

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
            message = key.fileobj.recv(LONGEST).decode(errors="replace")
        except OSError:
            message = ""
        rank, _, reason = message.partition(" ")
        if rank.isascii() and rank.isdigit() and len(rank) < 10 and int(rank) < self.world.size:
            return int(rank), _visible(reason)
        return key.data, GONE

    def _tell(self, lost: int, reason: str) -> None:
        """Send the loss of a rank over all connections but that to the rank itself."""
        for key in self._selector.get_map().values():
            if key.data != lost:
                with contextlib.suppress(OSError):
                    key.fileobj.send(f"{lost} {reason}".encode()[:LONGEST])


def _listen(address: str, ranks: int, one_host: bool) -> socket.socket:
    """A socket that listens on a free port, at the address at which the ranks have met.

    Other hosts may know this host by an address that it does not have itself, as behind a
    translation of addresses, or that means the host itself here. Then it listens at all of its
    addresses, which one line says. Raises RunError where it cannot listen.
    """
    try:
        family, _, _, _, resolved = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise RunError(f"MASTER_ADDR: {address} has no address here: {one_line(error)}") from error
    loopback = ipaddress.ip_address(resolved[0].partition("%")[0]).is_loopback
    if one_host or not loopback:
        try:
            return socket.create_server(resolved[:2], family=family, backlog=ranks + MOST_STRANGERS)
        except OSError as error:
            reason = one_line(error)
    else:
        reason = f"{address} is {resolved[0]} here, which other hosts cannot reach"
    say_once(f"the watch for lost ranks listens at all addresses of this host: {reason}", level=logging.INFO)
    try:
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        return socket.create_server(("", 0), family=family, backlog=ranks + MOST_STRANGERS, dualstack_ipv6=both)
    except OSError as error:
        raise RunError(f"the watch for lost ranks cannot listen: {one_line(error)}") from error


def _accept(server: socket.socket, secret: bytes, size: int) -> dict[int, socket.socket]:
    """The connections of ranks 1 to size - 1, by rank.

    A connection counts once it has sent the secret and the number of a rank. Any number of others
    may come and say nothing, or something else: nobody waits for them. Raises RunError where the
    ranks have not come within PATIENCE.
    """
    ranks: dict[int, socket.socket] = {}
    strangers: dict[socket.socket, bytes] = {}
    deadline = time.monotonic() + PATIENCE
    server.setblocking(False)
    with selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)

        def dismiss(connection: socket.socket) -> bytes:
            selector.unregister(connection)
            return strangers.pop(connection)

        while len(ranks) < size - 1:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            for key, _ in selector.select(left):
                connection = key.fileobj
                if connection is server:
                    with contextlib.suppress(OSError):
                        connection, _ = server.accept()
                        connection.setblocking(False)
                        strangers[connection] = b""
                        selector.register(connection, selectors.EVENT_READ)
                    # Those that have waited longest make room.
                    while len(strangers) > size + MOST_STRANGERS:
                        oldest = next(iter(strangers))
                        dismiss(oldest)
                        oldest.close()
                elif connection in strangers:
                    try:
                        part = connection.recv(GREETING - len(strangers[connection]))
                    except OSError:
                        part = b""
                    strangers[connection] += part
                    if part and len(strangers[connection]) < GREETING:
                        continue
                    rank = _rank_of(dismiss(connection), secret)
                    if rank is not None and 0 < rank < size and rank not in ranks:
                        ranks[rank] = connection
                    else:
                        connection.close()
        for connection in strangers:
            connection.close()
    missing = sorted(set(range(1, size)) - ranks.keys())
    if missing:
        raise RunError(f"no connection from rank {', '.join(map(str, missing[:8]))} to rank 0 within {PATIENCE:g} s")
    return ranks


def _greet(address: str, port: int, secret: bytes, rank: int) -> socket.socket:
    """A connection to rank 0, which has been told the secret and the rank. Raises RunError."""
    try:
        connection = socket.create_connection((address, port), timeout=PATIENCE)
        connection.sendall(secret + rank.to_bytes(4, "big"))
        return connection
    except OSError as error:
        raise RunError(f"rank {rank} cannot connect to rank 0 at {address}:{port}: {one_line(error)}") from error


def _rank_of(greeting: bytes, secret: bytes) -> int | None:
    """The rank that a greeting names; None where it does not know the secret."""
    if len(greeting) == GREETING and hmac.compare_digest(greeting[:SECRET], secret):
        return int.from_bytes(greeting[SECRET:], "big")
    return None


def _visible(text: str) -> str:
    """One line of text from another process, without a terminal's escape sequences."""
    text = one_line(text)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def leave_at_once(message: str) -> None:
    """End the process of a rank whose peer is gone.

    Nothing is unwound: the main thread may hang in a collective.
    """
    logger.error("error: %s", message)
    os._exit(1)

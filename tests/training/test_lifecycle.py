"""The watch for lost ranks: who may connect to it, and what it believes."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading

import pytest

from selfnpo_fast.runtime.errors import RunError
from selfnpo_fast.runtime.world import World
from selfnpo_fast.training import lifecycle
from selfnpo_fast.training.lifecycle import PeerWatch


class Shared:
    """What the ranks of a world share: here they are threads."""

    def __init__(self, size: int) -> None:
        self.size, self.values, self.gate = size, [None] * size, threading.Barrier(size)
        self.listening = threading.Event()
        self.door: tuple[int, bytes] | None = None
        """Port and secret of the watch."""


class Ranks(World):
    """One of several threads that act as ranks; talks through `Shared`."""

    def __init__(self, rank: int, shared: Shared) -> None:
        super().__init__(rank, shared.size, None)
        object.__setattr__(self, "shared", shared)

    def barrier(self) -> None:
        self.shared.gate.wait()

    def gather(self, value):
        self.shared.values[self.rank] = value
        self.barrier()
        values = list(self.shared.values)
        self.barrier()
        match values[0]:
            case ((int(), bytes()) as door, None):
                self.shared.door = door
                self.shared.listening.set()
        return values


@pytest.fixture(autouse=True)
def address(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


def in_threads(*actions) -> list[BaseException | None]:
    """Run one function per rank; what each has raised."""
    raised: list[BaseException | None] = [None] * len(actions)

    def guard(number: int) -> None:
        try:
            actions[number]()
        except Exception as error:
            raised[number] = error

    threads = [threading.Thread(target=guard, args=(number,)) for number in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def watching(world: Ranks, losses: list[str], then=lambda: None):
    """A rank that watches, does `then`, and ends with the others."""

    def act() -> None:
        with PeerWatch(world, losses.append):
            then()

    return act


class Before(Ranks):
    """A rank that connects only once strangers have been at the door."""

    def __init__(self, rank: int, shared: Shared, strangers) -> None:
        super().__init__(rank, shared)
        object.__setattr__(self, "strangers", strangers)

    def together(self, action):
        if self.shared.door is not None:
            self.strangers(*self.shared.door)
        return super().together(action)


def test_strangers_neither_hold_the_watch_nor_pass_for_a_rank():
    """Silent ones, more than may wait; half a greeting; the wrong secret; no rank; noise."""
    opened = []

    def strangers(port: int, secret: bytes) -> None:
        def come(message: bytes) -> None:
            opened.append(socket.create_connection(("127.0.0.1", port)))
            opened[-1].sendall(message)

        for _ in range(lifecycle.MOST_STRANGERS + 8):
            come(b"")
        wrong = bytes(len(secret)) + (1).to_bytes(4, "big")
        for message in (
            secret[:7],
            wrong,
            secret + (7).to_bytes(4, "big"),
            secret + bytes(4),
            b"GET / HTTP/1.1\r\n" * 9,
        ):
            come(message)

    shared, losses = Shared(2), []
    raised = in_threads(watching(Ranks(0, shared), losses), watching(Before(1, shared, strangers), losses))
    assert raised == [None, None]
    assert losses == []
    with contextlib.suppress(OSError):
        assert opened[0].recv(1) == b"", "closed by the watch"
    for stranger in opened:
        stranger.close()


def test_the_watch_listens_at_the_rendezvous_address_alone_and_not_for_long(monkeypatch):
    servers, create = [], socket.create_server

    def create_server(address, **options):
        servers.append((create(address, **options), address[0]))
        return servers[-1][0]

    monkeypatch.setattr(socket, "create_server", create_server)
    shared, losses = Shared(3), []
    assert in_threads(*(watching(Ranks(rank, shared), losses) for rank in range(3))) == [None] * 3
    ((server, host),) = servers
    assert host == "127.0.0.1"
    assert server.fileno() == -1, "closed once all ranks are connected"


@pytest.mark.parametrize(
    ("address", "reason"),
    [("localhost", "which other hosts cannot reach"), ("192.0.2.1", "Cannot assign requested address")],
)
def test_an_address_that_other_hosts_cannot_use_is_said(address, reason, monkeypatch, caplog):
    """192.0.2.1 is reserved for documentation: no host has it. The ranks come to 127.0.0.1."""
    names = iter(["first", "second"])
    connect = socket.create_connection
    monkeypatch.setattr(socket, "gethostname", lambda: next(names))
    monkeypatch.setattr(socket, "create_connection", lambda at, **options: connect(("127.0.0.1", at[1]), **options))
    monkeypatch.setenv("MASTER_ADDR", address)
    shared, losses = Shared(2), []
    with caplog.at_level(logging.INFO):
        assert in_threads(*(watching(Ranks(rank, shared), losses) for rank in range(2))) == [None, None]
    assert "the watch for lost ranks listens at all addresses of this host" in caplog.text
    assert reason in caplog.text


def test_a_rank_that_does_not_come_ends_all_ranks_with_a_line(monkeypatch):
    monkeypatch.setattr(lifecycle, "PATIENCE", 0.2)
    shared = Shared(2)
    absent = Ranks(1, shared)

    def stay_away() -> None:
        absent.gather("the same host")
        absent.on_main(lambda: None)
        absent.together(lambda: None)

    raised = in_threads(watching(Ranks(0, shared), []), stay_away)
    assert [str(error) for error in raised] == ["no connection from rank 1 to rank 0 within 0.2 s"] * 2
    assert all(isinstance(error, RunError) for error in raised)


def test_what_a_lost_rank_says_is_one_visible_line(monkeypatch):
    monkeypatch.setattr(lifecycle, "GRACE", 0.0)
    shared, losses, heard = Shared(2), [], threading.Event()

    def on_loss(message: str) -> None:
        losses.append(message)
        heard.set()

    def stay() -> None:
        with PeerWatch(Ranks(0, shared), on_loss):
            heard.wait()
            raise ValueError("this rank ends as well")

    def leave() -> None:
        with PeerWatch(Ranks(1, shared), losses.append):
            raise ValueError("\x1b[2Jmodel.path:\nno such folder" + 5000 * "!")

    in_threads(stay, leave)
    (message,) = losses
    assert message.startswith("rank 1 is lost: it has left: \\x1b[2Jmodel.path: no such folder!!!")
    assert len(message) < 400
    assert message.isprintable()

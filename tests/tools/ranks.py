"""Ranks of a training run as processes: plain, under a launcher, on a disk that fills up."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from selfnpo_fast.runtime import stopping

PRELOAD = ["ranks", "tiny", "selfnpo_fast.training.replay", "deepspeed", "peft.utils"]
PRELOAD += ["torch.utils.tensorboard", "tqdm"]
PATIENCE = 1800.0  # seconds, far more than it takes: a machine of load 10 is no hang


def run_child(argv: list[str], env: dict[str, str], log: Path) -> None:
    """The main function of a child process: a training command with its output in a file."""
    os.environ.update(env)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable()  # `finish` makes a process that hangs say where
    gc.freeze()  # DeepSpeed collects garbage often, and would look through all that the server has imported
    from selfnpo_fast import train

    sys.exit(train.main(argv))


def run_on_full_disk(most_bytes: int, argv: list[str], env: dict[str, str], log: Path) -> None:
    """`run_child` where the kernel lets no file grow beyond `most_bytes`, its log neither.

    As on a full disk, a write fails that may have begun well.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    run_child(argv, env, log)


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _context() -> multiprocessing.context.ForkServerContext:
    """Processes are forked from a server that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _environments(ranks: int) -> list[dict[str, str]]:
    """The variables of each rank."""
    env = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    if ranks == 1:
        return [env]
    env |= {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [env | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def start(ranks: int, argv: list[str], logs: Path, child=run_child) -> list[multiprocessing.Process]:
    """One process per rank. A start costs a second."""
    processes = []
    for rank, env in enumerate(_environments(ranks)):
        process = _context().Process(target=child, args=(argv, env, logs / f"rank{rank}.log"))
        process.start()
        processes.append(process)
    return processes


@dataclass
class Launched:
    """Ranks under a launcher of their own, which is like DeepSpeed's."""

    process: multiprocessing.Process
    """The launcher, which leads the process group of its ranks."""
    reports: Connection
    """What the ranks report; it ends when the last of all these processes has."""
    log: Path
    """The log of rank 0."""
    before: int
    """The log's size before the start."""
    pids: dict[int, int]
    """The process of each rank."""

    def finish(self, timeout: float = PATIENCE) -> dict[int, int]:
        """The exit code of each rank that ended by itself. Raises AssertionError where one hangs."""
        codes = {}
        with contextlib.suppress(EOFError):
            while self.reports.poll(timeout):
                rank, codes[rank] = self.reports.recv()
            for pid in self.pids.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGABRT)
            raise AssertionError(f"a rank hangs:\n{tail(self.log.parent)}")
        self.process.join()
        return codes

    def ended_well(self) -> bool:
        """Whether rank 0 has said that it stopped, or made its negative model."""
        with self.log.open() as file:
            file.seek(self.before)
            said = file.read()
        return "stopped" in said or "negative model: " in said


@contextlib.contextmanager
def launch(ranks: int, argv: list[str], logs: Path) -> Iterator[Launched]:
    """Start ranks under a launcher, and return once all are there."""
    context = _context()
    reports, writer = context.Pipe(duplex=False)
    log = logs / "rank0.log"
    before = log.stat().st_size if log.exists() else 0
    environments = [env | {"CROSS_RANK": "0"} for env in _environments(ranks)]
    process = context.Process(target=_launcher, args=(argv, environments, logs, writer))
    process.start()
    writer.close()
    with reports:
        yield Launched(process, reports, log, before, dict(reports.recv() for _ in range(ranks)))


def _launcher(argv: list[str], environments: list[dict[str, str]], logs: Path, reports: Connection) -> None:
    """The main function of a launcher, as deepspeed/launcher/launch.py: it passes signals on."""
    os.setpgid(0, 0)
    pids = []
    for rank, env in enumerate(environments):
        pids.append(os.fork())
        if pids[-1] == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            stopping.remember_parent()  # the server of forks has imported the module
            reports.send((rank, os.getpid()))
            code = 1
            try:
                run_child(argv, env, logs / f"rank{rank}.log")
            except SystemExit as left:
                code = left.code
            except BaseException:
                traceback.print_exc()
            reports.send((rank, code))
            os._exit(code)

    def end(*_) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        os._exit(1)

    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)
    for _ in environments:
        if os.wait()[1]:
            end()
    os._exit(0)


def finish(processes: list[multiprocessing.Process], logs: Path, timeout: float = PATIENCE) -> list[int]:
    """Exit codes of processes that end by themselves. Raises AssertionError where one hangs."""
    for process in processes:
        process.join(timeout)
        if process.is_alive():
            os.kill(process.pid, signal.SIGABRT)
            process.join(10)
            process.kill()
            raise AssertionError(f"rank {processes.index(process)} hangs:\n{tail(logs)}")
    return [process.exitcode for process in processes]


def tail(logs: Path) -> str:
    """The ends of all ranks' output."""
    return "\n".join(f"--- {path.name}\n{path.read_text()[-6000:]}" for path in sorted(logs.glob("rank*.log")))

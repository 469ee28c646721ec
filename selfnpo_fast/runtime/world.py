"""The ranks of a run: number, device, and what ranks tell each other and agree on."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch

from selfnpo_fast.runtime.errors import RunError, UserError, one_line, shortened
from selfnpo_fast.runtime.limits import MAX_RANKS

T = TypeVar("T")
VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher sets: DeepSpeed's, torchrun, or a script."""
STARTERS = {
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
    "mpirun": ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"),
}
"""What starts many processes that know nothing of each other, and where it says how many."""
MEETING = timedelta(minutes=10)
"""How long a rank waits for the others to start."""
LOOK = 5.0
"""Seconds for an answer of rank 0's host; it is asked ten times as often."""


@dataclass(frozen=True)
class World:
    """This process among the ranks of a run.

    All ranks have to call the same methods in the same order.
    """

    rank: int
    """0 to size - 1."""
    size: int
    """The number of ranks."""
    device: torch.device
    """Where this rank computes."""
    control: torch.distributed.ProcessGroup | None = field(default=None, compare=False)
    """A gloo group of all ranks: its hosts talk without waiting for a device. None for one rank."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and draws the progress bar."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until all ranks have come here."""
        if self.size > 1:
            torch.distributed.barrier(group=self.control)

    def any(self, flag: bool) -> bool:
        """Whether the flag of any rank is set."""
        if self.size == 1:
            return flag
        largest = torch.tensor([int(flag)])
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=self.control)
        return bool(largest.item())

    def gather(self, value):
        """The values of all ranks, in order of rank, on every rank.

        Values travel as pickles, which only these processes exchange.
        """
        if self.size == 1:
            return [value]
        values = [None] * self.size
        torch.distributed.all_gather_object(values, value, group=self.control)
        return values

    def together(self, action: Callable[[], T]) -> list[T]:
        """Run `action` on every rank; its results, in order of rank, on every rank.

        A UserError or RunError of any rank is raised on all ranks, so that no rank waits for ever.
        """
        value = error = None
        try:
            value = action()
        except (UserError, RunError) as caught:
            error = caught
        outcomes = self.gather((value, error))
        for _, error in outcomes:
            if error is not None:
                raise error
        return [value for value, _ in outcomes]

    def on_main(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 only; its result, on every rank. Raises like `together`."""
        return self.together(lambda: action() if self.is_main else None)[0]


@dataclass(frozen=True)
class Launch:
    """What a launcher has told this process."""

    rank: int
    size: int
    local_rank: int
    """The rank among those of this host."""
    local_size: int
    """The number of ranks on this host; 1 where the launcher does not say."""
    address: str
    """Host and port at which the ranks meet."""


def read_launch() -> Launch | None:
    """What the launcher's variables say; None without a launcher.

    Raises UserError for variables that are missing or not possible, and where a starter of many
    processes has not made them ranks: each would be a whole run.
    """
    if "WORLD_SIZE" not in os.environ:
        for starter, variables in STARTERS.items():
            name = next((name for name in variables if os.environ.get(name)), None)
            count = 1 if name is None else _number(name, 1, MAX_RANKS)
            if count > 1:
                raise _refused(
                    f"{starter} has started {count} processes without WORLD_SIZE, each of which would be a "
                    f"whole run; let it start torchrun or deepspeed, one on each host, or set {', '.join(VARIABLES)}; "
                    "one process alone: let it start one"
                )
        if os.environ.get("RANK", "0") != "0":
            raise _refused(f"WORLD_SIZE: missing, but RANK is set; a launcher sets {', '.join(VARIABLES)}")
        return None
    size = _number("WORLD_SIZE", 1, MAX_RANKS)
    port, rank = _number("MASTER_PORT", 1, 2**16 - 1), _number("RANK", 0, size - 1)
    if not os.environ.get("MASTER_ADDR"):
        raise _refused("MASTER_ADDR: missing; expected the name or address of the host of rank 0")
    local_rank = _number("LOCAL_RANK", 0, size - 1, "0" if size == 1 else None)
    local_size = "LOCAL_SIZE" if os.environ.get("LOCAL_SIZE") else "LOCAL_WORLD_SIZE"
    return Launch(rank, size, local_rank, _number(local_size, 1, size, "1"), f"{os.environ['MASTER_ADDR']}:{port}")


def _number(name: str, least: int, most: int, default: str | None = None) -> int:
    """The integer in a variable of the environment. Raises UserError where it is not possible."""
    text = os.environ.get(name) or default
    if text is None:
        raise _refused(f"{name}: missing; a launcher sets {', '.join(VARIABLES)}")
    if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most):
        raise _refused(f"{name}: {shortened(text)} is not possible; expected an integer from {least} to {most}")
    return int(text)


def _refused(message: str) -> UserError:
    """A UserError of this rank, of which the other ranks know nothing."""
    error = UserError(message)
    error.of_one_rank = True
    return error


def init_world() -> World:
    """Join the process group that the launcher's environment variables describe.

    Without a launcher the process is a group of one.

    Raises UserError for variables that are not possible and a port that is taken, and RunError
    where the ranks do not meet: perhaps on this rank alone.
    """
    launch = read_launch()
    local_rank = launch.local_rank if launch else 0
    # DeepSpeed insists on the variable and takes its GPU, which an outer launcher may have set.
    os.environ["LOCAL_RANK"] = str(local_rank)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        gpus = torch.cuda.device_count()
        if local_rank >= gpus:
            raise _refused(
                f"LOCAL_RANK: {local_rank} is not possible; expected at most {gpus - 1}, since this host has {gpus} "
                f"GPU{'s' * (gpus > 1)}; start one rank for each GPU"
            )
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # Ranks on one machine share its cores.
        if "OMP_NUM_THREADS" not in os.environ:
            local_size = launch.local_size if launch else 1
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    backend = "nccl" if cuda else "gloo"
    if launch is None:
        if not torch.distributed.is_initialized():
            store = torch.distributed.HashStore()  # a group of one needs no port
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        return World(0, 1, device)
    return _meet(launch, backend, device)


def _wait_for_rank_0(address: str) -> None:
    """Wait until somebody listens at host:port. torch's own wait prints stacks of C++, and hears no
    Ctrl-C. Raises OSError after MEETING."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + MEETING.total_seconds()
    while True:
        try:
            return socket.create_connection((host, int(port)), timeout=LOOK).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(LOOK / 10)


def _meet(launch: Launch, backend: str, device: torch.device) -> World:
    """The world of all ranks, once they have met."""
    rank, size = launch.rank, launch.size
    try:
        if rank:
            _wait_for_rank_0(launch.address)
        store = next(torch.distributed.rendezvous("env://", timeout=MEETING))[0]
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
        return World(rank, size, device, torch.distributed.new_group(backend="gloo"))
    except (RuntimeError, ValueError, OSError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            address, _, port = launch.address.rpartition(":")
            raise _refused(
                f"MASTER_PORT: {port} cannot be listened on at {address}, since another process does; give the "
                "launcher another --master_port"
            ) from error
        unmet = RunError(
            f"rank {rank} of {size} has not met the others at {launch.address}: {one_line(error, 200)}; it waits "
            f"{MEETING.total_seconds():g} s for them; look at what has ended them"
        )
        unmet.of_one_rank = True
        raise unmet from error

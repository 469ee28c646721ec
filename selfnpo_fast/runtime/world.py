"""This process among its peers: rank, world size, device, and what ranks agree on."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from selfnpo_fast.runtime.errors import RunError, UserError

T = TypeVar("T")


def region(name: str) -> AbstractContextManager:
    """Names a part of an update for torch.profiler; costs a microsecond without one."""
    return torch.profiler.record_function(f"selfnpo_fast: {name}")


@dataclass(frozen=True)
class World:
    """This process among its peers.

    Ranks agree through a gloo group of their own: host to host, so that no device is waited for.
    """

    rank: int
    size: int
    device: torch.device
    control: torch.distributed.ProcessGroup | None = field(default=None, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and draws the progress bar."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            torch.distributed.barrier(group=self.control)

    def any(self, flag: bool) -> bool:
        """Whether any rank says so; all ranks have to ask together."""
        if self.size == 1:
            return flag
        said = torch.tensor([int(flag)])
        torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MAX, group=self.control)
        return bool(said.item())

    def gather(self, value):
        """What each rank says, in order of rank, on every rank. Values are pickled among these processes alone."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        torch.distributed.all_gather_object(values, value, group=self.control)
        return values

    def together(self, action: Callable[[], T]) -> list[T]:
        """What `action` returns on each rank, in order of rank, on every rank.

        A UserError or RunError of any rank is raised on all of them, so that none is left waiting.
        """
        value = error = None
        try:
            value = action()
        except (UserError, RunError) as caught:
            error = caught
        said = self.gather((value, error))
        for _, error in said:
            if error is not None:
                raise error
        return [value for value, _ in said]

    def on_main(self, action: Callable[[], T]) -> T:
        """What `action` returns on rank 0, which alone runs it, on every rank; errors as in `together`."""
        return self.together(lambda: action() if self.is_main else None)[0]


def init_world() -> World:
    """Join the process group that the launcher describes, or be a group of one."""
    alone = "WORLD_SIZE" not in os.environ
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed insists on the variable
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # Ranks on one machine share its cores; each rank takes its part, as torchrun would with one thread each.
        local_size = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    backend = "nccl" if cuda else "gloo"
    if alone:
        if not torch.distributed.is_initialized():
            store = torch.distributed.HashStore()  # a group of one needs no port
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        return World(0, 1, device)
    store, rank, size = next(torch.distributed.rendezvous("env://"))
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
    return World(rank, size, device, torch.distributed.new_group(backend="gloo"))

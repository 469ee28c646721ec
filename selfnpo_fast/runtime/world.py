"""The ranks of a run: number, device, and what ranks tell each other and agree on."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from selfnpo_fast.runtime.errors import RunError, UserError

T = TypeVar("T")


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


def init_world() -> World:
    """Join the process group that the launcher's environment variables describe.

    Without a launcher the process is a group of one.
    """
    launched = "WORLD_SIZE" in os.environ
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed insists on the variable
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # Ranks on one machine share its cores.
        local_size = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    backend = "nccl" if cuda else "gloo"
    if not launched:
        if not torch.distributed.is_initialized():
            store = torch.distributed.HashStore()  # a group of one needs no port
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        return World(0, 1, device)
    store, rank, size = next(torch.distributed.rendezvous("env://"))
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
    return World(rank, size, device, torch.distributed.new_group(backend="gloo"))

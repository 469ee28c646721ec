"""This process among its peers: rank, world size, device and the names of precisions."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and draws the progress bar."""
        return self.rank == 0


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
    if not torch.distributed.is_initialized():
        backend = "nccl" if cuda else "gloo"
        if alone:
            # A group of one needs no port.
            torch.distributed.init_process_group(
                backend, store=torch.distributed.HashStore(), rank=0, world_size=1
            )
        else:
            torch.distributed.init_process_group(backend)
    return World(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)

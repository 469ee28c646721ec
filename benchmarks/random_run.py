"""A real training run of a network that has configs alone: weights and text embeddings are random.

What an update costs depends on sizes, dtypes and the code that runs, not on the values. The trainer
is the product's, with DeepSpeed and all.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
from pathlib import Path

import torch

from benchmarks.environment import ROOT, pick_device
from selfnpo_fast.config import TrainConfig
from selfnpo_fast.doctor.costs import Tracer
from selfnpo_fast.doctor.random_inputs import random_inputs
from selfnpo_fast.models import SD15_SMALL, denoiser_names, resolve_path
from selfnpo_fast.models.folder import DIFFUSERS_WEIGHTS
from selfnpo_fast.runtime.world import World, init_world
from selfnpo_fast.train import parse
from selfnpo_fast.training.recorder import Recorder
from selfnpo_fast.training.trainer import Trainer

FOLDERS = {
    "digits": "digits",
    "sd15_small": str(SD15_SMALL),
    "sd15": str(ROOT / "benchmarks" / "configs" / "sd15"),
    "sdxl": str(ROOT / "benchmarks" / "configs" / "sdxl"),
}
"""What `model.path` is for each network."""
RECIPE = ROOT / "configs" / "sd15.yaml"
"""The recommended recipe."""

CALLS_TO_CAPTURE = 3
"""Calls of the step of a group of slots after which a GPU replays it as a graph."""


def recipe(net: str, *words: str) -> TrainConfig:
    """The recommended recipe on one of `FOLDERS`, changed by words of `selfnpo train`.

    It draws no pictures, since text encoders and tokenizers are not there.
    """
    fixed = ["--config", str(RECIPE), "--model.path", FOLDERS[net], "--log.sample_every", "-1"]
    return parse([*fixed, *words]).config


def has_weights(config: TrainConfig) -> bool:
    """Whether the folder of the config's model has weights of a denoiser, and not its configs alone.

    What is no folder here, such as a Hub id, counts as a model with weights.
    """
    folder = Path(resolve_path(config.model.path)).expanduser()
    return not folder.is_dir() or any(any((folder / name).glob(f"{DIFFUSERS_WEIGHTS}*")) for name in denoiser_names())


def world_of(name: str) -> World:
    """This process as the only rank, on `auto`, `cpu`, `cuda` or `cuda:1`."""
    device, chosen = pick_device(name), pick_device("auto")
    if device.type == chosen.type and not device.index:
        return init_world()
    # Another device than that of a run: DeepSpeed is told the same.
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    else:
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        backend = "gloo" if device.type == "cpu" else "nccl"
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    return World(0, 1, device)


class RandomRun:
    """A trainer with random weights, and updates of it that nothing records."""

    def __init__(self, config: TrainConfig, tracer: Tracer, world: World, output: Path) -> None:
        """`tracer` is of the config's model (`doctor.report.make_tracer`); nothing is written to
        `output`."""
        inputs = random_inputs(config, tracer.adapter, tracer.prompts, world)
        self.config = config
        self.trainer = Trainer(config, inputs, world, output)
        self.recorder = Recorder(config, world, tracer.adapter.schedule.num_train_timesteps)

    def update(self) -> None:
        """One update, whose metrics nothing reads."""
        self.trainer.train_update(self.recorder)
        self.recorder.discard()

    def losses(self, updates: int) -> list[float]:
        """The mean loss of each of the next updates."""
        out = []
        for _ in range(updates):
            self.trainer.train_update(self.recorder)
            out.append(self.recorder.flush(self.trainer.update, self.trainer.engine.lr)["loss"])
        return out

    def close(self) -> None:
        """Ends the thread of the rollout, if there is one, and takes DeepSpeed's engine apart, of
        which nothing can be used any more.

        DeepSpeed hangs methods of itself and its buffers on every parameter, in cycles through C++
        that Python's collector cannot see.
        """
        trainer, self.trainer, self.recorder = self.trainer, None, None
        trainer.producer.close()
        engine = trainer.engine.engine
        with contextlib.redirect_stdout(io.StringIO()):
            engine.destroy()
        for p in trainer.engine.module.parameters():
            p.grad = None
            vars(p).clear()


def freed(device: torch.device) -> int:
    """Frees what nothing refers to, also within cycles; the bytes of the tensors that stay.

    On a GPU they are the allocator's. On a CPU they are those of all tensors that Python knows.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(device)
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

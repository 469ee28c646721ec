"""Writing a negative model: a run's own, and weights that are computed while they are written."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from selfnpo_fast.negatives.lora_files import RECORD_KEY
from selfnpo_fast.negatives.sources import LORA_FILE, RECORD, WEIGHTS
from selfnpo_fast.negatives.weights import WeightReader
from selfnpo_fast.runtime.dtypes import DTYPES, SAFETENSORS_NAMES
from selfnpo_fast.runtime.world import World
from selfnpo_fast.runtime.writer import Tensors, Writer

SHARD_BYTES = 5 * 10**9


NamedTensors = Iterable[tuple[str, torch.Tensor]]
"""(parameter name, whole tensor) pairs, which all ranks have to iterate together."""


def save_negative(
    folder: Path,
    network: nn.Module,
    trained: NamedTensors,
    frozen: NamedTensors,
    adapter,
    dtype: torch.dtype,
    world: World,
    *,
    lora: bool,
    base: dict,
) -> Path:
    """Write the negative model: the denoiser as a diffusers component, or a LoRA file that diffusers loads.

    `trained` and `frozen` are the weights of `network`; a LoRA consists of the trained ones. WeightReader are stored in
    `dtype`. `base` (`fingerprint.base_record`) is noted next to full weights, and in a LoRA file's metadata.
    All ranks take part; rank 0 writes. Raises RunError on all of them.
    """
    writer = Writer(folder, world)
    if lora:
        weights = {name: value.to("cpu", dtype, copy=True) for name, value in trained if world.is_main}
        writer.run("LoRA", lambda: write_lora(writer.folder, network, weights, adapter, base))
    else:
        name = f"{adapter.denoiser_name}/{WEIGHTS}.safetensors"
        writer.save(name, chain(trained, frozen), write=world.is_main, dtype=dtype, metadata={"format": "pt"})
        writer.run("config.json", lambda: network.save_config(writer.folder / adapter.denoiser_name))
        writer.run(RECORD, lambda: (writer.folder / RECORD).write_text(json.dumps(base, indent=1), encoding="utf-8"))
    return writer.finish()


def write_lora(folder: Path, network: nn.Module, weights: Tensors, adapter, base: dict) -> None:
    """PEFT's layout with its config in the metadata, as `pipe.load_lora_weights(folder)` expects it."""
    from peft.utils import get_peft_model_state_dict

    config = network.peft_config["default"].to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    prefixed = {f"{adapter.denoiser_name}.{key}": value for key, value in config.items()}
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(prefixed, indent=2, sort_keys=True),
        RECORD_KEY: json.dumps(base),
    }
    layers = get_peft_model_state_dict(network, state_dict=weights)
    named = {f"{adapter.denoiser_name}.{key}": value.contiguous() for key, value in layers.items()}
    # Not by the pipeline's own save_lora_weights, which knows of no metadata but the adapter's.
    save_file(named, folder / LORA_FILE, metadata=metadata)


def write_weights(folder: Path, weights: WeightReader, dtype: str) -> None:
    """safetensors files under diffusers' names: one, or shards of at most 5 GB and their index.

    Holds one tensor at a time, which safetensors' own function does not. Raises OSError.
    """
    size = DTYPES[dtype].itemsize
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(weights.shapes):
        count = size * torch.Size(weights.shapes[name]).numel()
        if shards[-1] and filled + count > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += count
    if len(shards) == 1:
        _write_file(folder / f"{WEIGHTS}.safetensors", shards[0], weights, dtype)
        return
    files = [f"{WEIGHTS}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        _write_file(folder / file, names, weights, dtype)
    total = sum(size * torch.Size(shape).numel() for shape in weights.shapes.values())
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
    }
    (folder / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(path: Path, names: list[str], weights: WeightReader, dtype: str) -> None:
    """The format: length of the header as 8 bytes, the header (JSON, where each tensor lies), the tensors."""
    size = DTYPES[dtype].itemsize
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        start, end = end, end + size * torch.Size(weights.shapes[name]).numel()
        shape = list(weights.shapes[name])
        header[name] = {"dtype": SAFETENSORS_NAMES[DTYPES[dtype]], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(weights.read(name).flatten().view(torch.uint8).numpy())

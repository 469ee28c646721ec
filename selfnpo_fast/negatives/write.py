"""Writing a negative model: that of a training run, or weights of any reader."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from selfnpo_fast.models import Adapter
from selfnpo_fast.models.experts import Experts
from selfnpo_fast.negatives.lora_files import RECORD_KEY
from selfnpo_fast.negatives.sources import LORA_FILE, RECORD, WEIGHTS
from selfnpo_fast.negatives.weights import WeightReader
from selfnpo_fast.runtime.dtypes import DTYPES, SAFETENSORS_NAMES
from selfnpo_fast.runtime.world import World
from selfnpo_fast.runtime.writer import NamedTensors, Tensors, Writer

SHARD_BYTES = 5 * 10**9
"""Largest size of one safetensors file, as in diffusers."""


def save_negative(
    folder: Path,
    network: nn.Module,
    trained: NamedTensors,
    frozen: NamedTensors,
    adapter: Adapter,
    dtype: torch.dtype,
    world: World,
    *,
    lora: bool,
    base: Mapping[str, dict],
) -> Path:
    """Write a run's negative: a denoiser in diffusers format, or a LoRA file that diffusers loads.

    `trained` and `frozen` are the weights of `network`; a LoRA consists of the trained ones. Of two
    experts each one that is trained has a folder of its name, which is a negative of it. Weights are
    stored in `dtype`. The record of the base, which `base` has by the denoiser's name
    (`fingerprint.base_records`), is written next to full weights, or into a LoRA file's metadata.
    All ranks take part; rank 0 writes.

    Raises RunError on all ranks where the folder cannot be written, and NotFiniteError where a
    weight is not finite in `dtype`.
    """
    writer = Writer(folder, world)
    if isinstance(network, Experts):
        parts = [(f"{name}.", network.get_submodule(name), name) for name in adapter.trained_denoisers]
    else:
        parts = [("", network, adapter.denoiser_name)]
    # One pass over the weights, in which all ranks gather; those of each denoiser follow each other.
    tensors = iter(trained) if lora else chain(trained, frozen)
    tensors = (pair for pair in tensors if pair[0].startswith(tuple(prefix for prefix, *_ in parts)))
    place = {prefix: i for i, (prefix, *_) in enumerate(parts)}
    grouped = groupby(tensors, lambda pair: next(p for p in place if pair[0].startswith(p)))
    for (prefix, own), (_, part, name) in zip(grouped, parts, strict=True):
        named = ((key.removeprefix(prefix), value) for key, value in own)
        inside = f"{name}/" if prefix else ""
        if lora:
            weights = {key: value.to("cpu", dtype, copy=True) for key, value in named if world.is_main}
            writer.look(inside + LORA_FILE, weights)
            writer.run("LoRA", partial(write_lora, writer.folder / inside, part, weights, adapter, base[name]))
        else:
            _save_full(writer, inside, name, part, named, dtype, base[name])
    return writer.finish()


def _save_full(
    writer: Writer, inside: str, name: str, network: nn.Module, tensors: NamedTensors, dtype: torch.dtype, base: dict
) -> None:
    """Write a denoiser's folder `name`, and the record of its base, in the folder `inside`."""
    file = f"{name}/{WEIGHTS}.safetensors"
    writer.save(file, tensors, write=writer.world.is_main, finite=True, dtype=dtype, metadata={"format": "pt"})
    writer.run("config.json", lambda: network.save_config(writer.folder / name))  # type: ignore[operator]
    record = writer.folder / inside / RECORD
    writer.run(RECORD, lambda: record.write_text(json.dumps(base, indent=1), encoding="utf-8"))


def write_lora(folder: Path, network: nn.Module, weights: Tensors, adapter: Adapter, base: dict) -> None:
    """Write the LoRA file that `pipe.load_lora_weights(folder)` expects, from weights on the CPU.

    Keys are PEFT's, after the denoiser's name; of the second of two experts, too, as diffusers
    expects them (`load_into_transformer_2`). PEFT's config and the record of the base, `base`, are in
    the metadata. Raises OSError or SafetensorError where the file cannot be written.
    """
    from peft.utils import get_peft_model_state_dict

    peft_config: dict[str, Any] = network.peft_config  # type: ignore[assignment]
    config = peft_config["default"].to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    prefixed = {f"{adapter.denoiser_name}.{key}": value for key, value in config.items()}
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(prefixed, indent=2, sort_keys=True),
        RECORD_KEY: json.dumps(base),
    }
    layers = get_peft_model_state_dict(network, state_dict=weights)
    named = {f"{adapter.denoiser_name}.{key}": value.contiguous() for key, value in layers.items()}
    folder.mkdir(exist_ok=True)
    # The pipeline's save_lora_weights would write no metadata but PEFT's config.
    save_file(named, folder / LORA_FILE, metadata=metadata)


def write_weights(folder: Path, weights: WeightReader, dtype: str) -> None:
    """Write safetensors files with diffusers' names: one, or shards of SHARD_BYTES and an index.

    `dtype` is fp32, bf16 or fp16, and `weights` gives contiguous CPU tensors of it. Only one tensor
    is in memory at a time, which safetensors' function for this does not offer.

    Raises OSError where a file cannot be written, and what `weights.read` raises.
    """
    size = DTYPES[dtype].itemsize
    # Fill one shard after another in the order of the names.
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(weights.shapes):
        nbytes = size * torch.Size(weights.shapes[name]).numel()
        if shards[-1] and filled + nbytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    if len(shards) == 1:
        _write_file(folder / f"{WEIGHTS}.safetensors", shards[0], weights, dtype)
        return
    # Several shards need an index of the file of each tensor.
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
    """Write one safetensors file, tensor by tensor.

    The format: the length of the header as 8 bytes, the header as JSON with each tensor's dtype,
    shape and byte range, and the tensors' bytes.
    """
    size = DTYPES[dtype].itemsize
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + size * torch.Size(weights.shapes[name]).numel()
        shape = list(weights.shapes[name])
        header[name] = {"dtype": SAFETENSORS_NAMES[DTYPES[dtype]], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(weights.read(name).flatten().view(torch.uint8).numpy().data)

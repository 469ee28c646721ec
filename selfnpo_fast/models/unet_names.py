"""The original authors' names of a UNet2DConditionModel's modules.

In the original code all blocks of one side are counted through: the k-th input block is a layer of
a down block, or the downsampler after one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"((?:down|up)_blocks)\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)")


def original_paths(paths: Iterable[str]) -> dict[str, str]:
    """The original path of each module by diffusers' path, for those that have one.

    `paths` are all of the network's modules, by which the layers of its blocks are counted.
    diffusers' `convert_ldm_unet_checkpoint` is the inverse.
    """
    paths = list(paths)
    originals = _OUTER | _blocks(paths)
    found = {}
    for path in paths:
        outer = path
        while outer not in originals and "." in outer:
            outer = outer.rpartition(".")[0]
        if outer not in originals:
            continue
        inner = path[len(outer) + 1 :]
        if ".resnets." in outer:
            inner = _RESNET.get(inner, inner)
        found[path] = f"{originals[outer]}.{inner}".rstrip(".")
    return found


def _blocks(paths: list[str]) -> dict[str, str]:
    """The original path of each layer of the down and up blocks, and of their samplers."""
    parts = {match.groups() for path in paths if (match := _BLOCK.fullmatch(path))}
    layers: dict[tuple[str, int], int] = {}
    for side, block, kind, _ in parts:
        layers[side, int(block)] = layers.get((side, int(block)), 0) + (kind == "resnets")
    originals = {}
    # Down blocks: a downsampler is an input block of its own; conv_in is the first.
    index = 1
    for block in sorted(block for side, block in layers if side == "down_blocks"):
        for layer in range(layers["down_blocks", block]):
            originals[f"down_blocks.{block}.resnets.{layer}"] = f"input_blocks.{index}.0"
            originals[f"down_blocks.{block}.attentions.{layer}"] = f"input_blocks.{index}.1"
            index += 1
        if ("down_blocks", str(block), "downsamplers", "0") in parts:
            originals[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{index}.0.op"
            index += 1
    # Up blocks: an upsampler stands in the last output block, behind the attention.
    index = 0
    for block in sorted(block for side, block in layers if side == "up_blocks"):
        attention = ("up_blocks", str(block), "attentions", "0") in parts
        for layer in range(layers["up_blocks", block]):
            originals[f"up_blocks.{block}.resnets.{layer}"] = f"output_blocks.{index}.0"
            originals[f"up_blocks.{block}.attentions.{layer}"] = f"output_blocks.{index}.1"
            index += 1
        originals[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{index - 1}.{1 + attention}.conv"
    return originals

"""Every pipeline class that takes a negative, tiny and random, with arguments for a short call."""

from __future__ import annotations

import copy

import diffusers
import tiny
import torch
from diffusers import ControlNetModel, T2IAdapter
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from selfnpo_fast.negatives.load import Negative
from selfnpo_fast.negatives.low_rank import Deltas, LowRank

SIZE = 64
STEPS = 2
FOR_ADAPTERS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
"""A T2I-Adapter's residuals fit a first block with attention, as in Stable Diffusion."""


def classes() -> list[str]:
    """The names of the pipeline classes that this module builds."""
    kinds = ["Pipeline", "Img2ImgPipeline", "InpaintPipeline", "ControlNetPipeline", "ControlNetImg2ImgPipeline"]
    kinds += ["ControlNetInpaintPipeline", "AdapterPipeline"]
    return [family + kind for family in ("StableDiffusion", "StableDiffusionXL") for kind in kinds]


@torch.no_grad()
def randomised(module: nn.Module, seed: int) -> nn.Module:
    """The module, after parameters that are zero have become random."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if not parameter.any():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def build(name: str, seed: int = 0, **unet_changes) -> diffusers.DiffusionPipeline:
    """A pipeline of the class `name`, without a progress bar."""
    torch.manual_seed(seed)
    xl, tokens = "XL" in name, tiny.tokenizer()
    changes = (FOR_ADAPTERS if "Adapter" in name else {}) | unet_changes
    unet = tiny.sdxl_unet(**changes) if xl else tiny.unet(**changes)
    parts = {
        "vae": tiny.vae(),
        "text_encoder": CLIPTextModel(tiny.text_config(tokens)),
        "tokenizer": tokens,
        "unet": randomised(unet, seed),
        "scheduler": tiny.scheduler(),
    }
    if xl:
        parts |= {"text_encoder_2": CLIPTextModelWithProjection(tiny.text_config(tokens)), "tokenizer_2": tokens}
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if "ControlNet" in name:
        channels = (4, 8, 8, 8)  # three halvings, as the autoencoder's
        parts["controlnet"] = randomised(
            ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=channels), 1
        )
    if "Adapter" in name:
        parts["adapter"] = T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=8).eval()
    pipe = getattr(diffusers, name)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(name: str, prompts: int = 1, **changes) -> dict:
    """Keyword arguments of a short, guided call of the class `name`.

    Its output is latents, and all its noise is seeded.
    """
    generator = torch.Generator().manual_seed(9)
    picture, hint = (torch.rand(prompts, 3, SIZE, SIZE, generator=generator) for _ in range(2))
    mask = torch.zeros(prompts, 1, SIZE, SIZE)
    mask[..., : SIZE // 2] = 1
    values = {
        "prompt": ["a cat", "two birds"][:prompts],
        "negative_prompt": ["ugly", "a red blot"][:prompts],
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "generator": torch.Generator().manual_seed(3),
        "output_type": "latent",
    }
    if "Img2Img" in name or "Inpaint" in name:
        values |= {"image": picture, "strength": 1.0}
    if "Inpaint" in name:
        values |= {"mask_image": mask, "height": SIZE, "width": SIZE}
    if "ControlNet" in name:
        values["control_image" if "Img2Img" in name or "Inpaint" in name else "image"] = hint
    if "Adapter" in name:
        values["image"] = list(hint) if prompts > 1 else hint
    return values | changes


def draw(pipe, **changes) -> torch.Tensor:
    """Latents of a short call."""
    return pipe(**arguments(type(pipe).__name__, **changes)).images


def low_rank(network: nn.Module, rank: int = 2, seed: int = 5, scale: float = 0.5) -> Deltas:
    """A random update of every Linear and Conv2d of a network."""
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    deltas = {}
    for path, layer in network.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            out, *into = layer.weight.shape
            ones = [1] * (len(into) - 1)
            fan_in = torch.Size(into).numel()
            down, up = gaussian(rank, *into) / fan_in**0.5, gaussian(out, rank, *ones) / rank**0.5
            deltas[path] = LowRank(down=down.to(layer.weight), up=up.to(layer.weight), scale=scale)
    return deltas


@torch.no_grad()
def merged(network: nn.Module, deltas: Deltas) -> nn.Module:
    """A copy of the network with the updates added to its weights, W + scale up down."""
    network = copy.deepcopy(network)
    for path, delta in deltas.items():
        weight = network.get_submodule(path).weight
        product = delta.up.double().flatten(1) @ delta.down.double().flatten(1)
        weight += (delta.scale * product).reshape(weight.shape).to(weight)
    return network


def negative(kind: str, pipe) -> tuple[Negative, nn.Module]:
    """A negative of the kind "lora" or "full" for a pipeline, and a network that computes it."""
    deltas = low_rank(pipe.unet)
    network = merged(pipe.unet, deltas)
    if kind == "lora":
        return Negative(source="a LoRA", deltas=deltas), network
    return Negative(source="full weights", network=network), network


class TwoBranches(nn.Module):
    """A denoiser for guided calls, in which each branch is computed by a network of its own."""

    def __init__(self, negative: nn.Module, positive: nn.Module) -> None:
        super().__init__()
        self.negative, self.positive = negative, positive

    config = property(lambda self: self.positive.config)
    dtype = property(lambda self: self.positive.dtype)
    device = property(lambda self: self.positive.device)
    add_embedding = property(lambda self: self.positive.add_embedding)

    def forward(
        self,
        sample,
        t,
        encoder_hidden_states,
        added_cond_kwargs=None,
        down_block_additional_residuals=None,
        mid_block_additional_residual=None,
        down_intrablock_additional_residuals=None,
        timestep_cond=None,
        cross_attention_kwargs=None,
        return_dict=True,
    ):
        assert t.ndim == 0
        outputs = []
        for half, network in enumerate((self.negative, self.positive)):

            def part_of(tensors, half=half):
                """This branch's rows of a tensor or a list of tensors."""
                if tensors is None or isinstance(tensors, torch.Tensor):
                    return None if tensors is None else tensors.chunk(2)[half]
                return [tensor.chunk(2)[half] for tensor in tensors]

            added = {
                name: part_of(value) if name != "image_embeds" else [part_of(embeds) for embeds in value]
                for name, value in (added_cond_kwargs or {}).items()
            }
            outputs.append(
                network(
                    part_of(sample),
                    t,
                    part_of(encoder_hidden_states),
                    added_cond_kwargs=added,
                    down_block_additional_residuals=part_of(down_block_additional_residuals),
                    mid_block_additional_residual=part_of(mid_block_additional_residual),
                    down_intrablock_additional_residuals=part_of(down_intrablock_additional_residuals),
                ).sample
            )
        assert return_dict is False
        return (torch.cat(outputs),)


def reference(name: str, negative: nn.Module, positive: nn.Module, **changes) -> torch.Tensor:
    """Latents of a short guided call whose branches `negative` and `positive` compute."""
    pipe = build(name)
    pipe.unet = TwoBranches(negative, positive)
    return draw(pipe, **changes)

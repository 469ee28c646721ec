"""The paper's uses of negative models on tiny networks, each against a loop of this file."""

from __future__ import annotations

import copy

import pytest
import stock
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from selfnpo_fast import attach_negative
from selfnpo_fast.negatives.load import Negative
from selfnpo_fast.negatives.low_rank import LowRank

SD, SDXL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
GUIDANCE, STEPS = 3.0, 3


def start() -> torch.Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(12))


def draw(pipe, prompt: str, **changes) -> torch.Tensor:
    values = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "latents": start(), "output_type": "latent"}
    return pipe(prompt, **(values | changes)).images


@torch.no_grad()
def loop(pipe, negative: nn.Module, prompt: str, negative_prompt: str = "", features=None) -> torch.Tensor:
    """DDIM (eta = 0) with p = p_neg + guidance_scale (p_pos - p_neg), one network for each branch.

    Returns latents (1, 4, 8, 8) float32; computed in float64, but for the networks.
    """
    xl = hasattr(pipe, "text_encoder_2")
    rows = []
    for text in (prompt, negative_prompt):
        if xl:
            embeds, zeros, pooled, zeros_pooled = pipe.encode_prompt(text, negative_prompt=None, device="cpu")
            if text == "":  # SDXL's pipeline takes zeros for an absent negative prompt
                embeds, pooled = zeros, zeros_pooled
            added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
            rows.append({"encoder_hidden_states": embeds, "added_cond_kwargs": added})
        else:
            rows.append({"encoder_hidden_states": pipe.encode_prompt(text, "cpu", 1, False)[0]})
    alphas_cumprod = pipe.scheduler.alphas_cumprod.double()
    pipe.scheduler.set_timesteps(STEPS)
    x = start().double()
    for t in pipe.scheduler.timesteps.tolist():
        extra = [{} if features is None else {"down_intrablock_additional_residuals": list(features)} for _ in rows]
        pos = pipe.unet(x.float(), t, **rows[0], **extra[0]).sample.double()
        neg = negative(x.float(), t, **rows[1], **extra[1]).sample.double()
        p = neg + GUIDANCE * (pos - neg)
        now, after = alphas_cumprod[t], alphas_cumprod[max(t - 1000 // STEPS, 0)]
        x0 = (x - (1 - now) ** 0.5 * p) / now**0.5
        x = after**0.5 * x0 + (1 - after) ** 0.5 * p
    return x.float()


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * theirs.abs().max().item())  # observed 6e-7


def perturbed(network: nn.Module, seed: int) -> nn.Module:
    """A copy with other weights, as after training: a fine-tune, or a negative."""
    network, generator = copy.deepcopy(network), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator)
    return network


def combined(base: nn.Module, finetune: nn.Module, negative: nn.Module, alpha: float, beta: float) -> nn.Module:
    """Eq. 7: theta + alpha eta + beta delta, eta = finetune - theta, delta = negative - theta."""
    result = copy.deepcopy(base)
    parts = (dict(network.named_parameters()) for network in (base, finetune, negative))
    base_of, finetune_of, negative_of = parts
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            theta, tuned, worse = (source[name].double() for source in (base_of, finetune_of, negative_of))
            parameter.copy_(theta + alpha * (tuned - theta) + beta * (worse - theta))
    return result


@pytest.mark.parametrize("name", [SD, SDXL])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_base_model_with_its_negative(name, kind):
    pipe = stock.build(name)
    given, network = stock.negative(kind, pipe)
    expected = loop(pipe, network, "a cat")
    with attach_negative(pipe, given):
        ours = draw(pipe, "a cat")
    assert_same(ours, expected)
    assert_same(draw(pipe, "a cat"), loop(pipe, pipe.unet, "a cat"))
    assert (ours - draw(pipe, "a cat")).abs().max() > 0.05 * expected.abs().max()


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_a_finetune_with_the_bases_negative_and_alpha(alpha):
    """At alpha 0 the negative is the base's. At 1 both branches carry the fine-tune.

    The branches differ by delta only then.
    """
    pipe = stock.build(SD)
    base = pipe.unet
    finetune, worse = perturbed(base, 1), perturbed(base, 2)
    network = combined(base, finetune, worse, alpha, 1.0)
    pipe.unet = finetune
    expected = loop(pipe, network, "a cat")
    with attach_negative(pipe, Negative(source="the base's negative", network=copy.deepcopy(network))):
        ours = draw(pipe, "a cat")
    assert_same(ours, expected)
    far = (ours - loop(pipe, worse, "a cat")).abs().max() > 0.05 * ours.abs().max()
    assert far == (alpha != 0)


@torch.no_grad()
def difference(finetune: UNet2DConditionModel, network: nn.Module) -> dict[str, LowRank]:
    """What of network - finetune lies in Linear and Conv2d weights, as updates of full rank."""
    deltas = {}
    for path, layer in finetune.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            change = (network.get_submodule(path).weight - layer.weight).double()
            out, *into = change.shape
            u, s, v = torch.linalg.svd(change.flatten(1), full_matrices=False)
            up = (u * s).reshape(out, -1, *[1] * (len(into) - 1))
            deltas[path] = LowRank(down=v.reshape(-1, *into).float(), up=up.float(), scale=1.0)
    return deltas


def test_alpha_through_one_backbone_gives_the_same_images():
    """Eq. 7 as an update of the fine-tune's layers.

    The update is theta + alpha eta + beta delta - (theta + eta).
    """
    pipe = stock.build(SD)
    base = pipe.unet
    finetune = stock.merged(base, stock.low_rank(base, seed=1))
    network = combined(base, finetune, stock.merged(base, stock.low_rank(base, seed=2)), 0.5, 0.8)
    pipe.unet = finetune
    with attach_negative(pipe, Negative(source="as updates", deltas=difference(finetune, network))):
        ours = draw(pipe, "a cat")
    assert_same(ours, loop(pipe, network, "a cat"))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_t2i_adapter(kind):
    pipe = stock.build("StableDiffusionAdapterPipeline")
    given, network = stock.negative(kind, pipe)
    picture = torch.rand(1, 3, stock.SIZE, stock.SIZE, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        features = pipe.adapter(picture)
    expected = loop(pipe, network, "a cat", features=features)
    with attach_negative(pipe, given):
        assert_same(draw(pipe, "a cat", image=picture), expected)
    assert (expected - loop(pipe, network, "a cat")).abs().max() > 0.05


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_unconditional_generation(kind):
    """The empty prompt on both branches: only the negative makes a difference."""
    pipe = stock.build(SD)
    given, network = stock.negative(kind, pipe)
    unguided = draw(pipe, "", guidance_scale=1.0)
    assert_same(draw(pipe, ""), unguided)
    with attach_negative(pipe, given):
        ours = draw(pipe, "")
    assert_same(ours, loop(pipe, network, ""))
    assert (ours - unguided).abs().max() > 0.05 * unguided.abs().max()


def test_the_negative_under_the_positives_own_prompt():
    """As in autoguidance: the prompt on both branches."""
    pipe = stock.build(SD)
    given, network = stock.negative("lora", pipe)
    with attach_negative(pipe, given):
        ours = draw(pipe, "a cat", negative_prompt="a cat")
    assert_same(ours, loop(pipe, network, "a cat", "a cat"))

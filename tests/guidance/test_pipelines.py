"""Each pipeline class with a negative attached: images, branches, and what is refused."""

from __future__ import annotations

import copy
import functools

import diffusers
import pytest
import stock
import tiny_pipelines
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from selfnpo_fast import attach_negative
from selfnpo_fast.guidance.pipelines import calling_pipeline, guided_family
from selfnpo_fast.models import FAMILIES
from selfnpo_fast.negatives.load import Negative
from selfnpo_fast.runtime.errors import UserError

KINDS = ["lora", "full"]
GUESS = ["StableDiffusionControlNetPipeline", "StableDiffusionXLControlNetPipeline"]
# One fast test compares the images of every class. In the other tests, variants of SDXL are slow.
CLASSES = [
    pytest.param(name, marks=pytest.mark.slow if "XL" in name and name != "StableDiffusionXLPipeline" else ())
    for name in stock.classes()
]
CASES = [(name, {}) for name in stock.classes()]
CASES += [(name, {"guess_mode": True}) for name in GUESS]
CASES += [(name, {"guidance_rescale": 0.7}) for name in ("StableDiffusionPipeline", "StableDiffusionXLPipeline")]
CASES += [(name, {"prompts": 2}) for name in ("StableDiffusionPipeline", "StableDiffusionXLAdapterPipeline")]


def identify(case) -> str:
    return case if isinstance(case, str) else "-".join(f"{key}_{value}" for key, value in case.items())


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def test_every_listed_class_is_covered_here():
    """The others are in test_attach_transformers.py."""
    listed = {name for family in FAMILIES.values() for name in family.guided_pipelines}
    assert set(stock.classes()) == listed - set(tiny_pipelines.CLASSES)


@functools.cache
def setting(name: str) -> tuple:
    """A pipeline of the class, and negatives of each kind for it.

    All tests share them, and none changes them.
    """
    pipe = stock.build(name)
    return pipe, {kind: stock.negative(kind, pipe)[0] for kind in KINDS}


@functools.cache
def by_hand(name: str, changes: tuple, exchanged: bool = False) -> torch.Tensor:
    """Images of a pipeline whose branches are two networks, also with the two exchanged."""
    pipe, negatives = setting(name)
    networks = [negatives["full"].network, pipe.unet]
    return stock.reference(name, *(networks[::-1] if exchanged else networks), **dict(changes))


@functools.cache
def plain_images(name: str, changes: tuple = ()) -> torch.Tensor:
    return stock.draw(stock.build(name), **dict(changes))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "changes"), CASES, ids=identify)
def test_images_are_those_of_two_networks(name, changes, kind):
    case = name, tuple(changes.items())
    pipe, negatives = setting(name)
    with attach_negative(pipe, negatives[kind]):
        ours = stock.draw(pipe, **changes)
    assert ours.isfinite().all()
    # Observed up to 9e-7: W x + B A x where the reference has (W + B A) x, and products whose
    # rounding depends on where in memory their operands lie.
    assert relative(ours, by_hand(*case)) < 1e-5
    # The comparison can fail: the stock images and those with exchanged branches differ.
    assert relative(plain_images(*case), by_hand(*case)) > 1e-2
    assert relative(by_hand(*case, exchanged=True), by_hand(*case)) > 1e-2
    assert relative(stock.draw(pipe, **changes), plain_images(*case)) < 1e-5, "detached, and nothing is left"


class Recorder:
    """Records the first call of a denoiser: its arguments, and its output for the whole batch."""

    def __init__(self, unet: torch.nn.Module) -> None:
        self.call = self.output = None
        self.hooks = [
            unet.register_forward_pre_hook(self.before, with_kwargs=True),
            unet.register_forward_hook(self.after),
        ]

    def before(self, unet, args, kwargs) -> None:
        if self.call is None:
            self.call = copy.deepcopy((args, kwargs))

    def after(self, unet, args, output) -> None:
        if self.output is None:
            self.output = output[0]

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def halves(value, half: int):
    """One half of the rows of every tensor."""
    if isinstance(value, torch.Tensor):
        return value.chunk(2)[half] if value.ndim else value
    if isinstance(value, dict):
        return {key: halves(part, half) for key, part in value.items()}
    return [halves(part, half) for part in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_the_positive_branch_is_bit_equal_to_the_unattached_one(name, kind):
    pipe, negatives = setting(name)
    recorder = Recorder(pipe.unet)
    with attach_negative(pipe, negatives[kind]):
        stock.draw(pipe)
    recorder.remove()
    args, kwargs = recorder.call
    positive = recorder.output.chunk(2)[1]
    assert len(recorder.output) == 2
    if kind == "full":  # the denoiser computes only the positive rows
        args, kwargs = halves(args, 1), halves(kwargs, 1)
    assert torch.equal(pipe.unet(*args, **kwargs)[0][-1:], positive)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CLASSES)
def test_a_negative_equal_to_the_base_gives_the_stock_images(name, kind):
    pipe, _ = setting(name)
    if kind == "full":
        negative = Negative(source="a copy", network=copy.deepcopy(pipe.unet))
    else:
        negative = Negative(source="nothing", deltas=stock.low_rank(pipe.unet, scale=0.0))
    with attach_negative(pipe, negative):
        # Observed 2e-6: the rows in two batches.
        assert relative(stock.draw(pipe), plain_images(name)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CLASSES)
def test_without_guidance_the_negative_is_not_evaluated(name, kind):
    """Also two unguided prompts, whose rows are no pair of branches."""
    pipe, negatives = setting(name)
    changes = {"guidance_scale": 1.0, "prompts": 2}
    with attach_negative(pipe, negatives[kind]):
        stock.draw(pipe)  # a guided call before, whose guidance scale the pipeline remembers
        rows = []
        hooks = [pipe.unet.conv_in.register_forward_hook(lambda layer, args, output: rows.append(len(output)))]
        if kind == "full":
            conv_in = negatives[kind].network.conv_in
            hooks.append(conv_in.register_forward_hook(lambda layer, args, output: rows.append("negative")))
        unguided = stock.draw(pipe, **changes)
    for hook in hooks:
        hook.remove()
    assert set(rows) == {2}
    assert relative(unguided, plain_images(name, tuple(changes.items()))) < 1e-5


class Reordered(StableDiffusionPipeline):
    """A user's class, which may do anything."""


def test_a_pipeline_of_an_unknown_class_is_refused_in_one_line():
    parts = setting("StableDiffusionPipeline")[0].components
    pipe = Reordered(**parts, requires_safety_checker=False)
    with pytest.raises(UserError, match=r"^pipe: Reordered is not supported: .* made from StableDiffusionPipeline"):
        attach_negative(pipe, stock.negative("lora", pipe)[0])
    assert not pipe.unet._forward_pre_hooks


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("StableDiffusionInstructPix2PixPipeline", "three ways"),
        ("StableDiffusionXLInstructPix2PixPipeline", "three ways"),
        ("LatentConsistencyModelPipeline", "its guidance scale is an input"),
        ("StableDiffusionPAGPipeline", "perturbed attention"),
        ("StableDiffusionXLControlNetPAGPipeline", "perturbed attention"),
        ("FluxFillPipeline", "its guidance scale is an input"),
        ("HunyuanVideoPipeline", "its guidance scale is an input"),
        ("WanVACEPipeline", "not known here"),
        ("StableDiffusionDepth2ImgPipeline", "not known here"),
    ],
)
def test_classes_known_not_to_fit_are_refused_with_the_reason(name, reason):
    pipe = getattr(diffusers, name).__new__(getattr(diffusers, name))
    with pytest.raises(UserError, match=f"^pipe: {name} is not supported: .*{reason}") as caught:
        guided_family(pipe)
    assert "\n" not in str(caught.value)


def test_what_is_no_pipeline_is_refused():
    with pytest.raises(UserError, match=r"^pipe: str is not supported"):
        attach_negative("runwayml/stable-diffusion-v1-5", "a negative")


def test_a_class_that_only_has_the_name_is_refused():
    false = type("StableDiffusionPipeline", (DiffusionPipeline,), {})
    with pytest.raises(UserError, match=r"^pipe: StableDiffusionPipeline is not supported"):
        guided_family(false.__new__(false))


def test_lcm_guidance_embeddings_are_refused():
    pipe = stock.build("StableDiffusionPipeline", time_cond_proj_dim=8)
    with pytest.raises(UserError, match=r"^pipe: its unet takes the guidance scale as an input"):
        attach_negative(pipe, stock.negative("lora", pipe)[0])
    assert not pipe.unet._forward_pre_hooks


def test_no_pipeline_is_calling_here():
    assert calling_pipeline() is None

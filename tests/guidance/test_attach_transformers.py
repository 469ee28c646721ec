"""A negative on the pipelines of diffusers' transformers, against a plain loop with two networks."""

from __future__ import annotations

import copy
import functools

import pytest
import stock
import tiny_pipelines
import torch
from torch import nn

from selfnpo_fast import attach_negative, detach_negative
from selfnpo_fast.models import FAMILIES, guided_family_of
from selfnpo_fast.models.call_rules import TwoCalls
from selfnpo_fast.negatives.load import Negative
from selfnpo_fast.negatives.low_rank import Deltas

KINDS = ["lora", "full"]
SOME = ["StableDiffusion3Pipeline", "WanPipeline two experts", "FluxImg2ImgPipeline", "ZImagePipeline"]
"""A case for each rule: the first half, two calls of two denoisers, two calls that say nothing of
themselves, the last half."""


def family(case: str):
    return guided_family_of(case.split()[0])


def names(case: str) -> list[str]:
    """The pipeline's attributes that hold its denoisers."""
    return ["transformer", "transformer_2"] if case.endswith("two experts") else ["transformer"]


def updates(case: str, network: nn.Module) -> Deltas:
    """A random update of every layer that a LoRA of this family may change."""
    flat = family(case).flat_layers
    deltas = stock.low_rank(network)
    return {path: delta for path, delta in deltas.items() if not path.startswith(flat)}


@functools.cache
def setting(case: str):
    """A pipeline, and by the denoiser's name: its update, and a network with the update merged."""
    pipe = tiny_pipelines.build(case)
    deltas = {name: updates(case, getattr(pipe, name)) for name in names(case)}
    networks = {name: stock.merged(getattr(pipe, name), deltas[name]) for name in names(case)}
    return pipe, deltas, networks


@functools.cache
def plain(case: str) -> torch.Tensor:
    """The stock pipeline's latents."""
    return tiny_pipelines.draw(setting(case)[0], case)


@functools.cache
def by_two_networks(case: str) -> torch.Tensor:
    """Latents of the plain loop with two networks."""
    pipe, _, networks = setting(case)
    other = tiny_pipelines.build(case)
    for name in names(case):
        setattr(other, name, tiny_pipelines.RowByRow(getattr(pipe, name), networks[name]))
    return tiny_pipelines.draw(other, case)


def attach(case: str, kind: str, pipe=None):
    own, deltas, networks = setting(case)
    if kind == "lora":
        negative = {name: Negative(source="a LoRA", deltas=deltas[name]) for name in names(case)}
    else:
        negative = dict(networks)
    return attach_negative(pipe or own, negative if len(negative) > 1 else negative["transformer"])


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-6 * theirs.abs().max().item())


def assert_clean(pipe, case: str) -> None:
    for name in names(case):
        network = getattr(pipe, name)
        assert not network._forward_hooks
        assert not network._forward_pre_hooks
        assert "_call_impl" not in vars(network)
        assert not [key for key in vars(network) if "negative" in key]
        assert not [key for key, _ in network.named_modules() if "negative" in key or "low_rank" in key]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", tiny_pipelines.CASES)
def test_attached_equals_the_plain_loop_and_detached_the_stock_pipeline(case, kind):
    pipe = setting(case)[0]
    before, expected = plain(case), by_two_networks(case)
    with attach(case, kind):
        assert_same(tiny_pipelines.draw(pipe, case), expected)
    assert (expected - before).abs().max() > 0.1 * before.abs().max()
    assert_clean(pipe, case)
    assert torch.equal(tiny_pipelines.draw(pipe, case), before)


class Recorder:
    """The calls of a network, with copies of their arguments."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.calls = network, []
        self.hooks = [
            network.register_forward_pre_hook(self.before, with_kwargs=True),
            network.register_forward_hook(self.after),
        ]

    def before(self, network, args, kwargs) -> None:
        self.arguments = copy.deepcopy((args, kwargs))

    def after(self, network, args, output) -> None:
        self.calls.append((*self.arguments, output[0]))

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def is_negative(words) -> bool:
    """Whether a call's text, of one row, is a negative prompt's."""
    rows = tiny_pipelines.RowByRow("positive", "negative")
    return rows.of(words) == "negative"


def positive_rows(output, words) -> list[torch.Tensor]:
    return [row for row, text in zip(output, words, strict=True) if not is_negative(text)]


@pytest.mark.parametrize("case", tiny_pipelines.CASES)
@torch.no_grad()
def test_the_positive_rows_are_bit_equal_to_the_unattached_ones(case):
    """Each call is made again without the negative."""
    pipe = setting(case)[0]
    recorders = [Recorder(getattr(pipe, name)) for name in names(case)]
    with attach(case, "lora"):
        tiny_pipelines.draw(pipe, case)
    compared = 0
    for recorder in recorders:
        recorder.remove()
        for args, kwargs, output in recorder.calls:
            words = args[2] if args else kwargs["encoder_hidden_states"]
            again = positive_rows(recorder.network(*args, **kwargs)[0], words)
            for ours, theirs in zip(positive_rows(output, words), again, strict=True):
                assert torch.equal(ours, theirs)
                compared += 1
    steps = 3 if case.startswith("Wan") else 2
    assert compared == 2 * steps * (2 if case.endswith("skipped layers") else 1)


@pytest.mark.parametrize("case", tiny_pipelines.CASES)
@torch.no_grad()
def test_a_second_network_computes_the_negative_rows_and_the_denoiser_the_others(case):
    """Counted: no row is computed twice, and the denoiser's are bit-equal to those without the
    negative."""
    pipe, _, networks = setting(case)
    recorders = {name: (Recorder(getattr(pipe, name)), Recorder(networks[name])) for name in names(case)}
    with attach(case, "full"):
        for positive, _ in recorders.values():  # behind the handle's hooks: what the denoiser itself is given
            positive.remove()
        inner = {name: Inner(getattr(pipe, name)) for name in names(case)}
        tiny_pipelines.draw(pipe, case)
    for name, (_, negative) in recorders.items():
        negative.remove()
        inner[name].remove()
        texts = [is_negative(row) for args, kwargs, _ in negative.calls for row in _texts(args, kwargs)]
        assert texts
        assert all(texts)
        steps = len(texts) // 2
        assert inner[name].rows == 2 * steps * (2 if case.endswith("skipped layers") else 1)


def _texts(args, kwargs):
    return args[2] if args else kwargs["encoder_hidden_states"]


class Inner:
    """The rows of a denoiser's final layer."""

    def __init__(self, network: nn.Module) -> None:
        self.rows = 0
        layer = next(getattr(network, name) for name in ("proj_out", "all_final_layer") if hasattr(network, name))
        layer = layer["2-1"] if isinstance(layer, nn.ModuleDict) else layer
        self.hook = layer.register_forward_hook(self.count)

    def count(self, layer, args, output) -> None:
        self.rows += len(output)

    def remove(self) -> None:
        self.hook.remove()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", tiny_pipelines.CLASSES)
def test_without_guidance_the_negative_is_not_used(case, kind):
    pipe = setting(case)[0]
    scale = "true_cfg_scale" if case.startswith(("Flux", "Qwen")) else "guidance_scale"
    changes = {scale: 0.0 if case == "ZImagePipeline" else 1.0}
    before = tiny_pipelines.draw(pipe, case, **changes)
    with attach(case, kind):
        assert torch.equal(tiny_pipelines.draw(pipe, case, **changes), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", SOME)
def test_offloaded_as_whole_models_it_draws_the_same_and_moves_along(case, kind):
    pipe = tiny_pipelines.build(case)
    pipe.enable_model_cpu_offload(device="cpu")
    with attach(case, kind, pipe):
        for _ in range(2):
            assert_same(tiny_pipelines.draw(pipe, case), by_two_networks(case))
        pipe.enable_model_cpu_offload(device="cpu")
        assert_same(tiny_pipelines.draw(pipe, case), by_two_networks(case))
    assert_same(tiny_pipelines.draw(pipe, case), plain(case))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["StableDiffusion3Pipeline", "FluxPipeline"])
def test_compiled(case, kind):
    pipe = tiny_pipelines.build(case)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with attach(case, kind, pipe):
        assert_same(tiny_pipelines.draw(pipe, case), by_two_networks(case))
    assert_same(tiny_pipelines.draw(pipe, case), plain(case))


def test_compiled_in_place_full_weights_are_right_too():
    """torch calls the compiled function then, past what spares the denoiser the negative calls."""
    pipe = tiny_pipelines.build("FluxPipeline")
    pipe.transformer.compile(backend="eager")
    with attach("FluxPipeline", "full", pipe):
        assert_same(tiny_pipelines.draw(pipe, "FluxPipeline"), by_two_networks("FluxPipeline"))


def test_every_class_is_a_case_and_every_argument_is_named():
    """A new argument of a denoiser would be refused next to full weights where it has rows."""
    import inspect

    for name in tiny_pipelines.CLASSES:
        one = FAMILIES[family(name).pipeline_class]
        if isinstance(one.call_rule, TwoCalls):
            continue  # whole calls: nothing is cut
        found = set(inspect.signature(type(setting(name)[0].transformer).forward).parameters) - {"self"}
        known = {row.partition(".")[0] for row in one.row_names | one.not_rows | one.list_rows} | {one.input_name}
        assert found - known <= {
            *("return_dict", "attention_kwargs", "joint_attention_kwargs", "num_frames", "height", "width"),
            *("skip_layers", "patch_size", "f_patch_size"),
            *("controlnet_block_samples", "siglip_feats", "image_noise_mask"),  # Z-Image's kin, which are not listed
        }


def test_detached_by_the_pipeline_alone():
    case = "WanPipeline two experts"
    pipe = setting(case)[0]
    attach(case, "lora")
    assert detach_negative(pipe)
    assert not detach_negative(pipe)
    assert_clean(pipe, case)

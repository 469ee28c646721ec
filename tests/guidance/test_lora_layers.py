"""Low-rank layers on one backbone: equal to PEFT's mixed batches, compiled, threaded, removed."""

from __future__ import annotations

import copy
import functools
import threading
from pathlib import Path

import peft
import pytest
import stock
import tiny
import torch
from diffusers.models.attention_processor import FusedAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import nn

from selfnpo_fast.guidance.lora_backbone import install
from selfnpo_fast.guidance.lora_layers import LowRankConv2d, LowRankLinear, Rows
from selfnpo_fast.negatives.low_rank import Deltas, LowRank
from selfnpo_fast.runtime.errors import UserError

ROWS = 4


def unet(dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    torch.manual_seed(0)
    return stock.randomised(tiny.unet(**changes), 0).to(dtype)


@torch.no_grad()
def output(network, dtype: torch.dtype = torch.float32, rows: int = ROWS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 4, 8, 8, generator=generator).to(dtype)
    text = torch.randn(rows, 12, tiny.WIDTH, generator=generator).to(dtype)
    return network(x, torch.tensor(300), text).sample


def under_peft(network: nn.Module, deltas: Deltas) -> nn.Module:
    """PEFT's own layers with the same updates, for its mixed-batch mode."""
    rank = next(iter(deltas.values())).rank
    config = peft.LoraConfig(r=rank, lora_alpha=0.5 * rank, target_modules=list(deltas))
    model = peft.LoraModel(network, config, "negative")
    for path, delta in deltas.items():
        layer = network.get_submodule(path)
        layer.lora_A["negative"].weight.data.copy_(delta.down)
        layer.lora_B["negative"].weight.data.copy_(delta.up)
        assert layer.scaling["negative"] == delta.scale
    return model.eval()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
@torch.no_grad()
def test_every_layer_is_equal_to_pefts_in_a_mixed_batch(dtype, tolerance):
    """Layer by layer, so that only one layer's rounding is seen."""
    network = unet(dtype)
    deltas = stock.low_rank(network)
    mixed = under_peft(copy.deepcopy(network), deltas).model
    backbone = install(network, deltas)
    generator, names = torch.Generator().manual_seed(2), ["negative", "negative", "__base__", "__base__"]
    kinds = set()
    for path in deltas:
        layer = network.get_submodule(path)
        if isinstance(layer, nn.Conv2d):
            shape = (ROWS, layer.in_channels, 6, 6)
        else:
            shape = (ROWS, layer.in_features) if "time" in path else (ROWS, 5, layer.in_features)
        x = torch.randn(shape, generator=generator, dtype=dtype)
        with backbone.rows(Rows.FIRST_HALF):
            ours = layer(x)
        theirs = mixed.get_submodule(path)(x, adapter_names=names)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())
        assert torch.equal(ours[2:], nn.Module.__call__(mixed.get_submodule(path).base_layer, x)[2:])
        kinds.add(type(layer))
    assert kinds == {LowRankLinear, LowRankConv2d}


@torch.no_grad()
def test_the_whole_network_is_equal_to_pefts_in_a_mixed_batch():
    """PEFT's hooks pass each row's adapter to the layers; time embeddings are float32 in both."""
    network = unet(torch.float64)
    deltas = stock.low_rank(network)
    mixed = under_peft(copy.deepcopy(network), deltas)
    names = ["negative", "negative", "__base__", "__base__"]
    with mixed._enable_peft_forward_hooks(adapter_names=names):
        theirs = output(mixed.model, torch.float64)
    with install(network, deltas).rows(Rows.FIRST_HALF):
        ours = output(network, torch.float64)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10 * theirs.abs().max().item())


@pytest.mark.parametrize("kernel", [dict(kernel_size=3, padding=1), dict(kernel_size=3, stride=2), dict(kernel_size=1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_a_convolution_adds_its_merged_update(kernel, layout):
    torch.manual_seed(0)
    holder = nn.Sequential(nn.Conv2d(4, 6, **kernel)).double()
    deltas, x = stock.low_rank(holder), torch.randn(2, 4, 9, 9, dtype=torch.float64).to(memory_format=layout)
    whole = stock.merged(holder, deltas)(x)
    with install(holder, deltas).rows(Rows.ALL):
        torch.testing.assert_close(holder(x), whole, rtol=0, atol=1e-13)


@torch.no_grad()
def test_rows_that_are_not_chosen_are_bit_equal_to_the_plain_network():
    network = unet()
    plain = output(network)
    backbone = install(network, stock.low_rank(network))
    assert torch.equal(output(network), plain)
    with backbone.rows(Rows.FIRST_HALF):
        first = output(network)
        with backbone.rows(Rows.ALL):
            everywhere = output(network)
        assert torch.equal(output(network), first)
    assert torch.equal(first[2:], plain[2:])
    assert (first[:2] - plain[:2]).abs().max() > 0.1
    torch.testing.assert_close(everywhere[:2], first[:2])
    assert torch.equal(output(network), plain)
    with pytest.raises(RuntimeError, match="on purpose"), backbone.rows(Rows.ALL):
        raise RuntimeError("on purpose")
    assert torch.equal(output(network), plain)


def test_each_thread_has_its_own_rows():
    network = unet()
    plain = output(network)
    backbone = install(network, stock.low_rank(network))
    choices = [Rows.NONE, Rows.FIRST_HALF, Rows.ALL] * 2
    expected = {}
    for choice in Rows:
        with backbone.rows(choice):
            expected[choice] = output(network)
    start, wrong = threading.Barrier(len(choices)), []

    def draw(choice: Rows) -> None:
        start.wait()
        for _ in range(4):
            with backbone.rows(choice):
                if not torch.equal(output(network), expected[choice]):
                    wrong.append(choice)

    threads = [threading.Thread(target=draw, args=(choice,)) for choice in choices]
    with backbone.rows(Rows.ALL):  # a new thread starts at NONE for any choice of this one
        fresh = []
        thread = threading.Thread(target=lambda: fresh.append(output(network)))
        thread.start()
        thread.join()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert torch.equal(fresh[0], plain)


class Block(nn.Module):
    """A convolution and a Linear, as in the layers of a denoiser; quick to compile."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear = nn.Conv2d(4, 8, 3, padding=1), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.conv(x).flatten(2).transpose(1, 2))


@torch.no_grad()
def block_output(network) -> torch.Tensor:
    return network(torch.randn(ROWS, 4, 8, 8, generator=torch.Generator().manual_seed(1)))


shallow = functools.partial(unet, **tiny.SHALLOW)
COMPILED = [
    pytest.param(Block, block_output, "eager", id="block-eager"),
    pytest.param(Block, block_output, "aot_eager", id="block-aot_eager"),
    pytest.param(shallow, output, "aot_eager", id="unet-aot_eager", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("make", "call", "backend"), COMPILED)
def test_one_whole_graph_for_each_choice(make, call, backend):
    """Installed after a compiled call: the graph of the plain layers must not be used again."""
    torch._dynamo.reset()
    network = make()
    graphs = 0

    def count(graph, inputs):
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(network, backend=count, fullgraph=True)
    plain = call(compiled)
    assert graphs == 1
    backbone = install(network, stock.low_rank(network))
    results = {}
    for round_ in range(2):
        for choice in Rows:
            with backbone.rows(choice):
                results[choice] = call(compiled)
                torch.testing.assert_close(results[choice], call(network), rtol=0, atol=1e-5)
        assert graphs == 1 + len(Rows), round_
    assert (results[Rows.FIRST_HALF][:2] - plain[:2]).abs().max() > 0.1
    assert (results[Rows.FIRST_HALF][2:] - results[Rows.ALL][2:]).abs().max() > 0.1
    torch.testing.assert_close(results[Rows.NONE], plain, rtol=0, atol=1e-5)
    elsewhere = []

    def draw() -> None:
        with backbone.rows(Rows.FIRST_HALF):
            elsewhere.append(call(compiled))

    thread = threading.Thread(target=draw)
    thread.start()
    thread.join()
    assert torch.equal(elsewhere[0], results[Rows.FIRST_HALF])
    assert graphs == 1 + len(Rows)
    backbone.remove()
    torch.testing.assert_close(call(compiled), plain, rtol=0, atol=1e-5)


def test_it_costs_only_the_bytes_of_the_lora():
    network = unet()
    before = {name: p.data_ptr() for name, p in network.named_parameters()}
    deltas = stock.low_rank(network)
    backbone = install(network, deltas)
    assert {name: p.data_ptr() for name, p in network.named_parameters()} == before
    added = [buffer for name, buffer in network.named_buffers() if "low_rank" in name]
    lora = sum(delta.down.nbytes + delta.up.nbytes for delta in deltas.values())
    assert backbone.nbytes == sum(buffer.untyped_storage().nbytes() for buffer in added) == lora


def test_saved_weights_are_those_of_the_plain_network(tmp_path: Path):
    network = unet()
    network.save_pretrained(tmp_path / "plain")
    install(network, stock.low_rank(network))
    network.save_pretrained(tmp_path / "with")
    names = sorted(file.name for file in (tmp_path / "plain").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "with").iterdir())
    for name in names:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "with" / name).read_bytes()


def test_the_update_follows_the_networks_precision():
    network = unet()
    install(network, stock.low_rank(network))
    network.to(torch.bfloat16)
    assert {buffer.dtype for name, buffer in network.named_buffers() if "low_rank" in name} == {torch.bfloat16}


@torch.no_grad()
def test_under_autocast_the_update_is_added_in_the_low_precision():
    layer = nn.Sequential(nn.Linear(8, 8))
    deltas, x = stock.low_rank(layer), torch.randn(2, 3, 8)
    expected = stock.merged(layer, deltas)(x)
    with install(layer, deltas).rows(Rows.ALL), torch.autocast("cpu", torch.bfloat16):
        ours = layer(x)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), expected, rtol=0, atol=0.02 * expected.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("order", ["style first", "negative first"])
def test_a_style_lora_under_peft_and_ours_add_up(order):
    network = unet(torch.float64)
    style, deltas = stock.low_rank(network, seed=11), stock.low_rank(network, seed=12)
    expected = output(stock.merged(stock.merged(network, style), deltas), torch.float64)
    backbone = None
    if order == "negative first":
        backbone = install(network, deltas)
    styled = under_peft(network, style)
    backbone = backbone or install(network, deltas)
    with backbone.rows(Rows.ALL):
        torch.testing.assert_close(output(network, torch.float64), expected, rtol=0, atol=1e-10 * expected.abs().max())
    backbone.remove()
    theirs = output(stock.merged(styled.unload(), style), torch.float64)
    assert torch.equal(output(unet(torch.float64), torch.float64), output(network, torch.float64))
    assert (theirs - expected).abs().max() > 0.1


def test_removed_layers_are_the_plain_ones_again():
    network = unet()
    kinds = {name: type(module) for name, module in network.named_modules()}
    buffers, plain = dict(network.named_buffers()), output(network)
    backbone = install(network, stock.low_rank(network))
    assert {name: type(module) for name, module in network.named_modules()} != kinds
    backbone.remove()
    backbone.remove()
    assert {name: type(module) for name, module in network.named_modules()} == kinds
    assert dict(network.named_buffers()).keys() == buffers.keys()
    assert torch.equal(output(network), plain)


def one(layer: nn.Module, **changes) -> tuple[nn.Module, Deltas]:
    holder = nn.ModuleDict({"layer": layer, "good": nn.Linear(4, 4)})
    deltas = stock.low_rank(nn.ModuleDict({"layer": nn.Linear(4, 4)})) | stock.low_rank(
        nn.ModuleDict({"good": holder["good"]})
    )
    return holder, deltas | changes


def low(*shapes: tuple[int, ...]) -> LowRank:
    return LowRank(down=torch.ones(shapes[0]), up=torch.ones(shapes[1]), scale=1.0)


def half_precision_float8() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    return layer


def offloaded() -> nn.Module:
    from accelerate.hooks import ModelHook, add_hook_to_module

    return add_hook_to_module(nn.Linear(4, 4), ModelHook())


def patched() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: 2 * x
    return layer


MISTAKES = {
    "no layer": (
        lambda: one(nn.Linear(4, 4), elsewhere=low((1, 4), (4, 1))),
        "elsewhere, which the model does",
    ),
    "other width": (lambda: one(nn.Linear(5, 4)), r"has shapes \(2, 4\) and \(4, 2\), the model needs \(2, 5\)"),
    "a convolution": (lambda: one(nn.Conv2d(4, 4, 3)), r"the model needs \(2, 4, 3, 3\) and \(4, 2, 1, 1\)"),
    "grouped": (lambda: one(nn.Conv2d(4, 4, 1, groups=2)), "grouped convolution"),
    "another kind": (lambda: one(nn.LayerNorm(4)), "layer is a LayerNorm"),
    "a subclass": (lambda: one(nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4)), "NonDynamicallyQuantizable"),
    "float8": (lambda: one(half_precision_float8()), "float8_e4m3fn weights"),
    "offloaded": (lambda: one(offloaded()), "offloaded on its own; attach the negative first"),
    "patched": (lambda: one(patched()), "the forward of layer was replaced"),
    "on meta": (lambda: one(nn.Linear(4, 4, device="meta")), "offloaded on its own"),
    "nothing": (lambda: (nn.ModuleDict(), {}), "holds no layer"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_does_not_fit_is_refused_and_nothing_is_changed(mistake):
    make, message = MISTAKES[mistake]
    holder, deltas = make()
    with pytest.raises(UserError, match=f"^negative: .*{message}") as caught:
        install(holder, deltas)
    assert "\n" not in str(caught.value)
    assert not any(isinstance(module, LowRankLinear | LowRankConv2d) for module in holder.modules())
    assert not list(holder.buffers())


def test_two_updates_of_one_layer_are_refused():
    network = unet()
    backbone = install(network, stock.low_rank(network))
    with pytest.raises(UserError, match="already carries a negative's update"):
        install(network, stock.low_rank(network))
    backbone.remove()
    install(network, stock.low_rank(network))


def test_one_row_for_both_branches_is_refused():
    """As of a network that embeds one timestep for the whole batch: its update would be lost."""
    layer = nn.Sequential(nn.Linear(4, 4))
    backbone = install(layer, stock.low_rank(layer))
    with backbone.rows(Rows.ALL):
        layer(torch.ones(1, 4))
    with backbone.rows(Rows.FIRST_HALF), pytest.raises(UserError, match=r"was given 1 rows for both") as caught:
        layer(torch.ones(1, 4))
    assert "\n" not in str(caught.value)


# Attentions whose projections are fused: the layers that the LoRA changes are out of use.


def fuse_unet(network: nn.Module) -> None:
    network.fuse_qkv_projections()


class FusedUnderAnotherName(FusedAttnProcessor2_0):
    """A user's processor."""


FusedUnderAnotherName.__name__ = "QuickProcessor"


def fuse_unet_by_hand(network: nn.Module) -> None:
    network.fuse_qkv_projections()
    network.set_attn_processor(FusedUnderAnotherName())


class TinyFlux(nn.Module):
    """An attention that goes by a flag, as those of diffusers' transformers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = FluxAttention(query_dim=8, heads=2, dim_head=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x)

    def unfuse_qkv_projections(self) -> None:
        self.attn.unfuse_projections()


class HomeMade(TinyFlux):
    """An attention of no library, which uses what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({f"to_{name}": nn.Linear(8, 8) for name in "qkv"})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if "to_qkv" in self.attn:
            q, k, v = self.attn["to_qkv"](x).chunk(3, dim=-1)
        else:
            q, k, v = (self.attn[f"to_{name}"](x) for name in "qkv")
        return nn.functional.scaled_dot_product_attention(q, k, v)

    def fuse(self) -> None:
        self.attn["to_qkv"] = fused = nn.Linear(8, 24)
        for name in ("weight", "bias"):
            parts = [getattr(self.attn[f"to_{part}"], name).data for part in "qkv"]
            getattr(fused, name).data = torch.cat(parts)

    def unfuse_qkv_projections(self) -> None:
        del self.attn["to_qkv"]


@torch.no_grad()
def tokens_output(network: nn.Module) -> torch.Tensor:
    return network(torch.randn(ROWS, 5, 8, generator=torch.Generator().manual_seed(3)))


FUSED = {
    "unet": (unet, fuse_unet, output),
    "unet, a user's processor": (unet, fuse_unet_by_hand, output),
    "flag": (TinyFlux, lambda network: network.attn.fuse_projections(), tokens_output),
    "home-made": (HomeMade, HomeMade.fuse, tokens_output),
}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("case", FUSED)
def test_fused_projections_are_refused_when_they_are_used(case, order):
    make, fuse, call = FUSED[case]
    network = make()
    plain = call(network)
    deltas = stock.low_rank(network)
    clone = copy.deepcopy(network)
    with install(clone, deltas).rows(Rows.FIRST_HALF):
        expected = call(clone)
    assert not torch.equal(expected, plain)
    if order == "before":
        fuse(network)
        if case in ("unet", "flag"):  # where it is certain, nothing is attached
            with pytest.raises(UserError, match=r"^negative: the attention projections are fused"):
                install(network, deltas)
            network.unfuse_qkv_projections()
    backbone = install(network, deltas)
    if order == "after":
        fuse(network)
    if order == "after" or case not in ("unet", "flag"):
        with pytest.raises(UserError, match=r"projections are fused.*call unfuse") as caught:
            with backbone.rows(Rows.FIRST_HALF):
                call(network)
        assert "\n" not in str(caught.value)
        torch.testing.assert_close(call(network), plain, rtol=0, atol=1e-5)  # no rows, nothing lost
        network.unfuse_qkv_projections()
    with backbone.rows(Rows.FIRST_HALF):
        assert torch.equal(call(network), expected)
    backbone.remove()
    fuse(network)
    torch.testing.assert_close(call(network), plain, rtol=0, atol=1e-5)


def test_fused_projections_that_the_lora_does_not_change_are_no_obstacle():
    network = unet()
    network.fuse_qkv_projections()
    deltas = {path: delta for path, delta in stock.low_rank(network).items() if "attn" not in path}
    before = output(network)
    with install(network, deltas).rows(Rows.FIRST_HALF):
        assert not torch.equal(output(network), before)


def test_fused_layers_may_carry_the_update_themselves():
    """An attention that has no other projections."""
    network = HomeMade()
    network.fuse()
    deltas = {path: delta for path, delta in stock.low_rank(network).items() if "qkv" in path}
    expected = tokens_output(stock.merged(network, deltas))
    with install(network, deltas).rows(Rows.ALL):
        torch.testing.assert_close(tokens_output(network), expected)


# Layers that change after the update was installed.


def test_a_layer_that_was_replaced_is_noticed():
    network = unet()
    backbone = install(network, stock.low_rank(network))
    backbone.check()
    before = network.mid_block.attentions[0].transformer_blocks[0].attn1.to_k
    network.mid_block.attentions[0].transformer_blocks[0].attn1.to_k = nn.Linear(16, 16, bias=False)
    with pytest.raises(UserError, match=r"^negative: mid_block.*to_k was replaced .* detach_negative\(pipe\)"):
        backbone.check()
    network.mid_block.attentions[0].transformer_blocks[0].attn1.to_k = before
    backbone.check()
    under_peft(network, stock.low_rank(network, seed=11))  # a style LoRA keeps the layers
    backbone.check()


def test_a_forward_around_a_layers_own_is_said_once(caplog):
    network = unet()
    backbone = install(network, stock.low_rank(network))
    forward = network.conv_in.forward
    network.conv_in.forward = lambda x: forward(x)
    backbone.check()
    backbone.check()
    (record,) = [record for record in caplog.records if record.name == "selfnpo"]
    assert record.message.startswith("negative: the forward of conv_in was replaced")

"""The choice of attention kernels: counted in the layers and in the operations that they run."""

from __future__ import annotations

import json

import pytest
import tiny
import tiny_networks
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models import attention_dispatch
from diffusers.models.attention_processor import Attention, AttnProcessor, XFormersAttnProcessor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from selfnpo_fast import GuidedSampler, train
from selfnpo_fast.runtime import attention
from selfnpo_fast.runtime.attention import set_attention
from selfnpo_fast.runtime.errors import UserError

LAYERS = {"cogvideox": 2, "sd3": 2, "wan": 4, "unet": 8}


class FlashCalls(TorchDispatchMode):
    """Counts the forward calls of torch's FlashAttention kernel, in any thread that enters it."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "flash_attention" in str(func) and "backward" not in str(func)
        return func(*args, **(kwargs or {}))


def network_of(name: str) -> tuple[torch.nn.Module, dict]:
    if name != "unet":
        return tiny_networks.new(name)
    torch.manual_seed(0)
    x, t, rows = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 12, tiny.WIDTH)
    return tiny.unet(), {"sample": x, "timestep": t, "encoder_hidden_states": rows, "return_dict": False}


def switches() -> tuple:
    """All of the process that could choose a kernel."""
    torch_s = torch.backends.cuda
    return (
        *(torch_s.flash_sdp_enabled(), torch_s.mem_efficient_sdp_enabled(), torch_s.math_sdp_enabled()),
        attention_dispatch._AttentionBackendRegistry.get_active_backend()[0],
    )


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_flash_is_every_layer_s_kernel(name, caplog):
    """Torch is told to use no fused kernel: layers with the choice use theirs all the same, and the
    others do not."""
    caplog.set_level("INFO")
    network, inputs = network_of(name)
    with sdpa_kernel(SDPBackend.MATH), FlashCalls() as calls:
        (expected,) = network(**inputs)
        assert calls.count == 0
        before = switches()
        assert set_attention(network, "flash") == LAYERS[name]
        calls.count = 0
        (out,) = network(**inputs)
        assert calls.count == LAYERS[name]
        assert switches() == before
        assert set_attention(network, "sdpa") == LAYERS[name]
        (again,) = network(**inputs)
        assert calls.count == LAYERS[name], "sdpa leaves the kernel to torch"
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    assert torch.equal(again, expected)
    assert f"attention: flash in {LAYERS[name]} of {LAYERS[name]} layers" in caplog.messages


def test_no_switch_of_the_process_changes_while_a_layer_computes():
    network, inputs = network_of("sd3")
    set_attention(network, "flash")
    before, seen = switches(), []
    for part in network.modules():
        if isinstance(part, Attention):
            part.to_out[0].register_forward_pre_hook(lambda *_: seen.append(switches()))
    network(**inputs)
    assert seen == [before] * 2


@pytest.mark.parametrize("name", ["cogvideox", "unet"])
def test_recomputation_takes_the_same_kernel(name):
    """Gradient checkpointing runs each block again, under whatever holds then."""
    network, inputs = network_of(name)
    (expected,) = network.train()(**inputs)
    expected.square().sum().backward()
    gradients = {path: p.grad for path, p in network.named_parameters()}
    network.zero_grad(set_to_none=True)
    network.enable_gradient_checkpointing()
    set_attention(network, "flash")
    with FlashCalls() as calls:
        (out,) = network(**inputs)
        assert calls.count == LAYERS[name]
        out.square().sum().backward()
    # The mid block of a UNet computes its attention once: diffusers keeps it.
    assert calls.count > LAYERS[name] if name == "unet" else calls.count == 2 * LAYERS[name]
    for path, p in network.named_parameters():
        torch.testing.assert_close(p.grad, gradients[path], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_compiled_block_takes_the_same_kernel():
    torch.compiler.reset()
    network, inputs = network_of("sd3")
    (expected,) = network(**inputs)
    set_attention(network, "flash")
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    for block in network.transformer_blocks:
        block.compile(fullgraph=True, backend=backend)
    (out,) = network(**inputs)
    torch.testing.assert_close(out, expected)
    assert graphs
    for operations in graphs:
        assert sum("flash_attention" in operation for operation in operations) == 1
        assert not any("scaled_dot_product_attention" in operation for operation in operations)


def test_layers_without_torch_s_attention_get_it():
    network, inputs = network_of("unet")
    network.set_attn_processor(AttnProcessor())
    (expected,) = network(**inputs)
    assert set_attention(network, "sdpa") == LAYERS["unet"]
    torch.testing.assert_close(network(**inputs)[0], expected, atol=2e-6, rtol=1e-5)


def test_what_is_refused():
    network, _ = network_of("sd3")
    with pytest.raises(UserError, match=r"^engine.attention: sdpa reaches no attention layer of Linear; use auto$"):
        set_attention(torch.nn.Linear(2, 2), "sdpa")
    wan, _ = network_of("wan")
    with pytest.raises(UserError, match=r"^engine.attention: flash switches .*rollout.overlap.* use sdpa$"):
        set_attention(wan, "flash", threads=True)
    assert set_attention(network, "flash", threads=True) == 2, "nothing is switched for other threads here"
    assert "bf16 or fp16" in attention.why_not("flash", "cuda", torch.float32)
    assert attention.why_not("flash", "cuda", torch.bfloat16) is None
    # The text's mask, which the kernel does not take.
    network, inputs = network_of("unet")
    set_attention(network, "flash")
    with pytest.raises(UserError, match=r"^attention: flash takes neither masks .*; use sdpa$"):
        network(**inputs, encoder_attention_mask=torch.ones(2, 12))


def test_xformers_without_its_package(monkeypatch):
    network, _ = network_of("unet")
    with pytest.raises(UserError, match=r"^attention: xformers has kernels for GPUs only, not for cpu; use sdpa$"):
        set_attention(network, "xformers", field="attention")
    monkeypatch.setattr(attention, "why_not", lambda *_: None)  # as on a GPU
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_XFORMERS_ATTN", False)
    with pytest.raises(UserError, match=r"^engine.attention: xformers needs the package xformers.*pip install"):
        set_attention(network, "xformers")


def test_xformers_is_set_per_layer(monkeypatch):
    """As on a GPU with the package: diffusers' backend, diffusers' processor of a UNet, or none."""
    monkeypatch.setattr(attention, "why_not", lambda *_: None)
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_XFORMERS_ATTN", True)
    before = switches()
    wan, _ = network_of("wan")
    assert set_attention(wan, "xformers") == 4
    backends = {part.processor._attention_backend for part in wan.modules() if hasattr(part, "processor")}
    assert backends == {attention_dispatch.AttentionBackendName.XFORMERS}
    monkeypatch.setattr(
        Attention, "set_use_memory_efficient_attention_xformers",
        lambda self, on: self.set_processor(XFormersAttnProcessor()),
    )  # fmt: skip
    unet, _ = network_of("unet")
    assert set_attention(unet, "xformers") == LAYERS["unet"]
    video, _ = network_of("cogvideox")
    with pytest.raises(UserError, match="xformers reaches none of the 2 attention layers of CogVideoXTransformer3D"):
        set_attention(video, "xformers")
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"xformers"):
        set_attention(network_of("unet")[0], "xformers")
    assert switches() == before


def test_the_sampler_leaves_the_pipeline_s_layers_alone(tmp_path, caplog):
    caplog.set_level("INFO")
    pipe = StableDiffusionPipeline.from_pretrained(tiny.write_sd(tmp_path))
    processors = {path: (p, type(p)) for path, p in pipe.unet.attn_processors.items()}
    call = {"seeds": [3, 4], "steps": 2, "output": "latent"}
    network = tiny.unet()
    expected = GuidedSampler.from_pipeline(pipe, network)(["a cat", "birds"], **call).images
    sampler = GuidedSampler.from_pipeline(pipe, network, attention="flash")
    with sdpa_kernel(SDPBackend.MATH), FlashCalls() as calls:
        images = sampler(["a cat", "birds"], **call).images
    # Two networks at two steps.
    assert calls.count == 2 * 2 * LAYERS["unet"]
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=1e-4)
    assert caplog.messages.count("attention: flash in 8 of 8 layers") == 2
    assert {path: (p, type(p)) for path, p in pipe.unet.attn_processors.items()} == processors
    with pytest.raises(UserError, match=r"^attention: 'cudnn' is not possible"):
        GuidedSampler.from_pipeline(pipe, attention="cudnn")


def test_student_and_reference_train_with_the_choice(tmp_path):
    """The same losses as without it; every attention of both networks takes the kernel."""
    model = tiny.write_sd(tmp_path / "model", **tiny.SHALLOW)
    rows = {}
    for choice in ("auto", "flash"):
        output = tmp_path / choice
        words = ["--model.path", str(model), "--output", str(output), "--engine.attention", choice]
        words += ["--rollout.grid_steps", "5", "--engine.batch_size", "2", "--prompts.limit", "4"]
        words += ["--rollout.pool", "1", "--optimizer.lr", "1e-4", "--updates", "2"]
        words += ["--log.every", "1", "--log.sample_every", "-1"]
        with sdpa_kernel(SDPBackend.MATH), FlashCalls() as calls:
            assert train.main(words) == 0
        rows[choice] = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        assert (calls.count > 0) == (choice == "flash")
    for plain, chosen in zip(rows["auto"], rows["flash"], strict=True):
        assert chosen["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        assert chosen["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)

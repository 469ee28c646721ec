"""Stable Diffusion 3, CogVideoX and Wan: each adapter gives the denoiser what the stock pipeline
gives it, and decodes as that does."""

from __future__ import annotations

import importlib.util
import json

import pytest
import tiny
import tiny_transformers
import torch
from diffusers import CogVideoXPipeline, StableDiffusion3Pipeline, WanPipeline

from selfnpo_fast.data.text_store import stored_text
from selfnpo_fast.models.cogvideox import CogVideoXAdapter
from selfnpo_fast.models.conditioning import ConditioningTable
from selfnpo_fast.models.folder import open_folder
from selfnpo_fast.models.host_table import HostRows
from selfnpo_fast.models.sd3 import StableDiffusion3Adapter
from selfnpo_fast.models.size import AskedSize, Size
from selfnpo_fast.models.wan import WanAdapter
from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.runtime.world import World
from selfnpo_kernels import Draw, NoiseKey, draw_id, normal

CPU = torch.device("cpu")
PROMPTS = ["a cat", "two birds"]
SIZE = {"height": 32, "width": 64}
CASES = {
    "sd3": (tiny_transformers.write_sd3, StableDiffusion3Pipeline, StableDiffusion3Adapter, {}),
    "cogvideox_2b": (tiny_transformers.write_cogvideox, CogVideoXPipeline, CogVideoXAdapter, {"num_frames": 9}),
    "cogvideox_5b": (
        lambda folder: tiny_transformers.write_cogvideox(folder, rotary=True),
        CogVideoXPipeline, CogVideoXAdapter, {"num_frames": 17},
    ),
    "wan": (tiny_transformers.write_wan, WanPipeline, WanAdapter, {"num_frames": 9}),
    "wan_two": (
        lambda folder: tiny_transformers.write_wan(folder, experts=2), WanPipeline, WanAdapter, {"num_frames": 5}
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The tiny pipelines by name."""
    root = tmp_path_factory.mktemp("families")
    return {name: write(root / name) for name, (write, *_) in CASES.items()}


def adapter_of(folder, cls, expert=None, **size):
    index, opened = json.loads((folder / "model_index.json").read_text()), open_folder(str(folder), str(folder))
    return cls(str(folder), folder=opened, index=index, expert=expert, asked=AskedSize(**size))


def opened(folders, name: str, **choices):
    """A case's pipeline, its adapter at the pipeline's own number of frames, and the words of a call."""
    _, pipeline, cls, words = CASES[name]
    pipe = pipeline.from_pretrained(folders[name])
    pipe.set_progress_bar_config(disable=True)
    if "num_frames" in words:
        choices = {"frames": words["num_frames"], **choices}
    return pipe, adapter_of(folders[name], cls, **SIZE, **choices), SIZE | words


def draw(pipe, words: dict, scale: float = 3.0, output: str = "latent", steps: int = 4):
    """What the stock pipeline draws, and the arguments and result of every call of a denoiser."""
    calls = []

    def record(module, args, kwargs, out):
        calls.append((module, args, kwargs, out[0]))

    parts = [part for part in (pipe.transformer, getattr(pipe, "transformer_2", None)) if part is not None]
    hooks = [part.register_forward_hook(record, with_kwargs=True) for part in parts]
    generator = torch.Generator().manual_seed(5)
    drawn = pipe(
        PROMPTS, num_inference_steps=steps, guidance_scale=scale, generator=generator, output_type=output, **words
    )
    for hook in hooks:
        hook.remove()
    return drawn[0], calls


@pytest.mark.parametrize("name", CASES)
def test_the_denoiser_is_given_what_the_stock_pipeline_gives_it(folders, name):
    pipe, adapter, words = opened(folders, name)
    rows = adapter.encode_prompts(PROMPTS, CPU)
    assert {key: tuple(value.shape[1:]) for key, value in rows.items()} == adapter.conditioning_shapes
    negatives = adapter.encode_prompts([""] * 2, CPU)  # as many as the pipeline encodes: sums are in one order
    for key, row in adapter.encode_empty(CPU).items():
        torch.testing.assert_close(negatives[key], row.expand_as(negatives[key]), rtol=1e-5, atol=1e-5)
    _, calls = draw(pipe, words)
    assert len(calls) == (8 if "wan" in name else 4)
    for i, (module, args, kwargs, out) in enumerate(calls):
        given = {key: value for key, value in kwargs.items() if value is not None and key != "return_dict"}
        x, t = given["hidden_states"], given["timestep"]
        if "wan" in name:  # two calls, the positive first
            cond = negatives if i % 2 else rows
        else:
            cond = {key: torch.cat([negatives[key], rows[key]]) for key in rows}
        assert x.shape[1:] == adapter.latent_shape
        ours_args, ours = adapter.call(x, t, cond, adapter.fixed_arguments(adapter.size, CPU, x.dtype))
        ours |= {"hidden_states": ours_args[0]}
        assert not args and ours.keys() == given.keys()
        for key, value in given.items():
            for found, expected in zip(
                *((v if isinstance(v, tuple) else (v,)) for v in (ours[key], value)), strict=True
            ):
                assert found.dtype == expected.dtype and torch.equal(found, expected), key
        assert torch.equal(adapter.predict(module, x, t, cond), out)


def listed(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("name", CASES)
def test_decoding_equals_the_stock_pipelines(folders, name):
    pipe, adapter, words = opened(folders, name)
    latents, _ = draw(pipe, words, steps=2)
    pictures, _ = draw(pipe, words, output="pt", steps=2)
    found = adapter.decode(latents)
    expected = (2 * pictures - 1).clamp(-1, 1)
    assert found.shape == (2, *((words["num_frames"],) if "num_frames" in words else ()), 3, 32, 64)
    # Two clips at once or one by one, and a step from [0, 1] and back: observed 4e-6.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert found.std() > 0.01


@pytest.mark.parametrize("name", CASES)
def test_encoding_samples_the_posterior_with_keyed_noise_and_scales_it(folders, name):
    pipe, adapter, words = opened(folders, name)
    frames = words.get("num_frames")
    torch.manual_seed(1)
    pictures = torch.rand(3, *((frames,) if frames else ()), 3, 32, 64) * 2 - 1
    ids = torch.tensor([4, 9, 2])
    found = adapter.encode(pictures, ids, seed=7)
    assert found.shape == (3, *adapter.latent_shape)
    torch.testing.assert_close(found[1:2], adapter.encode(pictures[1:2], ids[1:2], seed=7), rtol=0, atol=1e-5)
    assert (found[1:2] - adapter.encode(pictures[1:2], ids[1:2], seed=8)).abs().max() > 1e-4
    vae, config = pipe.vae, pipe.vae.config
    posterior = vae.encode(pictures.transpose(1, 2) if frames else pictures).latent_dist
    noise = normal(NoiseKey(7, ids, draw_id(Draw.POSTERIOR)), posterior.mean.shape[1:])
    sample = posterior.mean + posterior.std * noise
    if name == "sd3":
        expected = (sample - 0.0609) * 1.5305
    elif "cogvideox" in name:
        expected = (sample * {"cogvideox_2b": 1.15258426, "cogvideox_5b": 0.7}[name]).transpose(1, 2)
    else:
        mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
        expected = (sample - mean) / std
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("name", ["wan", "wan_two"])
def test_a_store_has_the_tokens_of_each_prompt_and_the_denoiser_is_given_all_512(folders, name, tmp_path):
    _, adapter, _ = opened(folders, name)
    with adapter.text_encoders(CPU) as encoders:
        rows = encoders.rows(["a cat", "b"])["encoder_hidden_states"]
    tokens = [len(adapter._text_pipeline(CPU, torch.float32).tokenizer(prompt).input_ids) for prompt in ("a cat", "b")]
    assert [len(row) for row in rows] == tokens, "every letter, a space before each word, and the end"
    whole = adapter.encode_prompts(["a cat", "b"], CPU)["encoder_hidden_states"]
    how = {"dtype": torch.float32, "encoder_dtype": torch.float32, "world": World(0, 1, CPU)}
    stored, lengths = stored_text(["a cat", "b"], str(tmp_path), adapter, **how)
    assert lengths["encoder_hidden_states"].tolist()[1:] == tokens
    host = HostRows(facts=adapter.conditioning_rows, tensors=stored, lengths=lengths)
    assert torch.equal(host.take([1, 2])["encoder_hidden_states"], whole)
    table = ConditioningTable.encode(adapter, ["a cat", "b"], CPU, torch.float32)
    assert torch.equal(table.gather(torch.tensor([1, 2]))["encoder_hidden_states"], whole)
    assert whole.shape[1] == adapter.conditioning_shapes["encoder_hidden_states"][0] == 512


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_of_a_loaded_pipeline_serves_alike(folders, name):
    pipe, adapter, _ = opened(folders, name)
    loaded = type(adapter).from_pipeline(pipe)
    found, expected = loaded.encode_prompts(PROMPTS, CPU), adapter.encode_prompts(PROMPTS, CPU)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert loaded.vae_sha256 == adapter.vae_sha256
    if name == "wan_two":
        assert (loaded.denoiser_names, loaded.boundary) == (("transformer", "transformer_2"), 875)


@pytest.mark.parametrize("name", CASES)
def test_weights_load_in_half_precision_and_a_forward_keeps_it(folders, name):
    _, adapter, _ = opened(folders, name)
    adapter.check(configs_only=True)
    denoiser = adapter.load_denoiser(torch.bfloat16)
    x = torch.randn(1, *adapter.latent_shape)
    rows = {key: torch.randn(1, *row) for key, row in adapter.conditioning_shapes.items()}
    out = adapter.predict(denoiser, x, torch.tensor([500]), rows)
    assert (out.dtype, out.shape) == (torch.bfloat16, x.shape)
    assert out.isfinite().all() and out.is_contiguous()


def test_the_pipeline_asks_each_expert_on_its_side_of_the_boundary(folders):
    pipe, adapter, words = opened(folders, "wan_two")
    _, calls = draw(pipe, words)
    asked = [(0 if module is pipe.transformer else 1, float(kwargs["timestep"][0])) for module, _, kwargs, _ in calls]
    assert {place for place, _ in asked} == {0, 1}
    assert all((time < adapter.boundary) == place for place, time in asked)
    loaded = adapter.load_denoiser(torch.float32)
    for name, ours in loaded.networks.items():
        theirs = getattr(pipe, name).state_dict()
        assert ours.state_dict().keys() == theirs.keys()
        assert all(torch.equal(ours.state_dict()[key], value) for key, value in theirs.items())


def test_guidance_and_words_reach_what_is_drawn(folders):
    for name in CASES:
        pipe, _, words = opened(folders, name)
        (guided, _), (plain, _) = draw(pipe, words), draw(pipe, words, scale=1.0)
        assert guided.isfinite().all() and (guided - plain).abs().max() > 1e-3, name


def test_what_does_not_fit_the_tokens_is_said(folders, monkeypatch):
    said = []
    monkeypatch.setattr("selfnpo_fast.models.text.say_once", said.append)
    long = "a" * 600
    for name, tokens in (("sd3", 12), ("cogvideox_2b", 226), ("wan", 512)):
        _, adapter, _ = opened(folders, name)
        adapter.encode_prompts([long, "a cat"], CPU)
        assert f"1 of 2 prompts are longer than the {tokens} tokens" in said[-1]


def test_sizes_that_a_family_does_not_draw_are_one_line(folders):
    sd3 = adapter_of(folders["sd3"], StableDiffusion3Adapter)
    assert sd3.latent_shape == (16, 8, 8)
    for side, size in (("height", (40, 64)), ("width", (64, 8)), ("width", (64, 16 * 13))):
        with pytest.raises(UserError, match=rf"^{side}: \d+ is no multiple of 16 from 16 to 192; the next is \d+$"):
            sd3.latent_shape_of(Size(*size))
    for name, cls, step in (("cogvideox_2b", CogVideoXAdapter, 8), ("wan", WanAdapter, 4)):
        with pytest.raises(UserError, match=r"^model.resolution: 24 is no multiple of 16 from 16"):
            adapter_of(folders[name], cls).latent_shape_of(Size(24, 32, 9), "model.resolution")
        for frames, near in ((14, 17), (16, 17), (0, 1)):
            expected = f"^model.frames: {frames} is .* expected 1 and a multiple of {step}; the next is {near}$"
            with pytest.raises(UserError, match=expected):
                adapter_of(folders[name], cls).latent_shape_of(Size(32, 32, frames), "model.")
    assert adapter_of(folders["cogvideox_2b"], CogVideoXAdapter).latent_shape == (3, 4, 4, 6)
    assert adapter_of(folders["wan"], WanAdapter).latent_shape == (4, 21, 60, 104)
    with pytest.raises(UserError, match=r"^width: 1040 is no multiple of 16 from 16 to 1024; the next is 1024$"):
        adapter_of(folders["wan"], WanAdapter).latent_shape_of(Size(32, 1040, 1))
    with pytest.raises(UserError, match=r"^model.frames: 257 is not possible; expected at most 253$"):
        adapter_of(folders["wan"], WanAdapter).latent_shape_of(Size(32, 32, 257), "model.")
    assert adapter_of(folders["wan"], WanAdapter).latent_shape_of(Size(32, 32)) == (4, 1, 4, 4)


def variant(folders, tmp_path, name: str, part: str, **changes):
    """An adapter of a case whose config of a part is changed."""
    folder = tmp_path / "model"
    CASES[name][0](folder)
    tiny.edit(folder / part, **changes)
    return adapter_of(folder, CASES[name][2])


@pytest.mark.parametrize(
    ("name", "part", "changes", "expected"),
    [
        ("sd3", "transformer/config.json", {"in_channels": 33}, "takes 33 channels and gives 16"),
        ("sd3", "transformer/config.json", {"joint_attention_dim": 48}, "width of text and its transformer takes 48"),
        ("sd3", "transformer/config.json", {"pooled_projection_dim": 48}, "32 pooled features and its transformer"),
        ("cogvideox_2b", "transformer/config.json", {"patch_size_t": 2}, "is CogVideoX 1.5's"),
        ("cogvideox_2b", "transformer/config.json", {"in_channels": 8}, "takes 8 channels and gives 4"),
        ("cogvideox_2b", "transformer/config.json", {"text_embed_dim": 16}, "takes text of width 16"),
        ("cogvideox_2b", "vae/config.json", {"latent_channels": 8}, "its vae has 8 latent channels"),
        ("cogvideox_2b", "vae/config.json", {"scaling_factor": 0.0}, "its scaling_factor is 0.0; expected finite"),
        ("wan", "transformer/config.json", {"image_dim": 8}, "or a picture: give the text-to-video model"),
        ("wan", "transformer/config.json", {"patch_size": [2, 2, 2]}, r"its patch_size is \[2, 2, 2\]; expected"),
        ("wan", "vae/config.json", {"latents_std": [1, 1, 1, 0]}, "its latents_std is"),
        ("wan", "model_index.json", {"expand_timesteps": True}, "as Wan2.2-TI2V-5B has, which is not served"),
        ("wan", "model_index.json", {"boundary_ratio": 0.9}, "its boundary_ratio is 0.9 and it has 1 transformers"),
        ("wan_two", "model_index.json", {"boundary_ratio": None}, "its boundary_ratio is None and it has 2"),
        ("wan_two", "model_index.json", {"boundary_ratio": 9}, "its boundary_ratio is 9; expected a number between"),
    ],
)  # fmt: skip
def test_a_variant_that_is_not_served_is_one_line(folders, tmp_path, name, part, changes, expected):
    with pytest.raises(UserError, match=expected) as caught:
        variant(folders, tmp_path, name, part, **changes).check(configs_only=True)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("model.path: ")


def test_an_expert_that_a_model_has_not_is_one_line(folders):
    for name, expert, possible in (("wan", "low", ".* has one denoiser"), ("wan_two", "middle", "expected high, low")):
        with pytest.raises(UserError, match=rf"^model.expert: '?{expert}'? is not possible; {possible}"):
            adapter_of(folders[name], WanAdapter, expert=expert).check(configs_only=True)


def test_an_expert_without_weights_is_found_before_anything_else(folders, tmp_path):
    folder = CASES["wan_two"][0](tmp_path / "model")
    (folder / "transformer_2" / "diffusion_pytorch_model.safetensors").unlink()
    adapter = adapter_of(folder, WanAdapter, resolution=32, frames=5)
    with pytest.raises(UserError, match="cannot load transformer 2 from"):
        adapter.check()


def test_a_tokenizer_that_is_published_as_spiece_model(folders, tmp_path, monkeypatch):
    import sentencepiece  # here, so that tests are collected where the package is missing

    adapter = variant(folders, tmp_path, "cogvideox_2b", "model_index.json")
    folder = tmp_path / "model" / "tokenizer"
    (folder / "tokenizer.json").unlink()
    words = tmp_path / "words.txt"
    words.write_text("\n".join(f"{a}{b} cat bird" for a in "abcdefgh" for b in "ijklmnop"))
    sentencepiece.SentencePieceTrainer.train(
        input=str(words), model_prefix=str(folder / "spiece"), vocab_size=29, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "spiece.vocab").unlink()
    adapter = adapter_of(tmp_path / "model", CogVideoXAdapter)
    tokens = adapter._text_pipeline(CPU, torch.float32).tokenizer
    truth = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    assert tokens("ab cat").input_ids == [*truth.encode("ab cat"), 1]
    assert tokens.model_max_length == 226
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sentencepiece" else find(name))
    with pytest.raises(UserError, match=r"its spiece\.model needs the package sentencepiece to be read; pip install"):
        adapter.encode_prompts(["a"], CPU)

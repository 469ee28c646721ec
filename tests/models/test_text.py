"""What becomes of prompts on their way to the denoiser: limits of tokenizers, and what is cut."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from fuzzing import assert_one_line, call
from transformers import CLIPTokenizer

from selfnpo_fast import GuidedSampler, cli, train
from selfnpo_fast.models import load_adapter
from selfnpo_fast.runtime import console
from selfnpo_fast.runtime.errors import UserError

CPU = torch.device("cpu")
LONG = "a very long prompt indeed"  # 21 tokens of one letter each, and one at each end


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Path]:
    """A pipeline of each family."""
    folder = tmp_path_factory.mktemp("models")
    return {"sd": tiny.write_sd(folder / "sd"), "sdxl": tiny.write_sdxl(folder / "sdxl")}


@pytest.fixture
def said(monkeypatch, caplog):
    """The lines about cut prompts, with none said before."""
    monkeypatch.setattr(console, "_said", set())
    return lambda: [record.getMessage() for record in caplog.records if "cut" in record.getMessage()]


def test_prompts_that_are_cut_are_counted_and_named_once(written, said):
    adapter = load_adapter(str(written["sd"]))
    fits = "tencharsxx"  # 10 tokens and the two at the ends: the encoder takes 12
    adapter.encode_prompts([fits, "a", ""], CPU)
    assert said() == []
    prompts = [fits, "x" * 11, LONG, LONG, "b" * 500, "c" * 12]
    for _ in range(2):
        adapter.encode_prompts(prompts, CPU)
    (line,) = said()
    assert_one_line(line, "4 of 5 prompts are longer than the 12 tokens", "'xxxxxxxxxxx'", repr(LONG), ", ...")
    assert "b" * 50 not in line
    assert "'ccc" not in line


def test_what_is_cut_is_what_the_encoder_does_not_see(written, said):
    """A prompt counts as cut where its rows are those of a shorter one."""
    adapter = load_adapter(str(written["sd"]))
    prompts = ["a" * n for n in range(6, 16)]
    rows = adapter.encode_prompts(prompts, CPU)["encoder_hidden_states"]
    same = [torch.equal(rows[i], rows[-1]) for i in range(len(prompts) - 1)]
    assert f"{sum(same) + 1} of {len(prompts)} prompts" in said()[0]


def test_both_tokenizers_of_sdxl_are_asked(written, tmp_path, said):
    """The second takes letters, the first pairs of them."""
    shutil.copytree(written["sdxl"], tmp_path / "model")
    vocabulary = tiny.tokenizer().get_vocab()
    names = sorted(vocabulary, key=vocabulary.get)[:-2]
    pairs = {name: i for i, name in enumerate([*names, "aa", "aa</w>"])}  # as many as the encoder knows
    merges = [("a", "a"), ("a", "a</w>")]
    CLIPTokenizer(vocab=pairs, merges=merges, model_max_length=12).save_pretrained(tmp_path / "model" / "tokenizer")
    adapter = load_adapter(str(tmp_path / "model"))
    adapter.encode_prompts(["a" * 14, "b" * 8, "b" * 11], CPU)
    assert_one_line(said()[0], "2 of 3 prompts", f"'{'a' * 14}'", f"'{'b' * 11}'")


def test_commands_say_what_is_cut(written, tmp_path, monkeypatch):
    """The libraries' own line is silenced there."""
    (tmp_path / "prompts.txt").write_text(f"{LONG}\na cat\n")
    model = {"model.path": written["sd"], "prompts.source": tmp_path / "prompts.txt", "output": tmp_path / "run"}
    sizes = {"updates": 1, "rollout.grid_steps": 4, "rollout.pool": 1, "engine.batch_size": 2, "log.sample_every": -1}
    words = [word for key, value in (model | sizes).items() for word in (f"--{key}", str(value))]
    monkeypatch.setattr(console, "_said", set())
    code, error = call(train.main, words)
    assert code == 0, error
    assert error.count("1 of 2 prompts are longer than the 12 tokens that the text encoder takes; what") == 1
    monkeypatch.setattr(console, "_said", set())
    words = ["sample", "--model", str(written["sd"]), "--steps", "1", "--output", str(tmp_path / "drawn")]
    code, error = call(cli.main, [*words, "--prompt", LONG, "--images_per_prompt", "2"])
    assert code == 0, error
    assert error.count("1 of 1 prompts are longer") == 1
    assert repr(LONG) in error


# Limits


@pytest.mark.parametrize("length", [10**12, 10**9, 13, 1, 0, -1, 1.5, "12", [12]])
def test_a_tokenizer_s_limit_has_to_be_possible(written, tmp_path, length):
    """10^12 ends the process inside of transformers, without a word."""
    shutil.copytree(written["sd"], tmp_path / "model")
    tiny.edit(tmp_path / "model" / "tokenizer" / "tokenizer_config.json", model_max_length=length)
    with pytest.raises(UserError) as refused:
        load_adapter(str(tmp_path / "model"))
    assert_one_line(str(refused.value), "model_max_length", "expected 2 to 12, the encoder's positions")


@pytest.mark.parametrize("length", [int(1e30), 1e30, None])
def test_an_unknown_limit_is_the_encoder_s(written, tmp_path, length, monkeypatch, caplog):
    monkeypatch.setattr(console, "_said", set())
    expected = load_adapter(str(written["sd"])).encode_prompts([LONG], CPU)
    shutil.copytree(written["sd"], tmp_path / "model")
    tiny.edit(tmp_path / "model" / "tokenizer" / "tokenizer_config.json", model_max_length=length)
    adapter = load_adapter(str(tmp_path / "model"))
    assert torch.equal(adapter.encode_prompts([LONG], CPU)["encoder_hidden_states"], expected["encoder_hidden_states"])
    assert adapter.conditioning_shapes["encoder_hidden_states"] == (12, tiny.WIDTH)
    assert caplog.text.count("names no model_max_length; the encoder's 12 tokens") == 1


def test_a_smaller_limit_holds(written, tmp_path):
    shutil.copytree(written["sd"], tmp_path / "model")
    tiny.edit(tmp_path / "model" / "tokenizer" / "tokenizer_config.json", model_max_length=8)
    adapter = load_adapter(str(tmp_path / "model"))
    row = adapter.encode_prompts(["a"], CPU)["encoder_hidden_states"]
    assert row.shape[1:] == adapter.conditioning_shapes["encoder_hidden_states"] == (8, tiny.WIDTH)


def test_a_loaded_pipeline_s_limit_is_bounded_too(written):
    pipe = StableDiffusionPipeline.from_pretrained(written["sd"])
    pipe.tokenizer.model_max_length = int(1e30)
    with pytest.raises(UserError, match=r"set tokenizer\.model_max_length to"):
        GuidedSampler.from_pipeline(pipe)("a cat", steps=1)


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer", "vae"])
def test_a_loaded_pipeline_that_lacks_a_part_is_refused(written, part):
    pipe = StableDiffusionPipeline.from_pretrained(written["sd"])
    setattr(pipe, part, None)
    with pytest.raises(UserError, match=f"^pipe: it has no {part}"):
        GuidedSampler.from_pipeline(pipe)

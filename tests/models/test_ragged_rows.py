"""A family whose prompts have rows of lengths of their own: stored as they are, padded with a mask
when they are given to the denoiser."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from test_new_family import TokenAdapter, TokenPipeline, Tokens, TokenTransformer, words
from transformers import CLIPTextModel

from selfnpo_fast import models, train
from selfnpo_fast.models.conditioning import ConditioningTable, Row, given_shapes
from selfnpo_fast.runtime.world import World
from selfnpo_fast.training.inputs import prompt_table

CPU = torch.device("cpu")
WORLD = World(0, 1, CPU)
PROMPTS = ["a", "a cat", "a dog", "a cat", "a very long one"]


class MaskedTransformer(TokenTransformer):
    """Sees the mean of a prompt's own words, by their mask."""

    def forward(self, hidden_states, timestep, words=None, words_mask=None, tone=None, return_dict=True):
        own = words_mask[..., None].to(words.dtype)
        mean = (words * own).sum(1, keepdim=True) / own.sum(1, keepdim=True)
        return super().forward(hidden_states, timestep, words=mean, tone=tone, return_dict=return_dict)


class RaggedPipeline(TokenPipeline):
    """As its parent, but prompts are not padded."""

    def encode(self, prompts, device):
        states = [super(RaggedPipeline, self).encode([prompt], device)[0][0] for prompt in prompts]
        words = [state[: len(self.tokenizer(prompt).input_ids)] for state, prompt in zip(states, prompts, strict=True)]
        return words, torch.stack([own.mean(dim=0) for own in words])


class RaggedAdapter(TokenAdapter):
    @property
    def conditioning_rows(self):
        dense = super().conditioning_shapes
        return {
            "words": Row(shape=dense["words"], ragged=0, mask="words_mask"),
            "tone": Row(shape=dense["tone"]),
        }

    @property
    def conditioning_shapes(self):
        return given_shapes(self.conditioning_rows)


class Ragged(Tokens):
    adapter = RaggedAdapter
    pipeline_class = "RaggedPipeline"
    denoiser_class = "MaskedTransformer"
    library = __name__
    guided_pipelines = ("RaggedPipeline",)
    row_names = Tokens.row_names | {"words_mask"}


RaggedAdapter.family = Ragged()


@pytest.fixture
def pipe(monkeypatch):
    monkeypatch.setattr(models, "FAMILIES", dict(models.FAMILIES))
    models.register(RaggedAdapter.family)
    torch.manual_seed(0)
    tokens = tiny.tokenizer()
    text = CLIPTextModel(tiny.text_config(tokens)).eval()
    return RaggedPipeline(text, tokens, MaskedTransformer().eval(), tiny.scheduler())


@pytest.fixture
def model(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def config(model, output, *more):
    return train.parse(words(model, output, *more)).config


def test_rows_are_stored_as_long_as_they_are_and_padded_with_a_mask(pipe, model, tmp_path):
    adapter = models.load_adapter(str(model))
    with torch.no_grad():
        expected = [pipe.encode([text], CPU) for text in ["", *PROMPTS]]
    lengths = [len(own[0]) for own, _ in expected]
    assert len(set(lengths)) == 4
    assert max(lengths) == adapter.conditioning_shapes["words"][0], "the longest is cut"
    for device_mib in ("256", "0"):
        table = prompt_table(
            config(model, tmp_path / "run", "--prompts.device_mib", device_mib), adapter, PROMPTS, WORLD
        )
        assert table.on_host == (device_mib == "0")
        table.reserve(len(PROMPTS))
        table.prefetch(torch.arange(len(PROMPTS) + 1))
        for rows in (table.gather(torch.arange(6)), table.fetch(torch.arange(6))):
            assert {name: tuple(value.shape[1:]) for name, value in rows.items()} == adapter.conditioning_shapes
            for i, (own, tone) in enumerate(expected):
                assert rows["words_mask"][i].tolist() == [j < lengths[i] for j in range(max(lengths))]
                torch.testing.assert_close(rows["words"][i, : lengths[i]], own[0])
                assert not rows["words"][i, lengths[i] :].any()
                torch.testing.assert_close(rows["tone"][i], tone[0])
    [stored] = (tmp_path / "embeddings").glob("*/words.safetensors")
    distinct = sum(lengths) - lengths[4]  # the second "a cat"
    assert stored.stat().st_size == 4096 + distinct * tiny.WIDTH * 4


def test_a_short_table_is_padded_to_its_own_longest_row(model):
    table = ConditioningTable.encode(models.load_adapter(str(model)), PROMPTS[:2], CPU, torch.float32)
    assert table.rows["words"].shape[1] == len("acat") + 2
    rows = models.load_adapter(str(model)).encode_prompts(PROMPTS[:2], CPU)
    assert rows["words"].shape[1] == 12, "rows that others are joined to have the largest length"
    assert rows["words_mask"].sum(1).tolist() == [3, 6]


def test_a_run_is_the_same_with_a_store(model, tmp_path):
    losses = []
    for name, more in (("device", ()), ("host", ("--prompts.device_mib", "0"))):
        assert (
            train.main(words(model, tmp_path / name, "--rollout.omega", "2", "--rollout.branches", "batched", *more))
            == 0
        )
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(row)["loss"] for row in rows])
    assert losses[0] == losses[1]

"""A flow family that the product does not know, by the steps of docs/adding_a_model.md.

Next to test_new_family.py it has what flows have: noise levels that depend on the size (dynamic
shifting), sigma as time, positions of tokens that are no rows, a guidance embedding, and an output
with a learned variance. It trains and resumes; its pairs lie on diffusers' own trajectories.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from safetensors.torch import load_file
from test_new_family import (
    CHANNELS,
    CPU,
    PIXELS,
    WIDTH,
    TokenAdapter,
    TokenBlock,
    TokenPipeline,
    Tokens,
    loss_of,
    words,
)
from torch import nn
from transformers import CLIPTextModel

from selfnpo_fast import models, train
from selfnpo_fast.config import RolloutConfig
from selfnpo_fast.diffusion.levels import Levels
from selfnpo_fast.models import load_adapter
from selfnpo_fast.models.conditioning import ConditioningTable
from selfnpo_fast.models.size import Size
from selfnpo_fast.rollout import ContinuousRollout, Grid, GuidedPredictor, PairMaker
from selfnpo_fast.runtime.errors import UserError
from selfnpo_kernels import Draw, NoiseKey, draw_id, normal

GUIDANCE, STEPS = 3.5, 10


class FlowTokenTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """tokens (B, L, C), sigma (B,), words (B, n, D), tone (B, D), ids (L, 2), guidance (B,) ->
    (B, L, 2 C): the flow, and a variance."""

    @register_to_config
    def __init__(self, channels: int = CHANNELS, width: int = WIDTH, words: int = tiny.WIDTH, side: int = 4) -> None:
        super().__init__()
        self.into, self.place = nn.Linear(channels, width), nn.Linear(2, width)
        self.time, self.tone = nn.Linear(2, width), nn.Linear(words, width)
        self.blocks = nn.ModuleList([TokenBlock(width, words)])
        self.out = nn.Linear(width, 2 * channels)

    def forward(self, hidden_states, timestep, words=None, tone=None, ids=None, guidance=None, return_dict=True):
        assert ids.shape == (hidden_states.shape[1], 2)
        assert guidance.shape == timestep.shape == hidden_states.shape[:1]
        known = torch.stack([timestep, guidance], -1).to(hidden_states.dtype)
        x = self.into(hidden_states) + self.place(ids) + (self.time(known) + self.tone(tone))[:, None]
        for block in self.blocks:
            x = block(x, words)
        out = self.out(x)
        return SimpleNamespace(sample=out) if return_dict else (out,)


class FlowTokenPipeline(TokenPipeline):
    pass


class FlowTokenAdapter(TokenAdapter):
    made = 0

    def tokens(self, size: Size | None = None) -> int:
        return self.latent_shape_of(size or self.size)[0]

    def fixed_arguments(self, size: Size, device: torch.device, dtype: torch.dtype) -> dict:
        type(self).made += 1
        rows, columns = torch.meshgrid(
            torch.arange(size.height // PIXELS), torch.arange(size.width // PIXELS), indexing="ij"
        )
        return {"ids": torch.stack([rows.flatten(), columns.flatten()], -1).to(device, dtype)}

    def call(self, x, t, cond, fixed):
        positional, named = super().call(x, t, cond, fixed)
        return positional, named | {"guidance": torch.full((len(x),), GUIDANCE, device=x.device)}

    def output(self, out: tuple) -> torch.Tensor:
        return out[0].chunk(2, dim=-1)[0]


class FlowTokens(Tokens):
    adapter = FlowTokenAdapter
    pipeline_class = "FlowTokenPipeline"
    denoiser_class = "FlowTokenTransformer"
    library = __name__
    guided_pipelines = ("FlowTokenPipeline",)
    row_names = Tokens.row_names | {"guidance"}
    not_rows = frozenset({"ids"})
    time_dtype = torch.float32

    def levels(self, scheduler, tokens: int | None = None) -> Levels:
        levels = super().levels(scheduler, tokens)
        return dataclasses.replace(levels, time=levels.sigma)


FlowTokenAdapter.family = FlowTokens()


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(models, "FAMILIES", dict(models.FAMILIES))
    models.register(FlowTokenAdapter.family)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    tokens = tiny.tokenizer()
    text = CLIPTextModel(tiny.text_config(tokens)).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=8, max_image_seq_len=64)
    folder = tmp_path_factory.mktemp("flow")
    FlowTokenPipeline(text, tokens, FlowTokenTransformer().eval(), scheduler).save_pretrained(folder)
    return folder


def command(model, output, *more: str) -> list[str]:
    return words(model, output, "--log.sample_every", "-1", "--rollout.s_shift", "0.5", *more)


def test_it_trains_and_resumes_in_the_same_bits(model, tmp_path):
    assert train.main(command(model, tmp_path / "whole")) == 0
    assert all(loss > 0 for loss in loss_of(tmp_path / "whole"))
    assert train.main(command(model, tmp_path / "parts", "--updates", "2")) == 0
    assert train.main(command(model, tmp_path / "parts", "--resume")) == 0
    assert loss_of(tmp_path / "parts") == loss_of(tmp_path / "whole")
    file = "negative/transformer/diffusion_pytorch_model.safetensors"
    found, expected = (load_file(tmp_path / name / file) for name in ("parts", "whole"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("w", [-1.0, -3.0, 0.0])
@torch.no_grad()
def test_its_pairs_lie_on_diffusers_trajectories(model, w):
    """Every target is the estimate x - sigma p at its state of FlowMatchEuler's own trajectory, on a
    size that is not square."""
    adapter = load_adapter(str(model), height=8, width=24)
    network, before = adapter.load_denoiser(torch.float32), FlowTokenAdapter.made
    table = ConditioningTable.encode(adapter, ["a cat", "two birds", "a dog"], CPU, torch.float32)
    predictor = GuidedPredictor(lambda x, t, cond: adapter.predict_level(network, x, t, cond), table, w, "batched")
    setting = RolloutConfig(grid_steps=STEPS, omega=w)
    maker = PairMaker(
        predictor, Grid.build(adapter.schedule, STEPS, CPU, omega=w), setting, latent_shape=adapter.latent_shape,
        num_prompts=3, latents=None, seed=3, dropout=0.0, device=CPU,
    )  # fmt: skip
    rollout = ContinuousRollout(maker, batch=4, groups=1, rank=0, world_size=1)
    pairs = [rollout.next_pairs() for _ in range(2 * STEPS)]
    assert FlowTokenAdapter.made == before + 1
    ids = torch.cat([part.sample_ids for part in pairs]).unique()
    truth = trajectory(adapter, network, table, maker, ids, w)
    for part in pairs:
        at = torch.searchsorted(ids, part.sample_ids)
        expected = torch.stack([truth[int(t)][i] for t, i in zip(part.t, at, strict=True)])
        torch.testing.assert_close(part.target, expected, rtol=0, atol=1e-5)


def trajectory(adapter, network, table, maker, ids, w) -> dict[int, torch.Tensor]:
    """x - sigma p of samples by noise level, and the last state at 0, by diffusers alone."""
    theirs = FlowMatchEulerDiscreteScheduler.from_config(adapter.scheduler_config)
    config = theirs.config
    sizes = (config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS), mu=calculate_shift(12, *sizes))
    places = torch.tensor([[row, column] for row in range(2) for column in range(6)], dtype=torch.float32)
    rows = maker.rows(ids)

    def branch(x, t, index):
        guidance = torch.full((len(x),), GUIDANCE)
        given = {**table.gather(index), "ids": places, "guidance": guidance}
        return network(x, (t / 1000).expand(len(x)), **given).sample[..., :CHANNELS]

    x, found = normal(NoiseKey(3, ids, draw_id(Draw.START_NOISE)), (12, CHANNELS)), {}
    for step, t in enumerate(theirs.timesteps):
        pos, neg = branch(x, t, rows), branch(x, t, torch.zeros_like(rows))
        p = pos + w * (pos - neg)
        found[999 - 100 * step] = x - t / 1000 * p
        x = theirs.step(p, t, x).prev_sample
    return found | {0: x}


def test_what_it_has_not_is_refused(model):
    with pytest.raises(UserError, match=r"^model\.expert: 'high' is not possible; .* has one denoiser"):
        load_adapter(str(model), expert="high")
    with pytest.raises(UserError, match=r"^model\.frames: 9 is not possible; .* draws pictures"):
        load_adapter(str(model), frames=9)
    with pytest.raises(UserError, match=r"^model\.frames: 9 is not possible"):
        load_adapter(str(model), resolution=8, frames=9)
    with pytest.raises(UserError, match=r"^model\.width: 10 is no multiple of 4"):
        load_adapter(str(model), height=8, width=10)
    with pytest.raises(UserError, match=r"^model\.resolution: 10 is no multiple of 4"):
        load_adapter(str(model), resolution=10)

"""A training method that the product does not know, defined here by the steps of
docs/adding_a_method.md.

Its pairs are noise and the reference's prediction at the noisiest timestep; the student learns a
multiple of it. It trains, resumes and can be looked at, and not a line of selfnpo_fast/ knows of
it.
"""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny_negatives import load_network

from selfnpo_fast import train
from selfnpo_fast.data.prompts import read_prompts
from selfnpo_fast.models import load_adapter
from selfnpo_fast.rollout import Pairs, Producer
from selfnpo_fast.runtime.world import World
from selfnpo_fast.training import methods
from selfnpo_fast.training.methods import Method, MethodInputs
from selfnpo_kernels import Draw, NoiseKey, draw_id, normal

BATCH, UPDATES, FACTOR, SEED = 4, 4, 1.5, 7
CPU = torch.device("cpu")


class NoisePairs:
    """What a producer asks of a rollout: the next micro-batch, and a state."""

    def __init__(self, method: Method, reference) -> None:
        self.method, self.reference, self.next_id = method, reference, 0
        self.forwards = 0

    @torch.no_grad()
    def next_pairs(self) -> Pairs:
        method = self.method
        ids = torch.arange(self.next_id, self.next_id + BATCH)
        self.next_id += BATCH
        t = torch.full((BATCH,), method.adapter.schedule.num_train_timesteps - 1)
        x = normal(NoiseKey(method.config.seed, ids, draw_id(Draw.START_NOISE)), method.adapter.latent_shape)
        rows = ids % method.table.prompts + 1
        target = FACTOR * method.adapter.predict(self.reference.module, x, t, method.table.gather(rows))
        self.forwards += BATCH
        return Pairs(x_s=x, s=t, target=target, t=t, rows=rows, weight=torch.ones(BATCH), sample_ids=ids)

    def fill(self, turns: int | None = None, before_group=None) -> None:
        """Nothing outlives its micro-batch."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"next_id": torch.tensor(self.next_id)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.next_id = int(state["next_id"])


class Louder(Method):
    name = "louder"

    @classmethod
    def read_inputs(cls, config, adapter, world) -> MethodInputs:
        return MethodInputs(read_prompts(config.prompts.source, limit=config.prompts.limit))

    def make_producer(self, reference, latents) -> Producer:
        rollout = NoisePairs(self, reference)
        self.producer = Producer(rollout, rollout, self.config.engine.accumulation, lambda: reference.version)
        return self.producer

    def pair_loss(self, predict, pairs):
        difference = predict(pairs.x_s, pairs.s, self.table.gather(pairs.rows)) - pairs.target
        per_pair = difference.square().flatten(1).mean(dim=1)
        return per_pair.mean(), per_pair.detach()


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))
    methods.register(Louder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_sd(tmp_path_factory.mktemp("model"))


def run(model, output, *more: str, method: str = "louder") -> int:
    options = {
        "model.path": model, "output": output, "method": method, "updates": UPDATES, "seed": SEED,
        "prompts.source": "shipped", "prompts.limit": 6, "engine.batch_size": BATCH, "optimizer.lr": 1e-4,
        "reference.kind": "frozen",
        "log.every": 1, "log.checkpoint_every": 2, "log.sample_every": -1,
    }  # fmt: skip
    return train.main([*(word for key, value in options.items() for word in (f"--{key}", str(value))), *more])


def losses(output) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    methods.register(Louder)
    output = tmp_path_factory.mktemp("runs") / "whole"
    assert run(model, output) == 0
    del methods.METHODS["louder"]
    return output


def test_the_product_does_not_know_it(model, tmp_path, capsys):
    assert run(model, tmp_path / "run", method="quieter") == 2
    assert "error: method: 'quieter' is not known; expected one of self_npo, louder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_it_trains(model, whole):
    """The first loss is that of the untrained student, computed here; on the same pairs the trained
    one has less."""
    adapter = load_adapter(str(model))
    network = adapter.load_denoiser(torch.float32)
    rows = adapter.encode_prompts(read_prompts("shipped", limit=6)[:BATCH], CPU)
    x = normal(NoiseKey(SEED, torch.arange(BATCH), draw_id(Draw.START_NOISE)), adapter.latent_shape)
    trained = load_network(adapter, whole, torch.float32)
    with torch.no_grad():
        before, after = (one(x, torch.full((BATCH,), 999), **rows).sample for one in (network, trained))
    expected = ((FACTOR - 1) * before).square().mean().item()
    assert losses(whole)[0] == pytest.approx(expected, rel=1e-5)
    assert len(losses(whole)) == UPDATES
    assert (after - FACTOR * before).square().mean().item() < 0.99 * expected


def test_it_resumes_in_the_same_bits(model, whole, tmp_path):
    assert run(model, tmp_path / "run", "--updates", "2") == 0
    assert run(model, tmp_path / "run", "--resume") == 0
    assert losses(tmp_path / "run") == losses(whole)
    file = "negative/unet/diffusion_pytorch_model.safetensors"
    found, expected = load_file(tmp_path / "run" / file), load_file(whole / file)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_another_method_may_not_go_on_with_it(model, whole, capsys):
    assert run(model, whole, "--resume", method="self_npo") == 2
    assert "method is 'self_npo', but was 'louder'" in capsys.readouterr().err


def test_an_update_can_be_looked_at(model, whole):
    assert run(model, whole, "--replay-step", "3") == 0
    pairs = load_file(whole / "replay" / "update-0000003" / "pairs.safetensors")
    assert sorted(pairs["sample_ids"].tolist()) == [8, 9, 10, 11]
    assert pairs["loss"].mean().item() == pytest.approx(losses(whole)[2], rel=1e-5)


def test_another_number_of_ranks_may_go_on_with_it(model):
    """By the base's rule: scalars are common to all ranks."""
    method = object.__new__(Louder)
    assert method.reshard([{"next_id": torch.tensor(8)}] * 2, World(0, 1, CPU)) == {"next_id": torch.tensor(8)}

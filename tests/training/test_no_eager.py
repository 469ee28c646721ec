"""Between the networks there are only fused ops.

There is no eager arithmetic on latents, and none on weights for the moving average.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dispatched import Dispatched

from selfnpo_fast import train
from selfnpo_fast.guidance.sampler import GuidedSampler, SamplerConfig
from selfnpo_fast.models import load_adapter
from selfnpo_fast.negatives.load import Negative
from selfnpo_fast.rollout import continuous
from selfnpo_fast.training import moving_reference, objective
from selfnpo_fast.training.trainer import Trainer
from selfnpo_kernels import reference

CONFIG = Path(__file__).parents[2] / "configs" / "digits.yaml"
BATCH, LATENT = 7, 4 * 8 * 8  # no parameter of the model has as many elements
SHORT = ["--engine.batch_size", str(BATCH), "--prompts.limit", "20", "--log.sample_every", "-1", "--log.every", "1"]
SHORT += ["--rollout.grid_steps", "5"]


class WholeUpdate:
    """Watches the last update of a run, without the networks, their backward and the optimiser."""

    def __init__(self, monkeypatch) -> None:
        self.latents = self.weights = self.seen = None
        original = Trainer.train_update
        watched = lambda trainer, recorder: self._watched(original, trainer, recorder)  # noqa: E731
        monkeypatch.setattr(Trainer, "train_update", watched)

    def _watched(self, original, trainer: Trainer, recorder) -> None:
        trainer.producer.rollout.fill()
        if trainer.update + 1 < trainer.config.updates:
            original(trainer, recorder)
            return
        sizes = {n * BATCH * LATENT for n in (1, 2, 4)}  # a batch, both branches of it, the whole pool of slots
        reference = trainer.reference.module
        networks = trainer.engine.engine, getattr(reference, "network", reference)
        engine, predict, move = trainer.engine, trainer.adapter.predict, trainer.reference.update
        with Dispatched(sizes, *networks) as mode:

            def predicted(*arguments):
                out = predict(*arguments)
                if out.requires_grad:  # the backward of the loss ends where the network's begins
                    out.register_hook(lambda _: mode.enter())
                return out

            def stepped(step=engine.step):
                mode.enter()
                result = step()
                mode.leave()
                return result

            def moved():
                weights = Dispatched({p.numel() for _, p in trainer.engine.trainable})
                with weights:
                    move()
                self.weights = weights.computing

            trainer.adapter.predict, engine.step, trainer.reference.update = predicted, stepped, moved
            original(trainer, recorder)
        self.latents, self.seen = mode.computing, mode.seen


def run(monkeypatch, output: Path, *words: str) -> WholeUpdate:
    update = WholeUpdate(monkeypatch)
    assert train.main(["--config", str(CONFIG), "--output", str(output), "--updates", "2", *SHORT, *words]) == 0
    return update


LOSS = {"selfnpo.x0_loss": 1, "selfnpo.x0_loss_backward": 1}


@pytest.mark.parametrize("w", ["-1", "0", "-5"])
def test_an_update_of_continuous_rollouts(w, monkeypatch, tmp_path):
    update = run(monkeypatch, tmp_path / "run", "--rollout.omega", w)
    assert update.latents == {"selfnpo.tdft_step": 1, **LOSS}
    assert update.weights == {"selfnpo.ema_update": 1}


OTHERS = {
    "data": ["--rollout.start", "data", "--data.source", "digits"],
    "naive": ["--rollout.noising", "naive"],
    "l2": ["--loss.kind", "l2"],
    "huber": ["--loss.kind", "huber"],
    "lora": ["--lora.rank", "2"],
}


@pytest.mark.parametrize("name", OTHERS)
def test_an_update_of_other_recipes(name, monkeypatch, tmp_path):
    update = run(monkeypatch, tmp_path / "run", *OTHERS[name])
    assert update.latents == {"selfnpo.tdft_step": 1, **LOSS}
    assert update.weights == {"selfnpo.ema_update": 1}
    assert not {"aten._to_copy", "aten.copy_"} & update.seen.keys(), "float32 latents are not copied either"


@pytest.mark.slow
def test_an_update_in_bf16(monkeypatch, tmp_path):
    """The shadow of the moving average is written by the op that moves it."""
    update = run(monkeypatch, tmp_path / "run", "--engine.precision", "bf16")
    assert update.latents == {"selfnpo.tdft_step": 1, **LOSS}
    assert update.weights == {"selfnpo.ema_update": 1}
    assert update.seen["aten._to_copy"] == 2, "what the two networks are given"


def test_an_update_of_lockstep_rollouts(monkeypatch, tmp_path):
    words = ["--rollout.mode", "lockstep", "--rollout.stop", "fixed", "--rollout.k", "2"]
    update = run(monkeypatch, tmp_path / "run", *words)
    # Start noise, two steps and one more evaluation for the target, Eq. 16.
    fused = {"selfnpo.normal": 1, "selfnpo.guided_step": 3, "selfnpo.affine_noise": 1}
    assert update.latents == {**fused, **LOSS}
    assert update.weights == {"selfnpo.ema_update": 1}


def test_eager_arithmetic_would_be_seen(monkeypatch, tmp_path):
    """The step of the plain PyTorch backend in place of the op that calls it."""

    def eager(pos, neg, x, final, slots, next_slots, tables, rules, latents):
        return reference.tdft_step(
            pos, neg, x, final, slots, next_slots,
            tables.step, tables.start, tables.renoise, tables.timesteps, tables.weight, latents,
            rules.num_prompts, rules.stride, rules.max_steps, rules.seed, rules.dropout, rules.shuffled, rules.naive,
        )  # fmt: skip

    monkeypatch.setattr(continuous, "tdft_step", eager)
    update = run(monkeypatch, tmp_path / "run")
    assert {"aten.mul", "aten.add", "aten.where"} <= update.latents.keys()


def test_an_eager_average_would_be_seen(monkeypatch, tmp_path):
    monkeypatch.setattr(moving_reference, "ema_update", reference.ema_update)
    update = run(monkeypatch, tmp_path / "run")
    assert "aten.lerp_" in update.weights


def test_an_eager_loss_would_be_seen(monkeypatch, tmp_path):
    def eager(pred, x_s, target, k, kind, weight, c, index):
        k0, k1 = (k[index, j].view(-1, 1, 1, 1) for j in range(2))
        per_sample = (k0 * x_s + k1 * pred - target).square().flatten(1).mean(1)
        return (per_sample * weight).mean(), per_sample.detach()

    monkeypatch.setattr(objective, "x0_loss", eager)
    update = run(monkeypatch, tmp_path / "run")
    assert {"aten.mul", "aten.sub", "aten.mean"} <= update.latents.keys()


@pytest.mark.parametrize("solver", ["dpm++", "ddim", "euler"])
def test_a_sampler_step(solver):
    adapter = load_adapter("digits")
    denoiser = adapter.load_denoiser(torch.float32)
    negative = adapter.load_denoiser(torch.float32)
    empty = adapter.encode_empty(torch.device("cpu"))
    prompts = {name: row.expand(BATCH, *row.shape[1:]) for name, row in empty.items()}
    config = SamplerConfig(steps=3, guidance_scale=3.0, solver=solver)
    against = Negative(source="test", network=negative, deltas=None)
    with Dispatched({BATCH * LATENT, 2 * BATCH * LATENT}, denoiser, negative) as mode:
        GuidedSampler(adapter, denoiser, against).latents(prompts, empty, range(BATCH), config)
    looked = {"aten.aminmax": 1}  # at the end of the call: is what was drawn finite?
    assert mode.computing == {"selfnpo.normal": 1, "selfnpo.guided_step": 3, **looked}

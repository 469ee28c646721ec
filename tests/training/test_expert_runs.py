"""Runs of a model with two experts: which is trained, what is written, and how a run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import crash
import pytest
import tiny_transformers
import torch
from diffusers import WanPipeline
from runs import CASE, at_update
from safetensors import safe_open
from safetensors.torch import load_file

from selfnpo_fast import GuidedSampler, attach_negative, train
from selfnpo_fast.cli import main
from selfnpo_fast.models import load_adapter
from selfnpo_fast.models.experts import Experts
from selfnpo_fast.negatives.load import load_negative
from selfnpo_fast.runtime import console
from selfnpo_fast.training.trainer import Trainer

NAMES = ("transformer", "transformer_2")
SIZE = ["--model.height", "32", "--model.width", "48", "--model.frames", "5"]
OWN = {"high": NAMES[:1], "low": NAMES[1:], "both": NAMES}
LORA = "pytorch_lora_weights.safetensors"
FULL = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_transformers.write_wan(tmp_path_factory.mktemp("wan"), experts=2)


def words(model: Path, output: Path, *more: str, **changes) -> list[str]:
    return [*crash.words(CASE | changes, model, output), *SIZE, "--updates", "4", *more]


def run(model: Path, output: Path, *more: str, **changes) -> int:
    return train.main(words(model, output, *more, **changes))


def tensors(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {str(path.relative_to(folder)): load_file(path) for path in sorted(folder.rglob("*.safetensors"))}


def assert_same(one: Path, other: Path) -> None:
    found, expected = tensors(one), tensors(other)
    assert found.keys() == expected.keys()
    for file, values in expected.items():
        assert all(torch.equal(found[file][name], value) for name, value in values.items()), file


@pytest.mark.parametrize(
    ("expert", "lora"),
    [
        ("low", 0),
        ("both", 2),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("high", 0), ("both", 0), ("low", 2), ("high", 2))),
    ],
)
def test_only_the_named_experts_move_and_each_has_its_folder(expert, lora, model, tmp_path, monkeypatch, capfd):
    """A resumed run ends in the same bits, and its checkpoint gives the same negative."""
    monkeypatch.setattr(console, "_said", set())
    more, seen = ["--model.expert", expert], []

    def look(trainer) -> None:
        student, reference = trainer.engine.module, trainer.reference.module
        assert isinstance(student, Experts) and student.trained == OWN[expert]
        base = trainer.adapter.load_denoiser(torch.float32)
        for name in NAMES:
            now, before = (dict(network.get_submodule(name).named_parameters()) for network in (student, base))
            moved = any(not torch.equal(now[key], before[key]) for key in now.keys() & before.keys())
            assert moved == (not lora and name in OWN[expert])
        if not lora:  # what is not trained is in memory once
            pairs = zip(student.named_parameters(), reference.named_parameters(), strict=True)
            assert all((a is b) == (not a.requires_grad) for (_, a), (_, b) in pairs)
        seen.append({name.partition(".")[0] for name, _ in trainer.engine.trainable})

    at_update(monkeypatch, 4, look)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(model, whole, *more, lora=lora) == 0
    assert seen == [set(OWN[expert])]
    assert run(model, parts, *more, "--updates", "2", lora=lora) == 0
    assert run(model, parts, *more, "--resume", lora=lora) == 0
    assert_same(parts / "negative", whole / "negative")
    assert main(["export", "--checkpoint", str(parts), "--output", str(tmp_path / "exported")]) == 0
    assert_same(tmp_path / "exported", whole / "negative")
    file = LORA if lora else FULL
    assert list(tensors(whole / "negative")) == [f"{name}/{file}" for name in OWN[expert]]
    line = "model.expert: low: 20% of the pairs are of states above its noise levels; they weigh 0, and the student "
    assert capfd.readouterr().err.count(line + "does not compute them") == (1 if expert == "low" else 0)


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory) -> dict[str, Path]:
    """Runs of both experts, whose kinds of negatives are the keys."""
    root = tmp_path_factory.mktemp("runs")
    for name, lora in (("full", 0), ("lora", 2)):
        assert run(model, root / name, "--updates", "2", lora=lora) == 0
    return {name: root / name for name in ("full", "lora")}


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_is_a_negative_of_both_and_each_folder_of_its_own(kind, runs, model, caplog):
    pipe = WanPipeline.from_pretrained(model)
    for source in (runs[kind], runs[kind] / "negative"):
        with attach_negative(pipe, source):
            assert all(getattr(pipe, name)._forward_pre_hooks for name in NAMES)
        GuidedSampler.from_pipeline(pipe, source)
    for name, other in (NAMES, NAMES[::-1]):
        part = runs[kind] / "negative" / name
        caplog.clear()
        with attach_negative(pipe, part):
            assert getattr(pipe, name)._forward_pre_hooks and not getattr(pipe, other)._forward_pre_hooks
        load_negative(getattr(pipe, name), part)
        assert not [record for record in caplog.records if "other weights" in record.getMessage()]
        record = json.loads((part / "selfnpo.json").read_text()) if kind == "full" else None
        if kind == "lora":
            with safe_open(part / LORA, "pt") as file:
                record = json.loads(file.metadata()["selfnpo_base"])
        assert record["denoiser"] == name


def test_diffusers_loads_the_lora_of_each_expert(runs, model):
    pipe = WanPipeline.from_pretrained(model)
    for name in NAMES:
        part = runs["lora"] / "negative" / name
        pipe.load_lora_weights(part, weight_name=LORA, load_into_transformer_2=name == "transformer_2")
        stored = load_file(part / LORA)
        loaded = dict(getattr(pipe, name).named_parameters())
        found = {key: value for key, value in loaded.items() if ".lora_" in key}
        assert len(found) == len(stored)
        for key, value in stored.items():
            own = key.removeprefix("transformer.").replace(".weight", ".default_0.weight")
            own = own if own in found else own.replace("default_0", "default_1")
            assert torch.equal(found[own], value)


def test_a_wrong_expert_writes_nothing(model, tmp_path, capfd):
    one = tiny_transformers.write_wan(tmp_path / "one")
    for path, expert in ((model, "middle"), (one, "low")):
        assert run(path, tmp_path / "run", "--model.expert", expert) == 2
        assert not (tmp_path / "run").exists()
        assert main(["doctor", *words(path, tmp_path / "run", "--model.expert", expert)]) == 2
    said = capfd.readouterr().err
    assert "model.expert" in said and "has one denoiser; leave it out" in said and "Traceback" not in said


def test_an_update_is_that_of_the_expert_alone(model, tmp_path, monkeypatch):
    """The gradient of one update of `low` against the pairs' loss with that network and no other."""
    found, original = {}, Trainer.train_update

    def keep(trainer, recorder):
        update = trainer.producer.take()
        trainer.producer.take = lambda: update
        found["pairs"] = [{k: v.clone() for k, v in vars(pairs).items()} for pairs in update.micro_batches]
        before = {name: p.detach().clone() for name, p in trainer.engine.trainable}
        original(trainer, recorder)
        found["moved"] = {name: p.detach() - before[name] for name, p in trainer.engine.trainable}
        found["table"] = trainer.table

    monkeypatch.setattr(Trainer, "train_update", keep)
    more = ["--model.expert", "low", "--updates", "1", "--optimizer.warmup", "0", "--optimizer.clip", "0"]
    assert run(model, tmp_path / "run", *more, "--optimizer.weight_decay", "0", "--loss.kind", "l2") == 0
    adapter = load_adapter(str(model), height=32, width=48, frames=5)
    low = adapter.load_denoiser(torch.float32).transformer_2.requires_grad_(True)
    (pairs,) = found["pairs"]
    own = pairs["weight"] > 0
    assert 0 < int(own.sum())
    x, s, target = pairs["x_s"][own], pairs["s"][own], pairs["target"][own]
    assert (s < adapter.schedule.num_train_timesteps).all() and bool((adapter.expert(s) == 1).all())
    rows = {name: value[pairs["rows"][own]] for name, value in found["table"].rows.items()}
    sigma = adapter.schedule.sigma[s].float().view(-1, 1, 1, 1, 1)
    x0 = x - sigma * adapter.predict_level(low, x, s, rows)
    per_pair = (x0 - target).square().flatten(1).mean(1)
    loss = (per_pair * pairs["weight"][own]).sum() / len(pairs["weight"])
    gradients = torch.autograd.grad(loss, low.parameters())
    for (name, _), gradient in zip(low.named_parameters(), gradients, strict=True):
        step = -1e-2 * gradient / (gradient.abs() + 1e-8)  # Adam's first
        moved = found["moved"][f"transformer_2.{name}"]
        clear = gradient.abs() > 1e-5
        torch.testing.assert_close(moved[clear], step[clear], rtol=1e-2, atol=1e-5)


# Several ranks


def finished(model: Path, output: Path, logs: Path, ranks: int, *more: str, **changes) -> None:
    logs.mkdir()
    processes = crash.start(ranks, words(model, output, *more, ranks=ranks, **changes), logs)
    assert crash.finish(processes, logs) == [0] * ranks, crash.tail(logs)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_ranks_that_meet_other_experts_train_as_one_does(zero, model, tmp_path):
    """Two pairs of a rank are often of one expert: every rank has gradients of both all the same."""
    more = ["--model.expert", "both", "--optimizer.lr", "1e-3"]
    assert run(model, tmp_path / "one", *more) == 0
    finished(model, tmp_path / "two", tmp_path / "logs", 2, *more, zero=zero)
    one, two = tensors(tmp_path / "one" / "negative"), tensors(tmp_path / "two" / "negative")
    assert one.keys() == two.keys()
    for file, values in one.items():
        for name, value in values.items():
            torch.testing.assert_close(two[file][name], value, rtol=1e-3, atol=2e-4)


@pytest.mark.slow
def test_zero_3_of_one_expert_trains_as_zero_0(model, tmp_path):
    """The frozen expert stays whole on every rank."""
    more = ["--model.expert", "low", "--optimizer.lr", "1e-3"]
    assert run(model, tmp_path / "one", *more) == 0
    finished(model, tmp_path / "two", tmp_path / "logs", 2, *more, zero=3)
    one, two = tensors(tmp_path / "one" / "negative"), tensors(tmp_path / "two" / "negative")
    assert list(two) == list(one) == [f"transformer_2/{FULL}"]
    for name, value in one[f"transformer_2/{FULL}"].items():
        torch.testing.assert_close(two[f"transformer_2/{FULL}"][name], value, rtol=1e-3, atol=2e-4)

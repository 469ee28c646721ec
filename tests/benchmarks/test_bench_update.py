"""The benchmark of whole updates: its arms, its gate, its files, and runs that leave no memory."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import weakref
from pathlib import Path

import pytest
import tiny
import torch

from benchmarks import bench_update
from benchmarks.arms.update import ARMS, check_lines, hidden_shares, said
from benchmarks.random_run import RandomRun, recipe
from selfnpo_fast.config import EngineConfig, ModelConfig, PromptConfig, RolloutConfig, TrainConfig
from selfnpo_fast.doctor.random_inputs import random_inputs
from selfnpo_fast.doctor.report import make_tracer
from selfnpo_fast.models import load_adapter
from selfnpo_fast.rollout import OverlappedProducer
from selfnpo_fast.runtime.capture import CudaGraphs
from selfnpo_fast.runtime.world import World, init_world
from selfnpo_fast.training.inputs import load_inputs

ARM = {arm.name: arm for arm in ARMS}


@pytest.fixture(scope="module")
def world() -> World:
    return init_world()


def test_random_inputs_have_the_shapes_of_loaded_ones(tmp_path, world):
    engine = EngineConfig(precision="bf16", batch_size=4)
    model, prompts = ModelConfig(path=str(tiny.write_sdxl(tmp_path))), PromptConfig(limit=9)
    config = TrainConfig(model=model, prompts=prompts, engine=engine, rollout=RolloutConfig(grid_steps=5))
    real, state = load_inputs(config, world), torch.random.get_rng_state()
    found = [random_inputs(config, load_adapter(str(tmp_path), configs_only=True), 9, world) for _ in range(2)]
    assert torch.equal(torch.random.get_rng_state(), state)

    def layout(tensors) -> dict:
        return {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}

    assert layout(found[0].student.state_dict()) == layout(real.student.state_dict())
    assert layout(found[0].table.rows) == layout(real.table.rows)
    assert len(found[0].prompts) == len(real.prompts) == 9
    first, second = (inputs.student.state_dict() for inputs in found)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_random_weights_are_made_on_the_device_itself():
    adapter, devices = load_adapter("digits"), []

    class Watched:
        conditioning_shapes = adapter.conditioning_shapes

        def new_denoiser(self, dtype):
            devices.append(torch.empty(0).device.type)
            return adapter.new_denoiser(dtype)

    inputs = random_inputs(TrainConfig(), Watched(), 3, World(0, 1, torch.device("meta")))
    assert devices == ["meta"]
    assert {p.device.type for p in inputs.student.parameters()} == {"meta"}
    assert {rows.device.type for rows in inputs.table.rows.values()} == {"meta"}


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_run_that_is_closed_leaves_no_parameter(world, tmp_path, precision):
    words = ["--engine.batch_size", "2", "--rollout.pool", "1", "--rollout.grid_steps", "5", "--prompts.limit", "9"]
    config = recipe("digits", *words, "--engine.precision", precision, "--optimizer.name", "adamw")
    run = RandomRun(config, make_tracer(config), world, tmp_path)
    run.update()
    trainer = run.trainer
    kept = [weakref.ref(p) for p in (*trainer.engine.module.parameters(), *trainer.reference.module.parameters())]
    kept += [weakref.ref(s["exp_avg"]) for s in trainer.engine.engine.basic_optimizer.state.values()]
    del trainer
    run.close()
    del run
    gc.collect()
    assert [ref() for ref in kept if ref() is not None] == []


def test_share_of_the_forward_that_overlap_hides():
    def arm(median: float) -> dict:
        return {"seconds_per_update": {"median": median}}

    arms = {"plain": arm(10), "student_only": arm(6), "overlap": arm(7), "graphs": arm(8), "overlap_graphs": arm(6)}
    assert hidden_shares(arms) == {"overlap": 0.75, "overlap_graphs": 1}
    assert hidden_shares({"plain": arm(10), "overlap": arm(7), "student_only": {"error": "full"}}) == {}
    assert hidden_shares(arms | {"graphs": arm(8) | {"error": "off"}}) == {"overlap": 0.75}


def test_graphs_that_were_given_up_are_an_error(monkeypatch):
    """The line that `CudaGraphs` logs is the one that the benchmark waits for."""

    @contextlib.contextmanager
    def context(*args, **kwargs):
        yield

    @contextlib.contextmanager
    def fails(*args, **kwargs):
        raise RuntimeError("not permitted while capturing")
        yield

    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, context)
    for name in ("Stream", "CUDAGraph", "graph_pool_handle", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    monkeypatch.setattr(torch.cuda, "graph", fails)
    step = CudaGraphs(torch.device("cuda", 0))(lambda: (torch.zeros(1),))
    with said() as lines:
        for _ in range(3):
            check_lines(lines)
            step()
    with pytest.raises(RuntimeError, match="not permitted while capturing"):
        check_lines(lines)


def test_an_arm_that_trains_on_other_pairs_is_not_timed_and_the_others_are(tmp_path, monkeypatch, capsys):
    """Overlap is broken: every update gets the first one's pairs."""
    take = OverlappedProducer.take

    def stale(self):
        self.first = getattr(self, "first", None) or take(self)
        return self.first

    monkeypatch.setattr(OverlappedProducer, "take", stale)
    written = []
    monkeypatch.setattr(bench_update, "write_json", lambda path, result: written.append(copy.deepcopy(result)))
    words = ["--tiny", "--peak_tflops", "1"]
    for name in ("plain", "overlap", "graphs"):
        words += ["--arm", name]
    assert bench_update.main([*words, "--", "--rollout.grid_steps", "2"]) == 1
    final = written[-1]
    assert [result["complete"] for result in written] == [False] * (len(written) - 1) + [True]
    assert any(len(result.get("arms", {}).get("plain", {}).get("rounds", ())) == 1 for result in written), "each round"
    assert "first losses" in final["arms"]["overlap"]["error"]
    assert "seconds_per_update" not in final["arms"]["overlap"]
    assert final["arms"]["graphs"]["skipped"] == "CUDA graphs need a GPU"
    plain = final["arms"]["plain"]
    seconds = plain["seconds_per_update"]["median"]
    assert sorted(plain["rounds"])[0] <= seconds <= sorted(plain["rounds"])[1]
    assert plain["pairs_per_second"] == pytest.approx(4 / seconds)
    assert plain["hours_per_1000_updates"] == pytest.approx(1000 * seconds / 3600)
    assert plain["share_of_peak"] == plain["tflops"] > 0
    assert plain["left_bytes"] < 2**20
    assert "overlap        failed" in capsys.readouterr().out


@pytest.mark.slow
def test_all_arms_of_a_cpu(tmp_path):
    output = tmp_path / "update.json"
    assert bench_update.main(["--tiny", "--output", str(output)]) == 0
    result = json.loads(Path(output).read_text())
    arms = result["arms"]
    assert list(arms) == [arm.name for arm in ARMS]
    for name, record in arms.items():
        assert ("skipped" in record) == ARM[name].graphs
        assert ("seconds_per_update" in record) == (not ARM[name].graphs)
        assert record.get("left_bytes", 0) < 2**20
    assert arms["plain"]["fill_s"] > 0
    assert not any("fill_s" in record for name, record in arms.items() if name != "plain")
    assert arms["student_only"]["loss"] > 0
    # The gate's losses are equal, but for the order of sums.
    assert result["gate"]["arms"]["overlap"]["largest_error"] == 0

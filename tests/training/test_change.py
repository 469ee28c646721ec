"""How far a negative moves guidance, against closed forms and against the networks of a run."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import replace
from pathlib import Path

import crash
import pytest
import tiny
import torch
from runs import CASE, run

from selfnpo_fast.config import LogConfig
from selfnpo_fast.models import load_adapter
from selfnpo_fast.models.conditioning import ConditioningTable
from selfnpo_fast.runtime.world import init_world
from selfnpo_fast.training.change import GuidedChange

P, N = 0.7, -0.2
"""What the base predicts with a prompt, and without one, everywhere."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.write_sd(tmp_path_factory.mktemp("model"))


class Constant(torch.nn.Module):
    """A network that predicts a constant with the empty prompt's row, and P with others."""

    dtype = torch.float32

    def __init__(self, negative: float) -> None:
        super().__init__()
        self.negative, self.weight = negative, torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, t, encoder_hidden_states, return_dict):
        of_row = torch.where(encoder_hidden_states[:, 0, 0] > 0, P, self.negative)
        return (of_row[:, None, None, None].expand_as(x).clone(),)


class Engine:
    """A student that no engine trains."""

    stage, device = 0, torch.device("cpu")

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module


def measured(model: Path, step: float, log: LogConfig) -> GuidedChange:
    rows = torch.tensor([0.0, 1.0, 1.0, 1.0])[:, None, None].expand(4, 2, 3)
    table = ConditioningTable({"encoder_hidden_states": rows})
    adapter, engine = load_adapter(str(model)), Engine(Constant(N + step))
    return GuidedChange(adapter, lambda: Constant(N), engine, table, log, 25, init_world())


def said(caplog) -> logging.LogRecord:
    """The one line about the change."""
    (record,) = [record for record in caplog.records if "guid" in record.message]
    return record


@pytest.mark.parametrize("scale", [3.0, 7.5])
@pytest.mark.parametrize("share", [0.009, 0.011, 0.5])
def test_the_change_is_that_of_the_closed_form(scale, share, model, caplog):
    """(scale - 1) |n' - n| / |n + scale (p - n)|, whatever the state."""
    guided = N + scale * (P - N)
    change = measured(model, share * guided / (scale - 1), LogConfig(sample_guidance_scale=scale))
    with caplog.at_level("INFO"):
        change.report()
    record = said(caplog)
    assert re.search(rf"guided predictions by {share:.2%} at guidance_scale {scale:g}", record.message)
    assert (record.levelname == "WARNING") == ("less than 1%" in record.message) == (share < 0.01)
    assert math.isclose(change.measure(), share, rel_tol=1e-5)


def test_the_prompt_of_the_negative_branch_and_no_guidance(model):
    """With the positive's prompt both branches predict P: the base's guidance is P as well."""
    log = LogConfig(sample_guidance_scale=4, negative_prompt="same")
    assert measured(model, 0.3, log).measure() == 0
    assert measured(model, 0.3, replace(log, sample_guidance_scale=1.0)).measure() is None


def test_a_base_that_cannot_be_loaded_costs_a_line(model, caplog):
    change = measured(model, 0.3, LogConfig())

    def base():
        raise torch.OutOfMemoryError("no room for the base")

    change.base = base
    change.report()
    record = said(caplog)
    assert record.message.endswith("could not be measured: no room for the base; training goes on")


@pytest.mark.parametrize("lora", [0, 2])
def test_a_run_says_when_it_has_hardly_moved(lora, model, tmp_path, capfd):
    words = ["--updates", "1", "--optimizer.warmup", "0", "--log.sample_every", "0"]
    words += ["--log.sample_steps", "1", "--log.sample_prompts", "1"]
    for rate, moves in (("1e-9", False), ("1e-1", True)):
        assert run(model, tmp_path / rate, *words, "--optimizer.lr", rate, lora=lora) == 0
        log = capfd.readouterr().err
        assert "the negative moves guided predictions by" in log
        assert ("less than 1%, which is hardly seen" in log) != moves


@pytest.mark.slow
def test_ranks_of_zero_3_measure_what_one_rank_does(model, tmp_path):
    found = []
    for ranks, stage in ((1, 0), (2, 3)):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        argv = crash.words(CASE | {"ranks": ranks, "zero": stage, "reference": "frozen"}, model, folder / "run")
        argv += ["--updates", "2", "--log.export_every", "1"]
        assert crash.finish(crash.start(ranks, argv, folder), folder) == [0] * ranks, crash.tail(folder)
        log = (folder / "rank0.log").read_text()
        found.append([float(v) for v in re.findall(r"guided predictions by ([\d.]+)%", log)])
        if ranks == 2:
            assert "guided predictions" not in (folder / "rank1.log").read_text()
    assert len(found[0]) == 2
    assert found[1] == pytest.approx(found[0], rel=1e-2)

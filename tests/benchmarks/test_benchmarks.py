"""The benchmarks: the gate before every timing, their files, and the runner."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import bench_busy, bench_rollout, bench_step, run
from benchmarks.arms.step import ARMS, FULL, K5, ReleasedRollout, UnbatchedPredictor, Workbench, expected_forwards
from benchmarks.bench_step import check_arms
from benchmarks.environment import slug, write_json
from benchmarks.nets import digits
from selfnpo_fast.rollout import ContinuousRollout, GuidedPredictor, LockstepRollout

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
ARM = {arm.name: arm for arm in ARMS}


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench(digits(), batch=bench_step.GATE_BATCH, device=CPU, dtype=torch.float32)


def test_gate_passes_and_counts_the_forwards(bench):
    gate = check_arms(bench)
    assert gate.failures == []
    assert gate.largest_error < bench_step.TOLERANCE  # 0 seen
    assert gate.forwards == {
        "released": 12,
        "released_live": 6,
        "full": 52,
        "full_live": 26,
        "lockstep": 4.5,  # two samples, one of which passes index 0 before 5 steps and is left out from there on
        "continuous": 1,
        "continuous_w5": 2,
        "floor_forward": 1,
        "floor": 0,
    }


class Conditional(GuidedPredictor):
    """Uses the wrong branch."""

    def __call__(self, x, t, rows):
        self.forwards += len(x)
        return None, self.predict(x, t, self.table.gather(rows))


class Miscounting(UnbatchedPredictor):
    def __call__(self, x, t, rows):
        out = super().__call__(x, t, rows)
        self.forwards -= 1
        return out


class Skipping(UnbatchedPredictor):
    """Counts the forward of the unused branch without making it."""

    def __call__(self, x, t, rows):
        self.forwards += 2 * len(x)
        neg = self.predict(x, t, self.table.empty(len(x)))
        return neg, neg


class Disturbing(LockstepRollout):
    """Changes samples that have arrived at t = 0."""

    def next_pairs(self):
        pairs = super().next_pairs()
        ended = (pairs.t == 0).view(-1, 1, 1, 1)
        return replace(pairs, target=torch.where(ended, 1.01 * pairs.target, pairs.target))


class OtherSamples(ReleasedRollout):
    def next_pairs(self):
        self.next_id += 1
        return super().next_pairs()


class OffTrajectory(ContinuousRollout):
    """Its states drift a little at every step."""

    def next_pairs(self):
        pairs = super().next_pairs()
        self.x *= 1.001
        return pairs


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("released_live", {"predictor": Conditional}, "target differs"),
        ("released", {"predictor": Miscounting}, "24 forwards, 18 counted, 24 expected"),
        ("released", {"predictor": Skipping}, "12 forwards, 24 counted, 24 expected"),
        ("lockstep", {"rollout": Disturbing}, "target differs"),
        ("released", {"rollout": OtherSamples}, "other sample_ids"),
        ("continuous", {"rollout": OffTrajectory}, "x_s differs"),
        ("full_live", {"rollout": LockstepRollout, "predictor": Conditional}, "x_s differs"),
    ],
    ids=str,
)
def test_gate_stops_a_wrong_arm(bench, name, changes, message):
    gate = check_arms(bench, [replace(ARM[name], **changes)])
    assert any(failure.startswith(f"{name}: ") and message in failure for failure in gate.failures), gate.failures


def test_gate_takes_nan_for_a_failure():
    gate = bench_step.Gate()
    gate.compare("arm", "target", torch.tensor([float("nan")]), torch.ones(1))
    assert gate.failures


def test_gate_sees_samples_that_arrive_early_and_some_that_do_not(bench):
    """Only such a batch shows whether the wait at t = 0 is right."""
    rollout = bench.rollout(ARM["released"])
    rollout.next_id = bench_step.mixed_batch(rollout, 5)
    draws = rollout.draws(torch.arange(rollout.next_id, rollout.next_id + 2))
    assert draws.start_index.min() + 1 < 5 <= draws.start_index.max() + 1


def test_pairs_at_the_end_of_a_trajectory_have_its_last_state_for_a_target(bench):
    """The gate may see no pair at t = 0, so this test compares calls until one has such a pair."""
    rollout = bench.rollout(ARM["continuous"])
    ended = False
    while not ended:
        pairs = rollout.next_pairs()
        x_s, target = bench_step.on_trajectory(rollout.maker, pairs)
        torch.testing.assert_close(pairs.x_s, x_s, rtol=1e-5, atol=1e-5)  # 0 seen
        torch.testing.assert_close(pairs.target, target, rtol=1e-5, atol=1e-5)  # 0 seen
        ended = bool((pairs.t == 0).any())


def test_as_released_pays_all_steps_where_ours_stops(bench):
    """In a batch whose samples all start below index 4 the authors' loop makes useless steps."""
    start = bench.rollout(ARM["lockstep"]).draws(torch.arange(512)).start_index
    first = int((start.unfold(0, 2, 1).amax(1) < 4).nonzero()[0])
    for name in ("released_live", "lockstep"):
        rollout = bench.rollout(ARM[name])
        rollout.next_id = first
        steps = 10 if name == "released_live" else int(start[first : first + 2].sum()) + 2
        before = bench.forwards
        expected = expected_forwards(ARM[name], rollout)
        rollout.next_pairs()
        assert bench.forwards - before == expected == steps + 2


def test_step_gives_the_student_the_gradient_of_the_loss(bench):
    """Against the L2 loss of Eq. 17 written out; the reference gets no gradient."""
    pairs = bench.rollout(ARM["continuous"]).next_pairs()
    bench.student.zero_grad()
    bench.step(pairs)
    ours = bench.student.conv_in.weight.grad.clone()
    bench.student.zero_grad()
    a = bench.net.schedule.alphas_cumprod[pairs.s].float().view(-1, 1, 1, 1)
    pred = bench.student(pairs.x_s, pairs.s, bench.cond.rows["encoder_hidden_states"][pairs.rows]).sample
    (((pairs.x_s - (1 - a).sqrt() * pred) / a.sqrt() - pairs.target) ** 2).mean().backward()
    torch.testing.assert_close(ours, bench.student.conv_in.weight.grad, rtol=1e-4, atol=3e-6)  # 7e-7 of up to 0.7 seen
    assert ours.abs().max() > 0
    assert all(p.grad is None for p in bench.reference.parameters())


def test_run_writes_what_it_printed(tmp_path, capsys):
    """Ratios are recomputed from single rounds; a chart lies next to the JSON."""
    output = tmp_path / "new" / "step.json"
    few = [ARM["released"], ARM["continuous"], ARM["floor_forward"], ARM["floor"]]
    argv = ["--net", "digits", "--batch", "3", "--rounds", "2", "--device", "cpu", "--output", str(output)]
    assert bench_step.main(argv, few) == 0
    result = json.loads(output.read_text())
    assert {"device", "torch", "threads", "date", "git_commit"} <= result["environment"].keys()
    assert result["arguments"]["rounds"] == 2
    net = result["nets"]["digits"]
    assert (net["parameters"], net["batch"], net["rounds"], net["precision"]) == (1_077_572, 3, 2, "fp32")
    arms = {arm["name"]: arm for arm in net["arms"]}
    assert [(arm["start"], arm["k"], arm["w"], arm["forwards_per_pair"]) for arm in net["arms"]] == [
        ("data", 5, -1, 12),
        ("noise", None, -1, 1),
        (None, None, None, 1),
        (None, None, None, 0),
    ]
    assert all(net["seconds_per_update"][name]["low"] > 0 for name in ("optimiser", "ema"))
    for arm in arms.values():
        rounds = arm["rounds_seconds_per_pair"]
        assert len(rounds) == 2
        assert arm["seconds_per_pair"]["median"] == pytest.approx(statistics.median(rounds))
        for other in ("continuous", "floor_forward", "floor"):
            ratios = [a / b for a, b in zip(rounds, arms[other]["rounds_seconds_per_pair"], strict=True)]
            spread = {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
            assert arm[f"ratio_to_{other}"] == pytest.approx(spread)
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for arm in arms.values():
        line = next(line for line in printed.splitlines() if line.startswith(arm["label"]))
        assert f"{arm['seconds_per_pair']['median']:.3g} [" in line
        assert f"{arm['ratio_to_continuous']['median']:.2f} [" in line


def test_nothing_is_timed_after_a_failed_gate(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_step, "measure", lambda *_: pytest.fail("timed"))
    output = tmp_path / "step.json"
    wrong = [replace(ARM["released_live"], predictor=Conditional)]
    assert bench_step.main(["--quick", "--device", "cpu", "--output", str(output)], wrong) == 1
    assert not output.exists()
    assert "released_live: target differs" in capsys.readouterr().err


def test_timing_stops_at_a_wrong_number_of_forwards(bench, monkeypatch):
    arms = [replace(ARM["released"], predictor=Skipping), ARM["continuous"]]
    with pytest.raises(RuntimeError, match="released: 12 forwards, 24 expected"):
        bench_step.measure(bench, 1, arms)


def test_arms_are_those_of_the_issue():
    """The settings of each row of the table."""
    assert (K5.start, K5.max_steps, K5.omega, K5.grid_steps) == ("data", 5, -1, 25)
    assert (FULL.start, FULL.stop, FULL.max_steps, FULL.omega) == ("noise", "fixed", 25, -1)
    assert [(arm.config and arm.config.omega, arm.config and arm.config.mode) for arm in ARMS[4:]] == [
        (-1, "lockstep"),
        (-1, "continuous"),
        (-5, "continuous"),
        (None, None),
        (None, None),
    ]


STUB = """
import json, sys
output = sys.argv[sys.argv.index("--output") + 1]
print("words on standard error", file=sys.stderr)
{ending}
"""


def stub(ending: str) -> tuple[str, ...]:
    return (sys.executable, "-c", STUB.format(ending=ending))


def test_runner_goes_on_after_a_failure_and_records_it(tmp_path, monkeypatch):
    write = "json.dump({'argv': sys.argv[1:]}, open(output, 'w'))"
    registry = {
        "crash": stub("raise SystemExit(3)"),
        "good": stub(write),
        "empty": stub(""),
        "late": stub(f"{write}; raise SystemExit(1)"),
    }
    monkeypatch.setattr(run, "BENCHMARKS", registry)
    name = slug(run.describe(CPU)["device"])
    (tmp_path / name).mkdir()
    (tmp_path / name / "empty.json").write_text("{}")  # of an earlier run
    assert run.main(["--device", "cpu", "--quick", "--output", str(tmp_path)]) == 1
    written = json.loads((tmp_path / f"{name}.json").read_text())
    records = written["benchmarks"]
    assert list(records) == list(registry)
    assert written["quick"] is True
    assert written["environment"]["torch"] == torch.__version__
    assert records["crash"]["error"] == "exit status 3\nwords on standard error"
    assert records["good"]["result"]["argv"][:3] == ["--device", "cpu", "--quick"]
    assert "error" not in records["good"]
    assert "no readable result" in records["empty"]["error"]
    assert records["late"]["error"].startswith("exit status 1")
    monkeypatch.setattr(run, "BENCHMARKS", {"good": registry["good"]})
    assert run.main(["--device", "cpu", "--output", str(tmp_path)]) == 0


@pytest.mark.slow
def test_registry_names_what_can_be_run():
    for name, command in run.BENCHMARKS.items():
        done = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for option in ("--device", "--output", "--quick"):
            assert option in done.stdout, (name, option)


def test_slug_is_a_file_name():
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert slug("CPU, 2 cores, AMD EPYC (R)") == "cpu-2-cores-amd-epyc-r"


def test_results_are_replaced_as_a_whole(tmp_path, monkeypatch):
    """A write that stops halfway, or a value that JSON does not know, leaves the old results."""
    output = tmp_path / "new" / "x.json"
    write_json(output, {"cases": [1]})
    with pytest.raises(TypeError):
        write_json(output, {"cases": [1, object()]})

    def stops(self, text, encoding):
        with self.open("w") as file:
            file.write(text[:5])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_text", stops)
        write_json(output, {"cases": [1, 2]})
    assert json.loads(output.read_text()) == {"cases": [1]}
    write_json(output, {"cases": [1, 2, 3]})
    assert [path.name for path in output.parent.iterdir()] == ["x.json"]
    assert json.loads(output.read_text()) == {"cases": [1, 2, 3]}


@pytest.mark.slow
def test_scaling_of_ranks_and_stages(tmp_path, capsys):
    """Two settings of the digits run; one has two ranks with ZeRO 2."""
    output = tmp_path / "rollout.json"
    assert bench_rollout.main(["--quick", "--device", "cpu", "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["settings"]
    assert [(row["ranks"], row["zero_stage"], row["batch"]) for row in rows] == [(1, 0, 4), (2, 2, 4)]
    assert all(row["seconds_per_pair"]["low"] > 0 and len(row["memory_gib"]) == row["ranks"] for row in rows)
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "ZeRO" in capsys.readouterr().out


@pytest.mark.slow
def test_a_busy_machine_is_measured_side_by_side(tmp_path, capsys):
    output = tmp_path / "busy.json"
    assert bench_busy.main(["--quick", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert result["environment"]["torch"] == torch.__version__
    assert list(result["loads"]) == ["idle", "busy"]
    for record in result["loads"].values():
        assert all(value["low"] > 0 for value in record["pairs_per_second"].values())
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "short : default" in capsys.readouterr().out


def test_ratios_of_a_busy_machine_are_taken_within_a_round():
    record = bench_busy.summarise({"busy": {"default": [1.0, 2.0, 4.0], "short": [10.0, 30.0, 20.0]}})["busy"]
    assert record["short_to_default"] == {"median": 10.0, "low": 5.0, "high": 15.0}


def test_arms_that_differ_are_not_timed(monkeypatch, tmp_path, capsys):
    class Stub:
        losses = iter((1.0, 1.1))

        def __init__(self, name, batch):
            self.loss = next(self.losses)

        def close(self):
            pass

    monkeypatch.setattr(bench_busy, "Trainer", Stub)
    assert bench_busy.main(["--output", str(tmp_path / "busy.json")]) == 1
    assert "the arms begin with losses 1.0 and 1.1" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_bench_step_runs_on_cuda(tmp_path):
    """Through the script; the gate compares the float32 arms on the GPU."""
    output = tmp_path / "step.json"
    command = [sys.executable, "benchmarks/bench_step.py", "--quick", "--net", "all", "--device", "cuda"]
    done = subprocess.run([*command, "--output", str(output)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    nets = json.loads(output.read_text())["nets"]
    assert {net["precision"] for net in nets.values()} == {"bf16"}
    assert [len(net["arms"]) for net in nets.values()] == [len(ARMS)] * 2

"""The benchmarks: their files, scaling, a busy machine, and the runner of all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_busy, bench_rollout, profile_step, run
from benchmarks.environment import slug, write_json
from selfnpo_fast.config import EngineConfig, RolloutConfig, TrainConfig

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


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
        "torn": stub("open(output, 'w').write('{'); raise SystemExit(1)"),
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
    assert records["late"]["result"]["argv"][:2] == ["--device", "cpu"], "what it has measured is kept"
    assert "result" not in records["crash"]
    assert records["torn"]["error"].startswith("exit status 1")
    assert written["complete"] is True
    monkeypatch.setattr(run, "BENCHMARKS", {"good": registry["good"]})
    assert run.main(["--device", "cpu", "--output", str(tmp_path)]) == 0


def test_runner_that_is_stopped_leaves_the_benchmarks_before(tmp_path, monkeypatch):
    def run_one(command, output):
        if command[0] == "second":
            raise KeyboardInterrupt
        return {"result": 1}

    monkeypatch.setattr(run, "run_one", run_one)
    with pytest.raises(KeyboardInterrupt):
        run.run_all({"first": ["first"], "second": ["second"]}, device="cpu", results=tmp_path)
    written = json.loads((tmp_path / f"{slug(run.describe(CPU)['device'])}.json").read_text())
    assert (written["complete"], written["benchmarks"]) == (False, {"first": {"result": 1}})


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


def values(seconds: float) -> dict:
    spread = {"median": seconds, "low": seconds, "high": seconds}
    per_second = {key: 1 / value for key, value in spread.items()}
    memory = {"memory_gib": [2.0], "reserved_gib": [3.0]}
    return {"seconds_per_pair": spread, "pairs_per_second": per_second} | memory


@pytest.fixture
def one_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_gpu_gets_one_rank(one_gpu, monkeypatch, tmp_path, capsys):
    """NCCL refuses two ranks on one device."""
    asked = []
    monkeypatch.setattr(bench_rollout, "run_setting", lambda *a: asked.append(a) or values(0.5))
    output = tmp_path / "rollout.json"
    argv = ["--device", "cuda", "--batch", "4", "--updates", "3", "--output", str(output), "--", "--config", "x"]
    assert bench_rollout.main(argv) == 0
    assert asked == [(1, stage, 4, 3, ["--config", "x"], {}) for stage in (0, 2)]
    result = json.loads(output.read_text())
    assert result["complete"] is True
    left_out = [(row["ranks"], row["zero_stage"]) for row in result["left_out"]]
    assert left_out == [setting for setting in bench_rollout.SETTINGS if setting[0] == 2]
    said, printed = capsys.readouterr()[::-1]
    assert "2 ranks, ZeRO 1: left out, ranks need a GPU each; there are 1" in said
    assert printed.splitlines()[1].split() == ["1", "0", "4", "500", "[500,", "500]", "2", "2.00", "(3.00", "reserved)"]


@pytest.mark.parametrize(
    ("name", "visible", "variables", "gpus"),
    [
        ("cpu", None, {"CUDA_VISIBLE_DEVICES": ""}, None),
        ("cuda", None, {}, 3),
        ("cuda:2", None, {"CUDA_VISIBLE_DEVICES": "2"}, 1),
        ("cuda:1", "5,7", {"CUDA_VISIBLE_DEVICES": "7"}, 1),
    ],
)
def test_ranks_see_the_devices_that_were_asked_for(monkeypatch, name, visible, variables, gpus):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert bench_rollout.gpus_for(torch.device(name)) == (variables, gpus)


def test_a_setting_that_fails_leaves_the_others(one_gpu, monkeypatch, tmp_path, capsys):
    """The file has every setting as soon as it has ended."""
    output, files = tmp_path / "rollout.json", []

    def run_setting(ranks, stage, *_):
        files.append(json.loads(output.read_text()) if output.exists() else None)
        if stage == 2:
            raise RuntimeError("Traceback\n  torch.OutOfMemoryError: CUDA out of memory")
        return values(0.25)

    monkeypatch.setattr(bench_rollout, "run_setting", run_setting)
    settings = [word for stage in (0, 2, 1) for word in ("--setting", f"1,{stage}")]
    assert bench_rollout.main(["--device", "cuda", "--batch", "8", *settings, "--output", str(output)]) == 1
    result = json.loads(output.read_text())
    assert [(row["zero_stage"], "error" in row) for row in result["settings"]] == [(0, False), (2, True), (1, False)]
    assert result["settings"][1]["error"].endswith("CUDA out of memory")
    assert files[0] is None
    assert [(len(file["settings"]), file["complete"]) for file in files[1:]] == [(1, False), (2, False)]
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "failed: Traceback torch.OutOfMemoryError" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "untimed"),
    [({}, 3 + 4 * 3), ({"engine": EngineConfig(graphs=False)}, 3), ({"rollout": RolloutConfig(mode="lockstep")}, 3)],
)
def test_a_rank_s_clock_is_read_on_an_idle_device(monkeypatch, changes, untimed):
    """Waits for the device, then for the other ranks, before and after every update.

    Each of four groups of slots makes two plain steps and a capture before anything is timed.
    """
    events = []

    class Stub:
        """Trainer, recorder, world, producer and rollout at once."""

        device, config = torch.device("cuda", 0), TrainConfig(**changes)
        producer = rollout = property(lambda self: self)

        def __getattr__(self, name):
            return lambda *_: events.append(name)

    monkeypatch.setattr(profile_step, "make_trainer", lambda *_: (Stub(), Stub(), Stub()))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**31)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 3 * 2**30)
    result = bench_rollout.time_rank([], 2)
    update = ["synchronize", "barrier", "train_update", "discard", "synchronize", "barrier"]
    assert events == ["fill", *update * (untimed + 2), "close"]
    assert len(result.pop("seconds")) == 2
    assert result == {"memory_gib": 2, "reserved_gib": 3}


RANK = """
import os, sys, time
rank = os.environ["RANK"]
print("result of", rank)
if rank == "1":
    sys.exit("rank 1 is lost")
time.sleep(60)
"""


def test_ranks_do_not_wait_for_one_that_is_lost(monkeypatch):
    """They would wait ten minutes to meet it."""
    monkeypatch.setattr(bench_rollout, "LAST_WORDS", 0.0)
    processes, start = [], subprocess.Popen

    def started(*args, **options):
        processes.append(start(*args, **options))
        return processes[-1]

    monkeypatch.setattr(subprocess, "Popen", started)
    command = [sys.executable, "-c", RANK]
    with pytest.raises(RuntimeError, match=r"^rank 1 is lost\n$"):
        bench_rollout.run_ranks(command, [{"RANK": "0"}, {"RANK": "1"}])
    assert [process.returncode for process in processes] == [-9, 1]
    assert bench_rollout.run_ranks([sys.executable, "-c", "print(7)"], [{}, {}]) == ["7\n", "7\n"]


@pytest.mark.slow
def test_scaling_of_ranks_and_stages(tmp_path, capsys):
    """Two settings of the digits run; one has two ranks with ZeRO 2."""
    output = tmp_path / "rollout.json"
    assert bench_rollout.main(["--quick", "--device", "cpu", "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["settings"]
    assert [(row["ranks"], row["zero_stage"], row["batch"]) for row in rows] == [(1, 0, 4), (2, 2, 4)]
    assert all(row["seconds_per_pair"]["low"] > 0 and len(row["memory_gib"]) == row["ranks"] for row in rows)
    assert all(row["pairs_per_second"]["median"] == 1 / row["seconds_per_pair"]["median"] for row in rows)
    assert all(row["reserved_gib"] is None for row in rows), "a CPU has no allocator of its own"
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


def test_a_gpu_has_no_busy_cores_to_measure(tmp_path, capsys, monkeypatch):
    """`benchmarks.run --device cuda` runs everything."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(bench_busy, "measure", lambda *_: pytest.fail("timed"))
    output = tmp_path / "busy.json"
    assert bench_busy.main(["--device", "cuda", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert (result["complete"], result["environment"]["device"]) == (True, "a GPU")
    assert "with a GPU there is nothing to time" in result["left_out"]
    assert capsys.readouterr().out.splitlines() == [result["left_out"], str(output)]


def test_a_busy_machine_s_rounds_are_written_as_they_come(tmp_path, monkeypatch):
    class Stub:
        loss, calls = 1.0, 0

        def __init__(self, name, batch):
            pass

        def pairs_per_second(self, seconds):
            Stub.calls += 1
            if Stub.calls > 3 * 4:  # in the round after the second that counts
                raise RuntimeError("gone")
            return float(Stub.calls)

        def close(self):
            pass

    monkeypatch.setattr(bench_busy, "Trainer", Stub)
    monkeypatch.setattr(bench_busy, "cores", lambda: 0)
    output = tmp_path / "busy.json"
    assert bench_busy.main(["--output", str(output)]) == 1
    result = json.loads(output.read_text())
    assert result["complete"] is False
    assert result["loads"]["busy"]["rounds_pairs_per_second"] == {"default": [7.0, 11.0], "short": [8.0, 12.0]}


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

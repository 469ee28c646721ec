"""The benchmarks: their files, scaling, a busy machine, and the runner of all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_busy, bench_rollout, run
from benchmarks.environment import slug, write_json

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

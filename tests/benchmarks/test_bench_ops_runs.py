"""Runs of the benchmark of the fused ops: options, what is left out, bars, files."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from broken_kernels import a_little, break_kernel

from benchmarks import bench_ops
from benchmarks.arms import ops as op_arms
from benchmarks.arms.floor import TRAFFIC
from benchmarks.arms.ops import DTYPES
from benchmarks.bench_ops import OPS, Case
from benchmarks.ops_report import bars
from selfnpo_kernels import backends

ROOT = Path(__file__).resolve().parents[2]
NO_COMPILE = ["--arm", "ours", "--arm", "eager", "--arm", "floor"]


def record(op: str, shape: str, dtype: str, floor: float, **ratios: float) -> dict:
    case = {"op": op, "shape": shape, "dtype": dtype, "seconds": {}, "fraction_of_floor": {"median": floor}}
    return case | {"ratio_to": {name: {"median": value} for name, value in ratios.items()}}


def test_bars_are_those_of_the_issue():
    judged = bars(
        [
            record("tdft_step", "sd15", "fp32", 0.1, eager=10.0, eager_by_rows=9.9, compiled=1.9),
            record("tdft_step", "sdxl", "bf16", 0.1, eager=1.0, compiled=1.0),
            record("normal", "sdxl", "fp32", 0.1, eager=2.1, compiled=1.0),
            record("guided_step", "uncached", "fp32", 0.79, eager=9.0, compiled=1.0),
            record("guided_step", "sd15", "fp32", 0.1, eager=9.0, compiled=1.0),
            record("x0_loss", "sd15", "fp32", 0.1, eager=0.1, compiled=0.1),
        ]
    )
    assert [(bar["op"], bar["shape"], bar["against"], bar["least"], bar["met"]) for bar in judged] == [
        ("tdft_step", "sd15", "eager", 10.0, True),
        ("tdft_step", "sd15", "eager_by_rows", 10.0, False),
        ("tdft_step", "sd15", "compiled", 2.0, False),
        ("normal", "sdxl", "eager", 2.0, True),
        ("guided_step", "uncached", "floor", 0.8, False),
    ]


def test_run_writes_what_it_printed(tmp_path, capsys):
    """All ops in both mixtures; ratios are recomputed from rounds; the chart is written, too."""
    output = tmp_path / "new" / "ops.json"
    argv = ["--quick", "--device", "cpu", "--rounds", "3", "--output", str(output)]
    argv += [word for dtype in DTYPES for word in ("--dtype", dtype)]
    assert bench_ops.main([*argv, *NO_COMPILE]) == 0
    result = json.loads(output.read_text())
    assert {"device", "torch", "threads", "date", "git_commit"} <= result["environment"].keys()
    assert result["backend"] == backends.backend_of("cpu")
    assert result["bars"] == [], "tiny latents are not judged"
    found = {(record["op"], record["dtype"]): record for record in result["cases"]}
    assert list(found) == [(op, dtype) for op in OPS for dtype in DTYPES]
    printed = capsys.readouterr().out.splitlines()
    for (op, dtype), entry in found.items():
        rounds = entry["rounds_seconds"]
        assert {len(values) for values in rounds.values()} == {3}
        ratios = [a / b for a, b in zip(rounds["eager"], rounds["ours"], strict=True)]
        middle = statistics.median(ratios)
        assert entry["ratio_to"]["eager"] == pytest.approx({"median": middle, "low": min(ratios), "high": max(ratios)})
        reached = [a / b for a, b in zip(rounds["floor"], rounds["ours"], strict=True)]
        assert entry["fraction_of_floor"]["median"] == pytest.approx(statistics.median(reached))
        speeds = [entry["elements"] * TRAFFIC[op][dtype].total / seconds / 1e9 for seconds in rounds["ours"]]
        assert entry["gigabytes_per_second"]["ours"]["median"] == pytest.approx(statistics.median(speeds))
        row = next(line for line in printed if line.split()[:3] == [op, entry["shape"], dtype])
        assert f"{1e3 * statistics.median(rounds['ours']):.3g} [" in row
        assert f"{middle:.2f} [" in row
    assert ("eager_by_rows" in found["tdft_step", "fp32"]["seconds"]) and "eager_by_rows/ours" in "\n".join(printed)
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def run(output: Path, *argv: str) -> tuple[int, dict]:
    """Exit status and results of a quick run on the CPU."""
    status = bench_ops.main(["--quick", "--device", "cpu", "--output", str(output), *argv])
    return status, json.loads(output.read_text())


def test_cases_that_differ_are_all_listed_and_the_others_timed(tmp_path, capsys, monkeypatch):
    """Of one op every batch is wrong, of another only large ones; a third does not compile."""

    def beyond(arguments, out):
        if len(out) > bench_ops.GATE_BATCH:
            out[-1].mul_(1.0001)

    def does_not_compile(arguments, out):
        raise RuntimeError("at 7:4:\n  tl.load(x)\nno such thing")

    break_kernel(monkeypatch, "guided_step", a_little(1))
    break_kernel(monkeypatch, "affine_noise", beyond)
    break_kernel(monkeypatch, "ema_update", does_not_compile)
    ops = ["ema_update", "guided_step", "guidance_rescale", "affine_noise", "normal"]
    status, result = run(tmp_path / "ops.json", *NO_COMPILE, *(word for op in ops for word in ("--op", op)))
    assert status == 1
    assert result["complete"] is True
    timed = {record["op"]: "seconds" in record for record in result["cases"]}
    assert timed == dict(zip(ops, (False, False, False, False, True), strict=True))
    lines = {record["op"]: record["failures"] for record in result["cases"]}
    assert lines["ema_update"] == ["ema_update digits fp32: RuntimeError: at 7:4: tl.load(x) no such thing"]
    assert lines["guided_step"][0].startswith("guided_step sd15 fp32: x0 differs by ")
    assert len(lines["guided_step"]) == len(lines["guidance_rescale"]) == 2, "at both sizes"
    assert [line.partition(" differs")[0] for line in lines["affine_noise"]] == ["affine_noise sd15 fp32: noise given"]
    assert result["failures"] == [line for op in ops for line in lines[op]]
    printed = capsys.readouterr()
    assert all(line in printed.err for line in result["failures"])
    assert [line.split()[0] for line in printed.out.splitlines()[:2]] == ["op", "normal"]


def test_an_arm_that_fails_by_itself_is_left_out(tmp_path, monkeypatch):
    """A wrong compiled function, and a floor for which there is no memory."""

    def full(*arguments):
        raise torch.OutOfMemoryError("tried to allocate\n7 GiB")

    monkeypatch.setattr(op_arms, "compile_plain", lambda run, device: lambda *given: [2 * out for out in run(*given)])
    monkeypatch.setattr(bench_ops, "floor_arm", full)
    status, result = run(tmp_path / "ops.json", "--op", "guided_step")
    (record,) = result["cases"]
    assert status == 1
    assert record["failures"] == []
    assert list(record["seconds"]) == ["ours", "eager"]
    assert record["fraction_of_floor"] is None
    assert list(record["ratio_to"]) == ["eager"]
    assert record["errors"]["floor"] == "OutOfMemoryError: tried to allocate 7 GiB"
    assert record["errors"]["compiled"].startswith("Differs: guided_step sd15 fp32: compiled x_next differs")
    assert result["failures"] == [
        f"guided_step sd15 fp32: {arm}: {record['errors'][arm]}" for arm in ("compiled", "floor")
    ]


@pytest.mark.parametrize("arms", [["eager"], ["floor", "ours"], ["ours"]])
def test_arms_are_chosen(tmp_path, arms):
    argv = [word for arm in arms for word in ("--arm", arm)]
    status, result = run(tmp_path / "ops.json", "--op", "tdft_step", *argv)
    (record,) = result["cases"]
    assert status == 0
    assert {name.partition("_")[0] for name in record["seconds"]} == set(arms)
    assert bool(record["fraction_of_floor"]) == (len(arms) == 2)
    assert set(record["ratio_to"]) == {name for name in record["seconds"] if "_" in name and "ours" in arms}
    assert record["timed_by"] == dict.fromkeys(record["seconds"], "clock")
    assert record["host_seconds"] == record["not_captured"] == {}


def test_check_runs_the_gate_alone(tmp_path, monkeypatch):
    """At the small and at the full size of every case, with nothing timed."""
    monkeypatch.setattr(bench_ops, "ready", lambda *_, **__: pytest.fail("timed"))
    sizes = []
    build = Case.build
    monkeypatch.setattr(Case, "build", lambda self, device: sizes.append(self.dims) or build(self, device))
    argv = ["--check", "--op", "guided_step", "--op", "ema_update", "--shape", "sd15", "--shape", "uncached"]
    status, result = run(tmp_path / "ops.json", *argv)
    assert status == 0
    assert sizes == [(4, 4, 16, 16), (8, 4, 16, 16), (4, 4, 32, 32), (12, 4, 32, 32), "digits", "digits"]
    assert [record["shape"] for record in result["cases"]] == ["sd15", "uncached", "digits"]
    assert result["largest_error"].keys() == {"float32"}
    break_kernel(monkeypatch, "guided_step", a_little(1))
    status, result = run(tmp_path / "ops.json", *argv)
    assert status == 1
    assert [bool(record["failures"]) for record in result["cases"]] == [True, True, False]


@pytest.mark.parametrize("before", [[], ["guided_step_single"]])
def test_results_are_written_after_every_case(tmp_path, monkeypatch, before):
    """A run that is cut off in a case leaves those before it."""
    output = tmp_path / "ops.json"
    build = Case.build

    def cut_off(self, device):
        if self.op == "normal":
            raise KeyboardInterrupt
        return build(self, device)

    monkeypatch.setattr(Case, "build", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run(output, *NO_COMPILE, *(word for op in [*before, "normal"] for word in ("--op", op)))
    result = json.loads(output.read_text())
    assert result["complete"] is False
    assert result["environment"]["torch"] == torch.__version__
    assert [record["op"] for record in result["cases"]] == before
    assert all(record["seconds"]["ours"]["median"] > 0 for record in result["cases"])


def test_ema_update_runs_on_the_networks_of_the_device():
    def networks(device: str, *argv: str) -> list[str]:
        args = bench_ops.build_parser().parse_args(["--op", "ema_update", "--dtype", "fp32", *argv])
        return [one.shape for one in bench_ops.chosen_cases(args, torch.device(device))]

    assert networks("cpu") == ["digits", "sd15_small"]
    assert networks("cuda", "--shape", "sd15") == ["digits", "sd15_small", "sd15"]
    assert networks("cuda", "--net", "digits") == networks("cuda", "--quick") == ["digits"]


def test_only_a_whole_run_replaces_the_results():
    def target(*argv: str) -> str:
        return str(bench_ops.target_of(bench_ops.build_parser().parse_args(argv)).relative_to(ROOT).parent)

    assert target("--device", "cpu", "--rounds", "3") == "benchmarks/results"
    parts = ["--quick"], ["--check"], ["--op", "normal"], ["--shape", "sd15"], ["--dtype", "bf16"], ["--arm", "ours"]
    for part in (*parts, ["--net", "digits"]):
        assert target(*part) == "build/benchmarks"


def test_compiled_arm_of_one_op(tmp_path):
    """With torch.compile itself, whose results the gate compares with eager."""
    output = tmp_path / "ops.json"
    argv = ["--quick", "--op", "guided_step_single", "--device", "cpu", "--output", str(output)]
    assert bench_ops.main(argv) == 0
    (entry,) = json.loads(output.read_text())["cases"]
    assert list(entry["seconds"]) == ["ours", "eager", "compiled", "floor"]
    assert entry["ratio_to"].keys() == {"eager", "compiled"}


@pytest.mark.slow
def test_compiled_arms_of_all_ops(tmp_path):
    """Both mixtures; about two minutes."""
    output = tmp_path / "ops.json"
    argv = ["--quick", "--dtype", "fp32", "--dtype", "bf16", "--device", "cpu", "--output", str(output)]
    assert bench_ops.main(argv) == 0
    assert all("compiled" in entry["seconds"] for entry in json.loads(output.read_text())["cases"])


@pytest.mark.gpu
def test_bench_ops_runs_on_cuda(tmp_path):
    """Through the script; the gate compares the kernels with eager on the GPU."""
    output = tmp_path / "ops.json"
    command = [sys.executable, "benchmarks/bench_ops.py", "--quick", "--device", "cuda", "--dtype", "bf16"]
    done = subprocess.run([*command, "--output", str(output)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = json.loads(output.read_text())["cases"]
    assert len(records) == len(OPS)
    for record in records:
        slow = {name for name, way in record["timed_by"].items() if way != "graph"}
        assert slow == ({"eager_by_rows"} if record["op"] == "tdft_step" else set()), record["not_captured"]
        assert record["host_seconds"].keys() == record["seconds"].keys()

"""The GPU check: parts that end in every way, its page, and the whole of it at tiny size."""

from __future__ import annotations

import importlib
import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks import gpu_check, gpu_figures, gpu_report
from benchmarks.gpu_parts import PARTS, Part, read_tests

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"


@dataclass(frozen=True, kw_only=True)
class Script(Part):
    """A part that is a line of Python, which finds the path of its JSON in sys.argv[1]."""

    code: str

    def command(self, output: Path, device: str, *, tiny: bool) -> list[str]:
        return [sys.executable, "-c", self.code, str(output)]


def script(name: str, code: str, limit: int = 120) -> Script:
    return Script(name=name, what=f"part {name}", limit=limit, real="", tiny="", code=code)


EMPTY = {"benchmark": "tests", "passed": 2, "skipped": 0, "failed": {}}
WRITE = f"import json, sys; json.dump({EMPTY}, open(sys.argv[1], 'w'))"
START = """
import subprocess, sys, time
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid, flush=True)
time.sleep(600)
"""


def alive(number: int) -> bool:
    """Whether a process of this number runs; one that has ended may wait to be collected."""
    try:
        return "zombie" not in Path("/proc", str(number), "status").read_text()
    except FileNotFoundError:
        return False


def test_every_part_is_recorded_however_it_ends(tmp_path, capsys):
    """What is cut off keeps what it has written, and ends with the processes that it has started."""
    parts = [
        script("good", WRITE),
        script("bad", "import sys; print('one line'); sys.exit(3)"),
        script("endless", WRITE + START, limit=8),
    ]
    assert gpu_check.check(tmp_path, parts, minutes=5, device="cpu", tiny=False) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [(p["name"], p["status"], p["said"]) for p in summary["parts"][:2]] == [
        ("good", "complete", ""),
        ("bad", "failed, exit status 3", "one line"),
    ]
    endless = summary["parts"][2]
    assert endless["status"] == "cut off" and 8 <= endless["seconds"] < 120
    assert json.loads((tmp_path / "endless.json").read_text())["passed"] == 2
    while alive(int(endless["said"])):  # the child's number is the last line of the log
        time.sleep(0.05)
    text = (tmp_path / "gpu.md").read_text()
    assert "| bad | part bad | failed, exit status 3 |" in text and "A smoke run" not in text
    assert "good" in capsys.readouterr().out


def test_parts_without_time_are_said_and_not_begun(tmp_path):
    parts = [script("first", WRITE), script("second", WRITE)]
    assert gpu_check.check(tmp_path, parts, minutes=0.01, device="cpu", tiny=True) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [p["status"] for p in summary["parts"]] == ["not begun", "not begun"]


def test_a_later_check_of_the_same_card_adds_to_the_summary(tmp_path):
    def check(*parts: Script, tiny: bool = False) -> dict[str, str]:
        gpu_check.check(tmp_path, parts, minutes=5, device="cpu", tiny=tiny)
        records = json.loads((tmp_path / "summary.json").read_text())["parts"]
        return {record["name"]: record["status"] for record in records}

    bad = script("b", "raise SystemExit(1)")
    assert check(script("a", WRITE), bad) == {"a": "complete", "b": "failed, exit status 1"}
    assert check(script("b", WRITE)) == {"a": "complete", "b": "complete"}
    assert check(script("b", WRITE), tiny=True) == {"b": "complete"}, "smoke runs are not mixed with others"


def test_a_result_of_an_earlier_run_does_not_pass_for_a_new_one(tmp_path):
    (tmp_path / "bad.json").write_text('{"benchmark": "tests", "passed": 9, "skipped": 0, "failed": {}}')
    gpu_check.check(tmp_path, [script("bad", "raise SystemExit(1)")], minutes=5, device="cpu", tiny=True)
    assert not (tmp_path / "bad.json").exists() and "9 tests" not in (tmp_path / "gpu.md").read_text()


ONE_PROCESS = """
tests/a.py::test_x[a b] PASSED                                   [ 10%]
tests/a.py::test_y FAILED                                        [ 20%]
tests/a.py::test_z SKIPPED (no GPU)                              [ 30%]
"""
WORKERS = """
[gw0] [  1%] PASSED tests/a.py::test_x[a b]
[gw1] [  2%] ERROR tests/a.py::test_y
tests/a.py::test_started
[gw0] [  3%] SKIPPED tests/a.py::test_z
"""
END = """
FAILED tests/a.py::test_y - AssertionError: 1 == 2
=========================== 1 failed, 1 passed, 1 skipped in 3.21s =====================
"""


@pytest.mark.parametrize("log", [ONE_PROCESS, WORKERS], ids=["one process", "workers"])
def test_tests_are_read_off_the_log_also_of_a_run_that_was_cut_off(log):
    cut = read_tests(log)
    assert (cut["passed"], cut["skipped"], cut["failed"], cut["complete"]) == (1, 1, {"tests/a.py::test_y": ""}, False)
    whole = read_tests(log + END)
    assert whole["complete"] and whole["failed"] == {"tests/a.py::test_y": "AssertionError: 1 == 2"}


def test_a_real_log_is_read(tmp_path):
    """The format is pytest's own: a change of it is noticed here."""
    import subprocess

    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\n@pytest.mark.skip\ndef test_c(): pass\n"
    )
    for workers in ("0", "2"):
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=line", "-n", workers, "."]
        log = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
        found = read_tests(log)
        assert (found["passed"], found["skipped"], found["complete"]) == (1, 1, True), log
        assert found["failed"] == {"test_it.py::test_b": "assert 1 == 2"}, log


def results(folder: Path, card: str, **parts: dict) -> Path:
    """A folder of results of one card."""
    environment = {"device": card, "date": "2026-12-01T00:00:00+00:00", "git_commit": "0123456789abcdef"}
    records = [{"name": name, "what": name, "status": "complete", "seconds": 1.0, "said": ""} for name in parts]
    summary = {"environment": environment, "tiny": False, "parts": records}
    for name, content in {"summary": summary, **parts}.items():
        (folder / f"{name}.json").write_text(json.dumps({"environment": environment} | content))
    return folder


def spread(median: float) -> dict[str, float]:
    return {"median": median, "low": 0.9 * median, "high": 1.1 * median}


PEAKS = {"benchmark": "peaks", "peaks": {"copy_bytes_per_second": spread(2e12), "bf16_flops_per_second": spread(6e14)}}
UPDATE = {
    "benchmark": "bench_update",
    "arms": {"plain": {"seconds_per_update": spread(0.6), "hours_per_1000_updates": 0.17, "tflops": 300.0}},
}


def test_expected_values_stand_beside_measured_ones_of_their_card_alone(tmp_path):
    text = gpu_report.page(results(tmp_path, H100, peaks=PEAKS, update=UPDATE))
    assert "| plain.seconds | 0.6 s [0.54, 0.66] |  | at most 0.5 (60%) |" in text
    assert "| plain.rate | 300 TFLOP/s | 50.0% |" in text and H100 in text
    assert "overlap" not in text, "an expected value without a measured one is not printed"
    assert "at most 0.5" not in gpu_report.page(results(tmp_path, H200, peaks=PEAKS, update=UPDATE))


def test_two_cards_are_never_compared(tmp_path):
    out = results(tmp_path, H100, peaks=PEAKS, update=UPDATE | {"environment": {"device": H200}})
    with pytest.raises(gpu_report.UserError, match="update was measured on NVIDIA H200, the check on NVIDIA H100"):
        gpu_report.page(out)


def test_a_report_without_results_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--report", str(tmp_path)])
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith(f"{tmp_path}: there is no summary.json of gpu_check to report; run gpu_check {tmp_path} first")
    )


def test_without_a_gpu_nothing_but_the_tiny_run_begins(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_check.main([str(tmp_path / "out"), "--device", "cpu"])
    assert "--tiny runs all parts on a CPU" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_results_of_a_cpu_do_not_become_the_page_of_the_docs(tmp_path):
    assert gpu_report.write_page(results(tmp_path, "CPU, 2 cores", peaks=PEAKS)) == tmp_path / "gpu.md"


def test_the_page_of_the_docs_is_that_of_the_committed_results():
    committed = gpu_report.ROOT / "benchmarks" / "results" / "gpu"
    text = gpu_report.page(committed) if committed.exists() else gpu_report.HEAD + gpu_report.NOTHING
    assert gpu_report.PAGE.read_text() == text


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
@pytest.mark.parametrize("size", ["real", "tiny"])
def test_the_options_of_every_part_exist(part, size, tmp_path):
    module, *words = shlex.split(getattr(part, size)) or ["none"]
    if part.tests:
        paths = [word for word in words if word.startswith("tests/")]
        assert paths and all((gpu_report.ROOT / path).exists() for path in paths)
    elif words or module != "none":
        options = words[: words.index("--")] if "--" in words else words
        output = tmp_path / "x.json"
        parser = importlib.import_module(module).build_parser()
        assert parser.parse_args(["--device", "cpu", "--output", str(output), *options]).output == output


def test_every_expected_value_has_a_figure_that_can_be_measured(tmp_path):
    """A value whose name no part gives would never be printed."""
    cases = [("guided_step", "uncached"), ("affine_noise", "uncached"), ("ema_update", "sd15")]
    ops = [{"op": op, "shape": shape, "dtype": "bf16", "fraction_of_floor": spread(0.9)} for op, shape in cases]
    arms = [{"name": "sampler_lora_graphs", "ratio_to_stock": spread(0.5)}]
    profile = {"device_seconds_per_update": {"kernels": 0.001}, "device_busy_seconds_per_update": 0.5}
    out = results(
        tmp_path,
        H100,
        op_times={"benchmark": "bench_ops", "cases": ops},
        update=UPDATE | {"hidden_share": {"overlap": 0.9}},
        sampler={"benchmark": "bench_sampler", "nets": {str(n): {"batch": n, "arms": arms} for n in (1, 4)}},
        profile={"benchmark": "profile_step"} | profile,
    )
    parts = [record["name"] for record in gpu_report.read(out, "summary")["parts"]]
    measured = {f"{part}.{figure.name}" for part in parts for figure in gpu_report.part_figures(out, part)}
    content = json.loads(gpu_report.EXPECTED.read_text())
    assert content["card"] == "H100" and content["date"]
    assert set(content["figures"]) <= measured
    assert gpu_report.page(out).count("at least") == 6


def test_what_failed_or_was_slower_than_the_plain_way_stays_on_the_page(tmp_path):
    case = {"op": "normal", "shape": "sd15", "dtype": "bf16"}
    slow = case | {"seconds": {"ours": spread(2e-6)}, "ratio_to": {"eager": spread(0.5)}}
    arms = [{"name": "sampler", "error": "out of memory"}, {"name": "attach_lora", "ratio_to_stock": spread(1.25)}]
    update = {
        name: {"seconds_per_update": spread(s), "hours_per_1000_updates": s} for name, s in (("plain", 2), ("all", 3))
    }
    out = results(
        tmp_path,
        H200,
        ops={"benchmark": "bench_ops", "cases": [case | {"failures": ["z differs by 1"]}]},
        op_times={"benchmark": "bench_ops", "cases": [slow]},
        gpu_tests={"benchmark": "tests", "passed": 1, "skipped": 0, "failed": {"tests/a.py::test_b": "no"}},
        update={"benchmark": "bench_update", "arms": update, "gate": {"arms": {"graphs": {"error": "other losses"}}}},
        sampler={"benchmark": "bench_sampler", "nets": {"sd15": {"batch": 1, "arms": arms}}},
    )
    text = gpu_report.page(out)
    for line in (
        "- normal.sd15.bf16: z differs by 1",
        "- normal.sd15.bf16: 2 times eager PyTorch's time",
        "- tests/a.py::test_b: no",
        "- graphs, the gate: other losses",
        "- all: 1.5 times the time of plain",
        "- sd15, sampler: out of memory",
        "- sd15, attach_lora: 1.25 times stock diffusers' time",
    ):
        assert line in text.splitlines(), text


@pytest.mark.slow
def test_all_parts_run_at_tiny_size(tmp_path, capsys):
    assert gpu_check.main([str(tmp_path), "--tiny", "--device", "cpu"]) == 0, capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    named = {part.name for part in PARTS if part.tiny}
    assert {record["name"] for record in summary["parts"]} == named
    text = gpu_report.write_page(tmp_path).read_text()
    for name in named:
        assert gpu_figures.figures_of(gpu_report.read(tmp_path, name), {}), name
        assert f"## {name}" in text
    assert "A smoke run" in text

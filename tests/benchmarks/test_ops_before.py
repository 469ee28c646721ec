"""The ops of this checkout beside those of another one, which is this one, too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import ops_before
from benchmarks.environment import spread

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_both_checkouts_are_timed_in_turns(tmp_path, capfd):
    output = tmp_path / "ops.json"
    argv = [str(ROOT), "--op", "guided_step", "--op", "guided_step_unipc", "--quick", "--output", str(output)]
    assert ops_before.main(argv) == 0
    cases = json.loads(output.read_text())["cases"]
    names = [(case["op"], case["shape"], case["dtype"]) for case in cases]
    assert names == [
        (op, shape, dtype)
        for op in ("guided_step", "guided_step_unipc")
        for shape in ("sd15", "cogvideox")
        for dtype in ("fp32", "bf16")
    ]
    for case in cases:
        assert case["ratio"] == spread(case["ratios"])
        assert len(case["ratios"]) == 2
        assert min(case["before"]["low"], case["now"]["low"]) > 0
    assert capfd.readouterr().out.count("of the time before") == 8


class Counting:
    """A side on which a call takes so many seconds."""

    def __init__(self, seconds: float, log: list) -> None:
        self.taken, self.log = seconds, log

    def seconds(self, op, dims, dtype, calls):
        self.log.append((self, calls))
        return self.taken


def test_samples_are_as_long_as_asked_for_and_the_order_changes():
    log: list = []
    before, now = Counting(0.02, log), Counting(0.03, log)
    record = ops_before.compare([before, now], "normal", (1, 2), "fp32", rounds=3, least=0.3)
    assert record["ratio"] == pytest.approx({"median": 1.5, "low": 1.5, "high": 1.5})
    assert record["calls"] == 10
    assert [(side is now, calls) for side, calls in log[2:]] == [
        (late, 10) for late in (True, False, False, True, True, False)
    ]

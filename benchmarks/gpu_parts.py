"""The parts of `gpu_check.py`, in order of their value: one process, one limit, one JSON each.

Most parts are the project's other benchmarks with chosen arms; three are chosen tests.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

COMPLETE, CUT_OFF, NOT_BEGUN = "complete", "cut off", "not begun"
"""How parts end, besides "failed, exit status N"."""

_TEST_LINE = re.compile(
    r"(?:(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b)|(?:\[gw\d+\].*? (PASSED|FAILED|ERROR|SKIPPED) (\S+::.+?)\s*$)"
)
"""A test's line of `pytest -v`, in one process ("NAME PASSED") and with workers ("PASSED NAME")."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of the check."""

    name: str
    """Name of the part, of its log and of its JSON."""
    what: str
    """What it shows, for the summary."""
    limit: int
    """Seconds after which it is cut off, at real size."""
    real: str
    """Arguments of `python -m` at real size."""
    tiny: str
    """Arguments of `python -m` at tiny size."""

    @property
    def tests(self) -> bool:
        """Whether the part is a run of tests, whose JSON is read off its log."""
        return self.real.startswith("pytest ")

    def command(self, output: Path, device: str, *, tiny: bool) -> list[str]:
        """The command line; a benchmark writes `output`."""
        command = [sys.executable, "-m", *(self.tiny if tiny else self.real).split()]
        return command if self.tests else [*command, "--device", device, "--output", str(output)]


_PYTEST = "pytest -v -p no:cacheprovider --tb=line"
PARTS = (
    Part(
        name="peaks",
        what="the card's copies and matrix products",
        limit=40,
        real="benchmarks.peaks",
        tiny="benchmarks.peaks --quick",
    ),
    Part(
        name="ops",
        what="every fused op against eager PyTorch and the reference backend",
        limit=70,
        real="benchmarks.bench_ops --check",
        tiny="benchmarks.bench_ops --check --quick",
    ),
    Part(
        name="op_times",
        what="time of each op in a CUDA graph, and of its launch on the host",
        limit=80,
        real="benchmarks.bench_ops --arm ours --arm eager --arm floor --rounds 5",
        tiny="benchmarks.bench_ops --quick --arm ours --arm eager --arm floor --op guided_step",
    ),
    Part(
        name="gpu_tests",
        what="the tests that need a GPU: graphs, recomputation, benchmarks",
        limit=60,
        real=f"{_PYTEST} -m gpu tests/runtime tests/guidance tests/rollout tests/training",
        tiny=f"{_PYTEST} tests/runtime/test_cuda_graphs.py",
    ),
    Part(
        name="update",
        what="whole updates of the recommended recipe on SD1.5",
        limit=150,
        real="benchmarks.bench_update --net sd15",
        tiny="benchmarks.bench_update --quick",
    ),
    Part(
        name="step",
        what="seconds a pair: the authors' schedule of network calls, and ours",
        limit=80,
        real="benchmarks.bench_step --net sd15 --rounds 5",
        tiny="benchmarks.bench_step --quick",
    ),
    Part(
        name="sampler_4",
        what="SD1.5, 4 pictures a call",
        limit=70,
        real="benchmarks.bench_sampler --net sd15 --batch 4 --rounds 5 --cold 0",
        tiny="benchmarks.bench_sampler --quick --cold 0",
    ),
    Part(
        name="sampler_1",
        what="SD1.5, 1 picture a call",
        limit=50,
        real="benchmarks.bench_sampler --net sd15 --batch 1 --rounds 5 --cold 0",
        tiny="",
    ),
    Part(
        name="sampler_sdxl",
        what="SDXL, 1 picture a call",
        limit=70,
        real="benchmarks.bench_sampler --net sdxl --batch 1 --steps 10 --rounds 3 --cold 0",
        tiny="",
    ),
    Part(
        name="op_tests",
        what="every op against its float64 formula: dtypes, shapes, layouts",
        limit=130,
        real=f"{_PYTEST} -n 14 --dist worksteal -m gpu_core tests/ops",
        tiny=f"{_PYTEST} tests/ops/test_guided_step.py -k single",
    ),
    Part(
        name="profile",
        what="where an update's time goes, and a trace",
        limit=70,
        real="benchmarks.profile_step --net sd15 --updates 2 --warm_up 3",
        tiny="benchmarks.profile_step --updates 1 --warm_up 1",
    ),
)


def read_tests(log: str) -> dict[str, object]:
    """The outcome of each test that a log of `pytest -v` names, also where it was cut off.

    `failed` maps the names of tests that failed to the reason that the summary gives, or "".
    """
    outcomes: dict[str, str] = {}
    for match in map(_TEST_LINE.search, log.splitlines()):
        if match:
            name, outcome = (match[1], match[2]) if match[1] else (match[4], match[3])
            outcomes[name] = outcome
    reasons = dict(re.findall(r"^(?:FAILED|ERROR) (\S+::.+?) - (.+)$", log, re.MULTILINE))
    failed = {name: reasons.get(name, "") for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")}
    counts = {key: list(outcomes.values()).count(key.upper()) for key in ("passed", "skipped")}
    finished = bool(re.search(r"^=+ .*\b(passed|failed|skipped|error|no tests ran)\b.* in [\d.]+s", log, re.MULTILINE))
    return {"benchmark": "tests", **counts, "failed": failed, "complete": finished}

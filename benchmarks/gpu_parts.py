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
        module, *options = (self.tiny if tiny else self.real).split()
        # Before the options: what follows a "--" among them belongs to the training command.
        where = [] if self.tests else ["--device", device, "--output", str(output)]
        return [sys.executable, "-m", module, *where, *options]


_PYTEST = "pytest -v -p no:cacheprovider --tb=line"
_OPS = (
    "--op ema_update --op guided_step --op affine_noise --op tdft_step --op x0_loss --op guidance_rescale --op normal"
)
_STEP = "released released_live lockstep continuous continuous_graphs floor_forward floor"
_SDXL = "stock attach_lora sampler sampler_graphs sampler_lora_graphs"


def _arms(names: str) -> str:
    """The options that choose these arms."""
    return " ".join(f"--arm {name}" for name in names.split())


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
        tiny="benchmarks.bench_ops --check --quick --op guided_step --op normal",
    ),
    Part(
        name="op_times",
        what="time of each op in a CUDA graph, and of its launch on the host",
        limit=80,
        real=f"benchmarks.bench_ops {_OPS} --shape uncached --shape sd15 {_arms('ours eager floor')} --rounds 5",
        tiny=f"benchmarks.bench_ops --quick --op guided_step {_arms('ours eager floor')}",
    ),
    Part(
        name="gpu_tests",
        what="the tests that need a GPU: graphs, streams, recomputation",
        limit=60,
        real=f"{_PYTEST} -m gpu tests/ops tests/runtime tests/guidance tests/rollout tests/training",
        tiny=f"{_PYTEST} tests/runtime/test_cuda_graphs.py",
    ),
    Part(
        name="update",
        what="whole updates of the recommended recipe on SD1.5, batch 80, one slot a pair",
        limit=170,
        real="benchmarks.bench_update --net sd15 --pool 1 --rounds 3",
        tiny=f"benchmarks.bench_update --tiny --rounds 1 {_arms('plain')}",
    ),
    Part(
        name="step",
        what="seconds a pair: the authors' schedule of network calls, and ours",
        limit=70,
        real=f"benchmarks.bench_step --net sd15 --rounds 3 {_arms(_STEP)}",
        tiny=f"benchmarks.bench_step --quick {_arms('continuous floor')}",
    ),
    Part(
        name="sampler",
        what="pictures of SD1.5, 1 and 4 a call",
        limit=110,
        real="benchmarks.bench_sampler --net sd15 --batch 1 --batch 4 --rounds 5 --cold 0",
        tiny=f"benchmarks.bench_sampler --quick --cold 0 {_arms('stock sampler_lora')}",
    ),
    Part(
        name="sampler_sdxl",
        what="pictures of SDXL, 1 a call",
        limit=70,
        real=f"benchmarks.bench_sampler --net sdxl --batch 1 --steps 10 --rounds 3 --cold 0 {_arms(_SDXL)}",
        tiny="",
    ),
    Part(
        name="op_tests",
        what="every op against its float64 formula: dtypes, shapes, layouts",
        limit=130,
        real=f"{_PYTEST} -n 14 --dist worksteal -m gpu_core tests/ops",
        tiny=f"{_PYTEST} tests/ops/test_guided_step.py -k identity",
    ),
    Part(
        name="profile",
        what="where an update's time goes, and a trace",
        limit=70,
        real="benchmarks.profile_step --net sd15 -- --engine.batch_size 20 --rollout.pool 1",
        tiny="benchmarks.profile_step --net digits --updates 1 --warm_up 1 -- --engine.batch_size 8 "
        "--rollout.grid_steps 5 --optimizer.name adamw",
    ),
    Part(
        name="step_sd35",
        what="seconds a pair of Stable Diffusion 3.5 medium, a transformer, and its step as a CUDA graph",
        limit=70,
        real=f"benchmarks.bench_step --net sd35_medium --rounds 3 "
        f"{_arms('continuous continuous_graphs floor_forward floor')}",
        tiny="",
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

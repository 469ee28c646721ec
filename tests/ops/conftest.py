"""Every test runs in poisoned memory, and under the backend that its parameters name."""

from __future__ import annotations

from collections.abc import Iterator

import cases
import pytest
import torch

from selfnpo_kernels import backends


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fills new memory with NaN (integers: the largest value), so that unwritten results show."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(params=cases.MARKED_BACKENDS)
def backend(request) -> Iterator[str]:
    """The name of a backend that serves every op meanwhile."""
    with backends.use(request.param):
        yield request.param


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # one of xdist's processes tells the first one
        session.config.workeroutput["observed"] = [[*key, worst] for key, worst in cases.OBSERVED.items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    for op, backend, worst in getattr(node, "workeroutput", {}).get("observed", ()):
        cases.observe(op, backend, worst)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if cases.OBSERVED and (config.get_verbosity() > 0 or cases.COMPILED):
        terminalreporter.section("largest errors, in the unit of tests/helpers/tolerances.py")
        for (op, backend), worst in sorted(cases.OBSERVED.items()):
            terminalreporter.write_line(f"{op:24} {backend:10} {worst:.2f}")

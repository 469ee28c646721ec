"""A plugin of pytest that writes down what the tests of Triton's kernels would compile on a GPU.

    PYTHONPATH=tests/ops python -m pytest -p recorded_launches --launches FILE -m gpu_core tests/ops

No GPU is needed. The tests have the parameters of a GPU run. Each call runs in the launchers, whose
launches are recorded and not run, and then in the reference, which gives the test its results.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import cases
import pytest
from triton.runtime import JITFunction

from selfnpo_kernels import aot, backends, reference
from selfnpo_kernels import triton as launchers
from selfnpo_kernels.triton import common

FOUND: dict[str, set[str]] = defaultdict(set)  # test -> the specialisations that it launches
CURRENT = [""]


def note(kernel: JITFunction, arguments: tuple, options: dict) -> None:
    FOUND[CURRENT[0]].add(aot.specialisation(kernel, arguments, options, arch=90))


def served(op: str):
    """The launcher of an op: it records its launches, and the reference computes the results."""

    def call(*arguments, **known):
        # A launcher overwrites nothing: it runs no kernel.
        with common.recorded() as launches:
            getattr(launchers, op)(*arguments, **known)
        for launch in launches:
            note(*launch)
        return getattr(reference, op)(*arguments)

    return call


def launched_directly(kernel: JITFunction, *arguments, grid, warmup, **options) -> None:
    """Tests that launch a kernel themselves end here."""
    note(kernel, arguments, options)
    pytest.skip("recorded")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--launches", type=Path, help="JSON: test -> specialisations of kernels")


def pytest_configure() -> None:
    cases.COMPILED = True
    operations = {op: served(op) for op in launchers.__all__ if op != "interpreted"}
    backends._triton = lambda: (SimpleNamespace(interpreted=lambda: True, **operations), "recorded")
    JITFunction.run = launched_directly


def pytest_runtest_setup(item: pytest.Item) -> None:
    CURRENT[0] = item.nodeid
    FOUND[item.nodeid] = set()


def pytest_sessionfinish(session: pytest.Session) -> None:
    rows = {test: sorted(found) for test, found in FOUND.items()}
    session.config.getoption("--launches").write_text(json.dumps(rows, indent=0))

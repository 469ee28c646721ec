"""Set up before any test module is imported: no network, few threads, a loud word about GPU tests
that did not run."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import signal

# A shell's background job, such as one under nohup, ignores Ctrl-C, and so would the processes that
# tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from selfnpo_fast.runtime.command import short_spin

os.environ.update(short_spin())  # as in the commands, and before torch is imported

import hypothesis
import pytest
import torch

# No test may fail because the machine is busy.
hypothesis.settings.register_profile("selfnpo", deadline=None)
hypothesis.settings.load_profile("selfnpo")

if not torch.cuda.is_available():
    # Triton chooses between its compiler and its interpreter when it is imported, and diffusers
    # imports it: so triton and our kernels are imported here, before any test module. No other
    # code sees the variable. The interpreter imports gluon at its first run.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        importlib.import_module("triton.experimental.gluon")
        importlib.import_module("selfnpo_kernels.triton")

THREADS = 1  # the models under test are tiny: a second thread costs more than it brings


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(THREADS)
    # For the processes that tests start; DeepSpeed looks for an accelerator and warns on standard
    # output otherwise.
    os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


@pytest.fixture(scope="module", autouse=True)
def frozen_imports() -> None:
    # DeepSpeed collects garbage several times in every run: half a second each time, if it looks
    # through all that was imported or compiled before.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def logger_as_imported() -> None:
    """The log is as importing the package leaves it.

    A command of an earlier test has bound it to the standard error of that test. What is said once
    in a process may be said once in each test.
    """
    from selfnpo_fast.runtime import console

    console._said.clear()
    logger = logging.getLogger("selfnpo")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)
    console._said.clear()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter) -> None:
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if "gpu" in report.keywords]
    if skipped:
        terminalreporter.section("GPU TESTS DID NOT RUN", sep="!", red=True, bold=True)
        terminalreporter.write_line(
            f"{len(skipped)} tests marked gpu were skipped: torch {torch.__version__} sees no CUDA device here, "
            "so nothing above says anything about CUDA."
        )
        for report in skipped:
            terminalreporter.write_line(f"  {report.nodeid}")


@pytest.fixture
def plain_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """F.linear as torch has it: a ZeRO 3 run puts DeepSpeed's in its place for the rest of the
    process, which torchao's tensors are not made for, and which keeps other tensors for a backward."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)

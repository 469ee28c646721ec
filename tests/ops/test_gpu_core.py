"""The tests marked `gpu_core`: what they cover, and how many kernels a GPU has to compile for them.

Counted without a GPU, from the launches of a run on recorded_launches.py.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import cases
import pytest

HERE = Path(__file__).parent
MOST = 650  # with 14 workers about two minutes on a machine with 16 cores
GRIDS = {  # op -> the test that runs it over the grid
    "affine_noise": "test_affine_noise.py::test_values",
    "ema_update": "test_ema_update.py::test_values",
    "guidance_rescale": "test_guidance_rescale.py::test_values",
    "guided_step": "test_guided_step.py::test_values",
    "tdft_step": "test_tdft_step.py::test_one_step",
    "x0_loss": "test_x0_loss.py::test_values_and_gradients",
}
ONCE = (  # what has no mixture of its own
    "test_ema_update.py::test_channels_last[triton]",
    "test_ema_update.py::test_an_empty_tensor[triton]",
    "test_ema_update.py::test_views_into_flat_buffers[triton-1]",
    "test_triton_variants.py::test_64_bit_indices",
    "test_triton_variants.py::test_64_bit_indices_of_a_rollout",
    "test_trajectories.py::test_trajectories_in_every_backend[triton-ddim]",
    "test_tdft_step.py::test_whole_runs[triton-guided]",
)


@functools.cache
def launches() -> dict[str, list[str]]:
    """Test -> specialisations that it launches, of the tests marked gpu_core."""
    # Triton's compiler, of which only the specialising of arguments runs, and not its interpreter.
    # The tensors are on the CPU, on a machine with a GPU, too.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    path = os.pathsep.join([str(HERE), *filter(None, [environment.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "launches.json")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "recorded_launches", "-p", "no:cacheprovider"]
        command += ["-m", "gpu_core", "--launches", str(file), "--strict-markers", str(HERE)]
        done = subprocess.run(command, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
        rows = json.loads(file.read_text())
    return {test.removeprefix("tests/ops/"): found for test, found in rows.items()}


def test_the_core_compiles_few_kernels():
    kernels = set().union(*launches().values())
    assert 500 < len(kernels) <= MOST


@pytest.mark.parametrize("op", GRIDS)
def test_the_core_has_every_mixture_and_shape(op):
    for mixture in cases.MIXTURES:
        for kind, shape in cases.CORE.items():
            start = f"{GRIDS[op]}[triton-{mixture.name}-{'x'.join(map(str, shape))}"
            found = [kernels for test, kernels in launches().items() if test.startswith((start + "-", start + "]"))]
            assert found, f"{op}, {mixture.name}, {kind}"
            assert all(found), "each of them launches a kernel"


def test_the_core_draws_normals_of_every_dtype_and_shape():
    for shape in cases.CORE.values():
        for dtype in (cases.F32, cases.BF16, cases.F16):
            assert launches()[f"test_normal.py::test_values[triton-{shape[1:]}-{dtype}]"]


def test_the_core_has_what_no_grid_has():
    for test in ONCE:
        assert launches()[test], test
    # The last of a kernel's arguments says whether its indices have 64 bits.
    kernels = [kernel for found in launches().values() for kernel in found]
    wide = {kernel.split()[0] for kernel in kernels if "('constexpr', True)] " in kernel}
    assert wide == {kernel.split()[0] for kernel in kernels} - {
        "ema_update_kernel",  # its addresses have 64 bits always
        "guidance_rescale_kernel",
        "x0_loss_sum_kernel",
    }


def test_parallel_processes_tell_their_largest_errors(request, monkeypatch):
    """The summary of a parallel run has the errors of all of its processes."""
    plugins = request.config.pluginmanager.get_plugins()
    conftest = next(p for p in plugins if getattr(p, "__file__", None) == str(HERE / "conftest.py"))
    workers = []
    for worst in (1.0, 3.0, 2.0):
        monkeypatch.setattr(cases, "OBSERVED", {("normal", "triton"): worst})
        workers.append(SimpleNamespace(workeroutput={}))
        conftest.pytest_sessionfinish(SimpleNamespace(config=workers[-1]))
    monkeypatch.setattr(cases, "OBSERVED", {})
    for worker in workers:
        conftest.pytest_testnodedown(worker)
    assert cases.OBSERVED == {("normal", "triton"): 3.0}

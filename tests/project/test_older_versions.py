"""The project runs on older releases of what it builds on, from a checkout that is not installed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkouts import ROOT, copy_tracked

REQUIREMENTS = Path(__file__).with_name("older_versions.txt")
KERNELS_BUILT_HERE = sorted((ROOT / "kernels" / "selfnpo_kernels").glob("_cpp*"))

# Every module of the packages.
IMPORTS = """
import importlib, importlib.metadata, pkgutil, sys
import torch, triton, transformers, numpy
wanted = dict(line.strip().split("==") for line in open(sys.argv[1]) if "==" in line)
for module in (torch, triton, transformers, numpy):
    assert module.__version__.partition("+")[0] == wanted[module.__name__], module.__version__
installed = {distribution.name for distribution in importlib.metadata.distributions()}
assert "diffusers" in installed and "selfnpo-fast" not in installed
count = 0
for name in ("selfnpo_fast", "selfnpo_kernels", "benchmarks"):
    package = importlib.import_module(name)
    assert [*package.__path__][0].startswith(sys.argv[2]), package.__path__
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        if not module.name.endswith(("__main__", "._cpp")):
            importlib.import_module(module.name)
            count += 1
print(count, "modules")
"""
# The negative is the student of a few updates: what is drawn with it has to be pictures, no more.
DRAWS = """
import sys
import numpy as np
from diffusers import StableDiffusionPipeline
from selfnpo_fast import GuidedSampler
from selfnpo_fast.models import ASSETS
pipe = StableDiffusionPipeline.from_pretrained(ASSETS / "digits")
sampler = GuidedSampler.from_pipeline(pipe, sys.argv[1])
drawn = sampler(["a red handwritten seven", "a blue handwritten one"], seeds=[7, 8], steps=5, guidance_scale=3.0)
print([(image.size, bool(np.asarray(image).std() > 5)) for image in drawn.images])
"""


def make_environment(folder: Path) -> Path:
    """A virtual environment with REQUIREMENTS, and links to all else that this environment has.

    Returns its interpreter. Only the project itself is left out.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-compile"]
    done = subprocess.run([*install, "-r", str(REQUIREMENTS)], capture_output=True, text=True)
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["nothing"]
        pytest.fail(
            f"pip could not install {REQUIREMENTS.name}; is the package index reachable? It says: {said[0]}",
            pytrace=False,
        )
    names = {line.partition("==")[0] for line in REQUIREMENTS.read_text().splitlines() if "==" in line}
    here = Path(sysconfig.get_paths()["purelib"])
    (there,) = folder.glob("lib/python*/site-packages")
    for distribution in importlib.metadata.distributions(path=[str(here)]):
        name = re.sub(r"[-_.]+", "-", distribution.name).lower()
        if name not in names | {"selfnpo-fast"} and not name.startswith("nvidia-"):
            for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
                if not (there / top).exists():
                    (there / top).symlink_to(here / top)
    return python


@pytest.fixture
def folder(tmp_path) -> Iterator[Path]:
    """A folder for an environment: 4 GB, which pytest would keep."""
    yield tmp_path / "environment"
    shutil.rmtree(tmp_path / "environment", ignore_errors=True)


@pytest.mark.slow
def test_a_checkout_runs_on_older_versions(folder, tmp_path):
    """Imports, Triton's compiler for sm_90, training, a checkpoint, its continuation and a draw."""
    python, checkout, run = make_environment(folder), tmp_path / "checkout", tmp_path / "run"
    copy_tracked(checkout)
    for built in KERNELS_BUILT_HERE:  # for the torch of this environment
        (checkout / "kernels" / "selfnpo_kernels" / built.name).symlink_to(built)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SELFNPO")}
    environment |= {"PYTHONPATH": f"{checkout}:{checkout / 'kernels'}", "PYTHONDONTWRITEBYTECODE": "1"}

    def start(*words: object) -> subprocess.Popen:
        command = [str(python), *map(str, words)]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, **streams)

    def output(process: subprocess.Popen) -> str:
        text = process.communicate()[0]
        assert process.returncode == 0, text[-3000:]
        return text

    kernels = start("-m", "selfnpo_kernels.aot", "--arch", "90", "--json", tmp_path / "kernels.json")
    try:
        assert int(re.search(r"^(\d+) modules$", output(start("-c", IMPORTS, REQUIREMENTS, checkout)), re.M)[1]) > 150
        train = ("-m", "selfnpo_fast.train", "--config", checkout / "configs" / "digits.yaml", "--output", run)
        train += ("--engine.batch_size", "8", "--log.every", "1", "--log.checkpoint_every", "2")
        said = output(start(*train, "--updates", "3"))
        assert said.count("kernels: reference") == 1
        output(start(*train, "--updates", "5", "--resume"))
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [row["update"] for row in rows] == [1, 2, 3, 4, 5]
        drawn = output(start("-c", DRAWS, run / "negative"))
        assert "[((32, 32), True), ((32, 32), True)]" in drawn
        assert "was not built, or not for this torch" in drawn, "what serves CPU tensors is said, with the reason"
        output(
            start("-m", "pytest", "-q", checkout / "tests/ops/test_tracing.py", "-k", "test_one_graph and aot_eager")
        )
        assert re.search(r"\n2\d\d kernels, 0 failed\n", output(kernels))
    finally:
        kernels.kill()
        kernels.wait()

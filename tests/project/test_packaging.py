"""What an installation holds: every room, the kernels, the assets and the configs."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from checkouts import ROOT, copy_tracked

import selfnpo_fast


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> set[str]:
    """The files of a wheel that is built from what git tracks, without the C++ extension."""
    folder = tmp_path_factory.mktemp("wheel")
    copy_tracked(folder / "source")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    env = {"SELFNPO_BUILD_CPP": "0", "PATH": str(Path(sys.executable).parent), "HOME": str(folder)}
    done = subprocess.run(
        [*command, "--wheel-dir", str(folder), str(folder / "source")], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def tracked_below(*folders: str) -> list[Path]:
    done = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
    return [Path(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_a_wheel_holds_every_module_and_asset(names):
    for path in tracked_below("selfnpo_fast"):
        assert path.as_posix() in names
    for path in tracked_below("kernels"):
        assert path.relative_to("kernels").as_posix() in names
    for path in tracked_below("configs"):
        assert f"selfnpo_fast/configs/{path.name}" in names


@pytest.mark.slow
def test_a_wheel_has_the_version_of_the_code(names):
    assert f"selfnpo_fast-{selfnpo_fast.__version__}.dist-info/METADATA" in names


@pytest.mark.slow
def test_a_wheel_holds_nothing_else(names):
    """No top-level package of another name: not `kernels`, `tests` or `benchmarks`."""
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"selfnpo_fast", "selfnpo_kernels"}

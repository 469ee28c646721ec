"""What all benchmarks share: a description of the machine, medians and spread, charts, files."""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from selfnpo_fast.runtime.folders import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where it is available, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has finished its work; returns at once for the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Frees what nothing refers to any more; a GPU's free memory goes back to it, and its peaks begin
    anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def memory_gib(device: torch.device) -> dict[str, float] | None:
    """Peaks of a GPU's memory in GiB since `release`: `allocated` to tensors, and `reserved` by the
    allocator. None for the CPU."""
    if device.type != "cuda":
        return None
    peaks = {"allocated": torch.cuda.max_memory_allocated(device), "reserved": torch.cuda.max_memory_reserved(device)}
    return {name: value / 2**30 for name, value in peaks.items()}


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """float32 arithmetic that repeats: no TF32, and cuDNN's deterministic algorithms, which no timing
    picks. torch's switches are put back."""
    # Not set_float32_matmul_precision: torch refuses to say it once a backend's own switch was set.
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, False
    exact = {"benchmark": False, "deterministic": True, "allow_tf32": False}
    try:
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, **exact):
            yield
    finally:
        matmul.allow_tf32 = before


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name(device: torch.device) -> str:
    """The model of the GPU, or of the CPU with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {cores()} cores, {_cpu_model()}"


def slug(name: str) -> str:
    """A file name for a device: "NVIDIA H100 80GB HBM3" gives "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def describe(device: torch.device) -> dict[str, object]:
    """Machine, versions, threads, commit and time (UTC), ready for JSON.

    `load_average` covers the minute before the call, and shows whether the machine was busy.
    `git_dirty` says whether the checkout's tracked files differ from `git_commit`.
    """
    return {
        "device": device_name(device),
        "cpu": _cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def spread(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Median, smallest and largest of the values (n,), one value per round."""
    return {"median": float(np.median(values)), "low": float(np.min(values)), "high": float(np.max(values))}


def bar_chart(panels: Mapping[str, Mapping[str, Mapping[str, float]]], xlabel: str) -> Figure:
    """One panel per title with one horizontal bar per label.

    A bar is the median of a `spread`; its whiskers end at the smallest and the largest value.
    """
    # A Figure without pyplot has no global state and never looks for a display.
    from matplotlib.figure import Figure

    heights = [1.2 + 0.32 * len(bars) for bars in panels.values()]
    figure = Figure(figsize=(8.5, sum(heights)), dpi=140, layout="constrained")
    grid = figure.subplots(len(panels), squeeze=False, height_ratios=heights)
    for (title, bars), axes in zip(panels.items(), grid[:, 0], strict=True):
        middle, low, high = (np.array([bar[key] for bar in bars.values()]) for key in ("median", "low", "high"))
        axes.barh(range(len(bars)), middle, xerr=[middle - low, high - middle], height=0.65, error_kw={"lw": 0.9})
        for row, (value, end) in enumerate(zip(middle, high, strict=True)):
            label_style = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
            axes.annotate(f"{value:.1f}", (end, row), **label_style)
        axes.set_yticks(range(len(bars)), bars, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.08)
        axes.set_xlim(left=0)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(xlabel, fontsize=9)
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def write_json(output: Path, result: Mapping[str, object]) -> None:
    """Writes `result` to `output` as JSON: readers see the old file or the whole new one.

    Benchmarks write their results as they come, so that a process that is killed leaves what it has
    measured.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    write_file(output, json.dumps(result, indent=1) + "\n")


def drawn(draw: Callable[[], Figure | None]) -> Figure | None:
    """The chart that `draw` returns; None, which is said, where matplotlib is not installed."""
    try:
        return draw()
    except ImportError as error:
        print(f"no chart: {error}", file=sys.stderr)
        return None


def write_result(output: Path, result: Mapping[str, object], figure: Figure | None) -> None:
    """Writes a benchmark's JSON to `output` and its chart, if any, next to it, and prints the paths."""
    write_json(output, result)
    print(output)
    if figure is not None:
        figure.savefig(output.with_suffix(".png"))
        print(output.with_suffix(".png"))


def _cpu_model() -> str:
    """The CPU's model name as Linux gives it, elsewhere what Python knows of it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    """Output of a git command in the checkout; None where git fails, as outside of a checkout."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()

"""What a machine can do at most: bytes a second of a copy, FLOPs a second of a matrix product.

    python -m benchmarks.peaks --output FILE

Other benchmarks' figures are held against these. Both are medians over rounds, each of them between
two waits for the device. The JSON also names the versions of the libraries that are present.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a script: Python has put this folder on the path, not its parent
    sys.path[0] = str(ROOT)

from selfnpo_fast.runtime.command import short_spin  # noqa: E402

os.environ.update(short_spin())  # before torch is imported

import torch  # noqa: E402

from benchmarks.environment import describe, pick_device, spread, synchronize, write_json  # noqa: E402

PACKAGES = ("torch", "triton", "diffusers", "transformers", "deepspeed", "bitsandbytes", "peft", "xformers", "numpy")


def versions() -> dict[str, str | None]:
    """The version of each of PACKAGES; None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def rates(call: Callable[[], object], work: float, calls: int, rounds: int, device: torch.device) -> dict[str, float]:
    """Units of work a second, as a `spread` over rounds of `calls` calls; `work` is one call's."""
    call()
    found = []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(device)
        found.append(calls * work / (time.perf_counter() - start))
    return spread(found)


def measure(device: torch.device, *, size: int, side: int, calls: int, rounds: int) -> dict[str, dict[str, float]]:
    """Both peaks.

    `copy_bytes_per_second` counts the bytes read and those written by a copy of `size` bytes.
    `bf16_flops_per_second` counts 2 side^3 for a product of two (side, side) bfloat16 matrices.
    """
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    return {
        "copy_bytes_per_second": rates(lambda: target.copy_(source), 2 * size, calls, rounds, device),
        "bf16_flops_per_second": rates(lambda: matrix @ matrix, 2 * side**3, calls, rounds, device),
    }


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--quick", action="store_true", help="sizes for a smoke run")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    settings = {"size": 2**30, "side": 8192, "calls": 20, "rounds": 5}
    if args.quick:
        settings = {"size": 2**20, "side": 64, "calls": 2, "rounds": 2}
    result: dict[str, object] = {"benchmark": "peaks", "environment": describe(device), "versions": versions()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        result["memory_bytes"], result["multiprocessors"] = properties.total_memory, properties.multi_processor_count
    result |= {"settings": settings, "peaks": measure(device, **settings), "complete": True}
    write_json(args.output, result)
    for name, value in result["peaks"].items():
        print(f"{name}: {value['median']:.3g} [{value['low']:.3g}, {value['high']:.3g}]")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

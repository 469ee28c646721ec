"""`python -m selfnpo_kernels`: which backend serves which device on this machine, and why."""

from __future__ import annotations

import os
import sys

import torch

from selfnpo_kernels import backends
from selfnpo_kernels.ops import SCHEMAS


def main() -> int:
    """Print the table; 1 where SELFNPO_BACKEND or SELFNPO_REQUIRE_CPP ask for what is not there."""
    print(f"torch {torch.__version__}, CUDA {'present' if torch.cuda.is_available() else 'not present'}\n")
    print(f"{'backend':<11}{'there':<7}why")
    for name in backends.NAMES:
        there, why = backends.available(name)
        print(f"{name:<11}{'yes' if there else 'no':<7}{why}")
    print(f"\n{'tensors':<11}served by")
    devices = ("cuda", "cpu", "other") if torch.cuda.is_available() else ("cpu", "other")
    for device in devices:
        try:
            serves = backends.backend_of(device)
        except backends.BackendError as error:
            serves = f"nothing: {error}"
        print(f"{device:<11}{serves}")
    forced = os.environ.get("SELFNPO_BACKEND")
    if forced in (None, "", "reference"):
        print(f"{'float64':<11}reference, the oracle of the tests")
    needed = ([forced] if forced else []) + (["cpp"] if os.environ.get("SELFNPO_REQUIRE_CPP") == "1" else [])
    failed = any(name not in backends.NAMES or not backends.available(name)[0] for name in needed)
    for variable in ("SELFNPO_BACKEND", "SELFNPO_REQUIRE_CPP", "TRITON_INTERPRET", "ATEN_CPU_CAPABILITY"):
        if variable in os.environ:
            print(f"{variable}={os.environ[variable]}")
    print(f"\nops: {', '.join(SCHEMAS)}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m selfnpo_kernels`: which backend serves which device on this machine, and why."""

from __future__ import annotations

import os
import sys

import torch

from selfnpo_kernels import backends
from selfnpo_kernels.schemas import SCHEMAS


def main() -> int:
    """Prints the table and returns the exit status.

    The status is 1 where SELFNPO_BACKEND or SELFNPO_REQUIRE_CPP ask for a backend that is not
    available.
    """
    # The backends of this machine.
    print(f"torch {torch.__version__}, CUDA {'present' if torch.cuda.is_available() else 'not present'}\n")
    print(f"{'backend':<11}{'there':<7}why")
    for name in backends.NAMES:
        available, reason = backends.available(name)
        print(f"{name:<11}{'yes' if available else 'no':<7}{reason}")
    # The backend that serves the tensors of each device.
    print(f"\n{'tensors':<11}served by")
    devices = ("cuda", "cpu", "other") if torch.cuda.is_available() else ("cpu", "other")
    for device in devices:
        try:
            serving = backends.backend_of(device)
        except backends.BackendError as error:
            serving = f"nothing: {error}"
        print(f"{device:<11}{serving}")
    forced = os.environ.get("SELFNPO_BACKEND")
    if forced in (None, "", "reference"):
        print(f"{'float64':<11}reference, the oracle of the tests")
    # Whether a backend that the environment asks for is missing, and the variables that count.
    needed = ([forced] if forced else []) + (["cpp"] if os.environ.get("SELFNPO_REQUIRE_CPP") == "1" else [])
    failed = any(name not in backends.NAMES or not backends.available(name)[0] for name in needed)
    for variable in ("SELFNPO_BACKEND", "SELFNPO_REQUIRE_CPP", "TRITON_INTERPRET", "ATEN_CPU_CAPABILITY"):
        if variable in os.environ:
            print(f"{variable}={os.environ[variable]}")
    print(f"\nops: {', '.join(SCHEMAS)}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

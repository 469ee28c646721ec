"""The `selfnpo` command: train, doctor, sample, evaluate, correlate, merge, export."""

from __future__ import annotations

import importlib
import sys

from selfnpo_fast.runtime.command import launched_rank, run_command
from selfnpo_fast.runtime.console import quiet_libraries, setup_logging
from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.runtime.screen import show

USAGE = """usage: selfnpo COMMAND [options]

  train      make a negative model of a diffusion model          selfnpo train --config configs/digits.yaml
  doctor     say what a config will cost, loading nothing        selfnpo doctor --config configs/sd15.yaml
  sample     draw pictures with a negative model                 selfnpo sample --negative runs/digits --prompt "..."
  evaluate   compare base and base + negative on digits          selfnpo evaluate --negative runs/digits
  correlate  measure how similar the two predictions are         selfnpo correlate --model M --negative N [--base B]
  merge      write theta + alpha eta + beta delta as a network   selfnpo merge --base B --negative N --output FOLDER
  export     make a negative model of a checkpoint               selfnpo export --checkpoint C --output FOLDER

`selfnpo COMMAND --help` lists the options. guidance_scale everywhere is diffusers' (the paper's omega + 1).
"""

COMMANDS = {
    "train": "selfnpo_fast.train",
    **{
        name: f"selfnpo_fast.commands.{name}"
        for name in ("doctor", "sample", "evaluate", "correlate", "merge", "export")
    },
}
"""The module of each command, imported when needed; its `run` takes the words that follow."""


def main(argv: list[str] | None = None) -> int:
    """Run the command that `argv`, by default the command line of the process, names.

    Returns the exit code, as `runtime.command.run_command` does.
    """
    words = sys.argv[1:] if argv is None else argv
    return run_command(lambda: _dispatch(words))


def _dispatch(argv: list[str]) -> int:
    """Run the command that `argv` names; its exit code. Raises UserError for an unknown command."""
    if not argv or argv[0] in ("-h", "--help"):
        show(USAGE)
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        raise UserError(f"unknown command {argv[0]!r}; expected one of {', '.join(COMMANDS)}")
    quiet_libraries()
    setup_logging(launched_rank())
    importlib.import_module(COMMANDS[argv[0]]).run(argv[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main())

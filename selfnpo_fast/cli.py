"""The `selfnpo` command: train, doctor, sample, evaluate, correlate, merge."""

from __future__ import annotations

import importlib
import sys

from selfnpo_fast.runtime.console import quiet_libraries, setup_logging
from selfnpo_fast.runtime.errors import RunError, UserError

USAGE = """usage: selfnpo COMMAND [options]

  train      make a negative model of a diffusion model          selfnpo train --config configs/digits.yaml
  doctor     say what a config will cost, loading nothing        selfnpo doctor --config configs/sd15.yaml
  sample     draw pictures with a negative model                 selfnpo sample --negative runs/digits --prompt "..."
  evaluate   compare base and base + negative on digits          selfnpo evaluate --negative runs/digits
  correlate  measure how similar the two predictions are         selfnpo correlate --model M --negative N [--base B]
  merge      write theta + alpha eta + beta delta as a network   selfnpo merge --base B --negative N --output FOLDER

`selfnpo COMMAND --help` lists the options. guidance_scale everywhere is diffusers' (the paper's omega + 1).
"""

COMMANDS = {
    "train": "selfnpo_fast.train",
    **{name: f"selfnpo_fast.commands.{name}" for name in ("doctor", "sample", "evaluate", "correlate", "merge")},
}
"""The module of each command, imported when needed; its `run` takes the words that follow."""


def main(argv: list[str] | None = None) -> int:
    """Run the command that `argv`, by default the command line of the process, names.

    Returns the exit code: 0 after success, 2 after one line about bad input, 1 after one line about
    a run that cannot go on.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        print(f"error: unknown command {argv[0]!r}; expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    quiet_libraries()
    setup_logging(0)
    try:
        importlib.import_module(COMMANDS[argv[0]]).run(argv[1:])
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The outermost frame of every command: what ends a command is one line and an exit code."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from selfnpo_fast.runtime.errors import RunError, UserError, one_line
from selfnpo_fast.runtime.screen import flush, printable, safe_screen

_PACKAGE = Path(__file__).resolve().parents[1]
_MEND = "use a smaller batch size, resolution or precision; for training, selfnpo doctor says what fits"
_CPU_MEMORY = "DefaultCPUAllocator: can't allocate memory"
"""What torch says, as a RuntimeError, where the host's memory is full."""


def run_command(action: Callable[[], int | None]) -> int:
    """Run a command; returns its exit code, and prints what has ended it as one line.

    0      success, unless `action` returns another code
    1      a run that cannot go on, or an error that nobody foresaw; the traceback of the latter is
           in a file that the line names
    2      bad input
    130    Ctrl-C

    Output that cannot be written is left out. Where that is the command's result, on standard
    output, the exit code is 1, except where the reader has gone away.
    """
    os.environ.update(short_spin())
    with safe_screen():
        code = 0
        try:
            code = action() or 0
        except (UserError, RunError) as error:
            code = 2 if isinstance(error, UserError) else 1
            # All ranks raise most such errors together, and one of them prints it.
            if launched_rank() == 0 or error.of_one_rank:
                _say(f"error: {error}")
        except KeyboardInterrupt:
            code = 130
            _say("interrupted")
        except Exception as error:
            code = 1
            _say(f"error: {_unforeseen(error)}")
        unwritten = flush()
        if unwritten is not None:
            _say(f"error: standard output could not be written: {one_line(unwritten)}")
            code = code or 1
    return code


def launched_rank() -> int:
    """The rank that a launcher has given to this process; 0 without a launcher."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isascii() and rank.isdigit() else 0


def short_spin() -> dict[str, str]:
    """What commands add to `os.environ`, so that OpenMP's threads soon wait for each other asleep.

    GNU's OpenMP, which torch uses on CPUs, lets a thread spin at a barrier for milliseconds. Where
    other work shares the cores, it spins in that work's time. benchmarks/bench_busy.py measures
    what 3,000 rounds gain there, and the few percent that they cost on an idle machine. OpenMP
    reads the variable when torch is imported, so this comes first. What the user has set is kept.
    """
    chosen = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
    return {} if chosen else {"GOMP_SPINCOUNT": "3000"}


def _say(line: str) -> None:
    """Print one line on standard error, with the rank where it is not 0."""
    rank = launched_rank()
    print(printable(f"rank {rank}: {line}" if rank else line), file=sys.stderr)


def _unforeseen(error: Exception) -> str:
    """What an error that is neither a UserError nor a RunError is, where it arose, and a mend."""
    where = _place(error)
    if _is_out_of_memory(error):
        return f"out of memory at {where}: {one_line(error)}; {_MEND}"
    text = f"{type(error).__name__} at {where}: {one_line(error)}"
    lines = "".join(traceback.format_exception(error))
    try:
        handle, name = tempfile.mkstemp(prefix="selfnpo-", suffix=".traceback.txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(lines)
    except OSError as unwritten:
        print(printable(lines, keep="\n"), file=sys.stderr, end="")
        return f"{text}; the traceback is above, since no file could hold it ({one_line(unwritten)})"
    return f"{text}; the traceback is in {name}"


def _is_out_of_memory(error: Exception) -> bool:
    """Whether the memory of the host or of a GPU is full."""
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return on_gpu or isinstance(error, MemoryError) or _CPU_MEMORY in str(error)


def _place(error: Exception) -> str:
    """File and line of the innermost frame in this package, or else of the innermost frame."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if _PACKAGE in Path(frame.filename).absolute().parents]
    frame = (ours or frames)[-1]
    path = Path(frame.filename).absolute()
    return f"{path.relative_to(_PACKAGE.parent) if ours else path}:{frame.lineno}"

"""One command that brings every figure of a GPU in its first run, the most valuable ones first.

    python -m benchmarks.gpu_check OUT                  # 9 minutes; needs no weights and no network
    python -m benchmarks.gpu_check OUT --part update    # some parts
    python -m benchmarks.gpu_check OUT --tiny           # all parts, tiny, on any machine
    python -m benchmarks.gpu_check --report OUT         # writes docs/gpu.md from the files in OUT

Each part (`gpu_parts.py`) is a process with a time limit, a log and a JSON in OUT. Parts write
their results as they come, so a part that is cut off keeps what it has measured. summary.json holds
how each part ended; it is written again after every part. A later check of the same card adds to
it. The exit status is 1 where a part failed, was cut off or was not begun.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a script: Python has put this folder on the path, not its parent
    sys.path[0] = str(ROOT)

from selfnpo_fast.runtime.command import short_spin  # noqa: E402

os.environ.update(short_spin())  # before torch is imported

from benchmarks.environment import describe, pick_device, write_json  # noqa: E402
from benchmarks.gpu_parts import COMPLETE, CUT_OFF, NOT_BEGUN, PARTS, Part, read_tests  # noqa: E402
from benchmarks.gpu_report import page, part_figures, read, write_page  # noqa: E402
from selfnpo_fast.runtime.errors import UserError  # noqa: E402

MINUTES = 9.0
LEAST = 15.0
"""Seconds that have to be left for a part to begin."""


def run_part(part: Part, out: Path, device: str, *, tiny: bool, seconds: float) -> dict[str, object]:
    """Runs one part for at most `seconds` and returns its record for the summary.

    The record has `name`, `what`, `status`, `seconds`, and `said`: the last line of a failed part's
    log.
    """
    output, log_file = out / f"{part.name}.json", out / f"{part.name}.log"
    output.unlink(missing_ok=True)  # an earlier run's result must not pass for this one
    command = part.command(output, device, tiny=tiny)
    # The checkout need not be installed.
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
    start = time.monotonic()
    with log_file.open("wb") as log:
        # A session of its own: a part that is cut off ends with all of its processes.
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
            status = COMPLETE if code == 0 else f"failed, exit status {code}"
        except subprocess.TimeoutExpired:
            status = CUT_OFF
        finally:
            _end(process)
    text = log_file.read_text(encoding="utf-8", errors="replace")
    if part.tests:
        write_json(output, read_tests(text))
    lines = [line for line in text.splitlines() if line.strip()]
    return {
        "name": part.name,
        "what": part.what,
        "command": command[1:],
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "said": lines[-1][:300] if lines and status != COMPLETE else "",
    }


def _end(process: subprocess.Popen) -> None:
    """Ends what is left of a part's session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def check(out: Path, parts: Sequence[Part], *, minutes: float, device: str, tiny: bool) -> int:
    """Runs the parts one after the other; returns the exit status."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    summary = {"environment": describe(pick_device(device)), "tiny": tiny, "minutes": minutes, "parts": []}
    # What an earlier check has found on this card stays, but for the parts that run again.
    earlier = read(out, "summary")
    records = {}
    if earlier and (earlier["tiny"], earlier["environment"]["device"]) == (tiny, summary["environment"]["device"]):
        records = {record["name"]: record for record in earlier["parts"]}
    status = 0
    for part in parts:
        left = end - time.monotonic()
        if left < LEAST:
            record = {"name": part.name, "what": part.what, "status": NOT_BEGUN, "seconds": 0.0, "said": ""}
        else:
            seconds = left if tiny else min(left, part.limit)  # a CPU may be slow
            record = run_part(part, out, device, tiny=tiny, seconds=seconds)
        status |= record["status"] != COMPLETE
        if record["status"] != NOT_BEGUN or part.name not in records:
            records[part.name] = record
        summary["parts"] = list(records.values())
        write_json(out / "summary.json", summary)
        print(f"{part.name:<14}{record['status']}, {record['seconds']:.0f} s {record['said']}", flush=True)
        for figure in part_figures(out, part.name):
            print(f"    {figure.name}: {figure.text()}", flush=True)
    (out / "gpu.md").write_text(page(out), encoding="utf-8")
    return int(status)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", help="folder of results")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for all parts; 9 by default")
    parser.add_argument("--part", choices=[part.name for part in PARTS], action="append", help="may be repeated")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--tiny", action="store_true", help="small networks and few rounds: no figure counts")
    parser.add_argument("--report", type=Path, metavar="OUT", help="writes docs/gpu.md from results; runs nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 1 where a part failed, was cut off or was not begun."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.report:
        try:
            print(write_page(args.report))
        except UserError as error:
            parser.error(str(error))
        return 0
    if args.out is None:
        parser.error("OUT is missing: the folder of results")
    if not args.minutes > 0:
        parser.error(f"--minutes: {args.minutes} is not possible; expected a number above 0")
    device = pick_device(args.device)
    if device.type == "cpu" and not args.tiny:
        parser.error("there is no CUDA device here: --tiny runs all parts on a CPU")
    parts = [part for part in PARTS if (not args.part or part.name in args.part) and (part.tiny or not args.tiny)]
    return check(args.out.resolve(), parts, minutes=args.minutes, device=str(device), tiny=args.tiny)


if __name__ == "__main__":
    raise SystemExit(main())

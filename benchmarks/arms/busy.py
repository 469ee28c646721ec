"""A process that trains the digits on request, for bench_busy.py."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

WARM_UP = 2
"""Updates before any that is timed; their loss is the correctness gate's."""


def serve(arguments: Sequence[str]) -> None:
    """Prints the loss of the first updates, then pairs per second for each line of standard input.

    A line holds the least number of seconds to train for. `arguments` are those of `selfnpo train`.
    """
    import torch  # noqa: F401  before the benchmark's module, which would shorten the spin of both arms

    from benchmarks.profile_step import make_trainer
    from selfnpo_fast.runtime.console import quiet_libraries

    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        trainer, recorder, _ = make_trainer(arguments, Path(folder) / "run")
        trainer.producer.rollout.fill()
        for _ in range(WARM_UP):
            trainer.train_update(recorder)
        print(json.dumps(recorder.flush(trainer.update, trainer.engine.lr)["loss"]), flush=True)
        for line in sys.stdin:
            before, start = trainer.update, time.perf_counter()
            while (elapsed := time.perf_counter() - start) < float(line) or trainer.update == before:
                trainer.train_update(recorder)
                recorder.discard()  # metrics that nothing reads
            pairs = (trainer.update - before) * trainer.config.engine.batch_size
            print(json.dumps(pairs / elapsed), flush=True)
        trainer.producer.close()

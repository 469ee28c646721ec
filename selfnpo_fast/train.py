"""The train command: `selfnpo train`, or `deepspeed selfnpo_fast/train.py --config CONFIG`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

# For a script, Python puts the script's folder first on the path, where modules of this package
# would shadow others of the same name.
_PACKAGE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _PACKAGE]

from dataclasses import dataclass  # noqa: E402

from selfnpo_fast.config import TrainConfig  # noqa: E402
from selfnpo_fast.runtime.command import launched_rank, run_command  # noqa: E402
from selfnpo_fast.runtime.console import logger, quiet_libraries, setup_logging  # noqa: E402
from selfnpo_fast.runtime.errors import UserError  # noqa: E402
from selfnpo_fast.runtime.folders import (  # noqa: E402
    check_run_folder,
    check_writable,
    clear_run_folder,
    remove_leftovers,
    write_file,
    writing,
)
from selfnpo_fast.runtime.locks import only_writer  # noqa: E402
from selfnpo_fast.runtime.options import Parsed, parse_with_config  # noqa: E402
from selfnpo_fast.runtime.stopping import Stopped, StopRequest, check_stop  # noqa: E402

# A checkout has the configs next to the package, an installed package has them inside.
CONFIGS = _PACKAGE.parent / "configs" if (_PACKAGE.parent / "configs").is_dir() else _PACKAGE / "configs"
DEFAULT_CONFIG = CONFIGS / "digits.yaml"


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Train a negative model (Self-NPO)."""

    resume: bool = False
    """Continue from the newest checkpoint of the output folder."""
    overwrite: bool = False
    """Delete the contents of the output folder first."""
    replay_step: int | None = None
    """Do not train: make the pairs of this update of the output folder's run again, and show
    them."""


Request = Parsed[RunOptions, TrainConfig]
"""A parsed command line."""


def parse(argv: list[str]) -> Request:
    """Read the command line. Raises UserError for options that are unknown, or not possible."""
    # Older launchers add the local rank, which is also in the environment.
    argv = [word for word in argv if not word.startswith(("--local_rank", "--local-rank"))]
    request = parse_with_config(RunOptions, TrainConfig, argv, "selfnpo train", DEFAULT_CONFIG)
    options, step = request.options, request.options.replay_step
    if sum((options.resume, options.overwrite, step is not None)) > 1:
        raise UserError("--resume, --overwrite and --replay-step exclude each other; give one")
    if step is not None and not 1 <= step <= request.config.updates:
        raise UserError(f"--replay-step: {step} is not possible; expected an update from 1 to {request.config.updates}")
    return request


def run(argv: list[str]) -> None:
    """One whole run.

    Raises UserError for bad input, before anything is written, and RunError where it cannot go on.
    """
    request = parse(argv)
    from selfnpo_fast.runtime.world import init_world
    from selfnpo_fast.training.lifecycle import PeerWatch, leave_at_once

    world = init_world()
    setup_logging(world.rank)
    with StopRequest(world) as stop, PeerWatch(world, leave_at_once), contextlib.ExitStack() as held:
        try:
            output, alone = world.on_main(lambda: _claim(request, held))
            _run(request, output, alone, world, stop)
        except Stopped as stopped:
            logger.warning("%s", stopped)


def _claim(request: Request, held: contextlib.ExitStack) -> tuple[Path, bool]:
    """The output folder, locked until `held` is closed, and whether its file system has locks.

    Raises UserError where another process writes to it, or where it is not as the request needs it.
    """
    path, options = request.config.output, request.options
    alone = held.enter_context(only_writer(check_writable(path)))
    continues = options.resume or options.replay_step is not None
    return check_run_folder(path, resume=continues, overwrite=options.overwrite), alone


def _run(request: Request, output: Path, alone: bool, world, stop) -> None:
    """The run, once all ranks are connected; `alone` as `_claim` has found it."""
    from selfnpo_fast.training.inputs import load_inputs
    from selfnpo_fast.training.recorder import Recorder
    from selfnpo_fast.training.replay import replay
    from selfnpo_fast.training.resumable import newest_checkpoint
    from selfnpo_fast.training.trainer import Trainer

    # Find and read all that the run needs: nothing is written yet.
    config, replaying, newest = request.config, request.options.replay_step is not None, None
    kernels = _kernels(world.device.type)
    checkpoints, known = output / "checkpoints", None
    if request.options.resume or replaying:
        newest = known = newest_checkpoint(checkpoints, config, world, before=request.options.replay_step)
    if replaying and newest is None:  # a later one also tells what the run has read
        known = newest_checkpoint(checkpoints, config, world)
    inputs = load_inputs(config, world)
    if known is not None:
        inputs.refuse_changed(known, world)
    check_stop("before training; the output folder is as it was")
    trainer = Trainer(config, inputs, world, output)
    recorder = Recorder(config, world, trainer.adapter.schedule.num_train_timesteps)
    # Continue from a checkpoint.
    if newest is not None:
        trainer.resume(newest, recorder)
    elif request.options.resume:
        logger.info("--resume: no checkpoint in %s; starting from the beginning", output)
    if replaying:
        replay(trainer, recorder, request.options.replay_step)
        return
    # Prepare the folder, once every rank has looked at it.
    world.barrier()
    if world.is_main:
        with writing(output):
            if request.options.overwrite:
                clear_run_folder(output)
            for folder in (output, output / "checkpoints"):
                remove_leftovers(folder, locked=alone)
            output.mkdir(parents=True, exist_ok=True)
            write_file(output / "config.yaml", request.text)
    setup_logging(world.rank, output / "train.log")
    describe(config, world, trainer, kernels)
    recorder.open(output, trainer.update)
    # Train.
    try:
        negative = trainer.run(recorder, stop)
    finally:
        recorder.close()
        trainer.producer.close()
    if negative is not None:
        logger.info("negative model: %s", negative)


def _kernels(device_type: str) -> str:
    """The name of the backend of the fused ops.

    Raises UserError where SELFNPO_BACKEND asks for a backend that is not there.
    """
    from selfnpo_kernels import backends

    try:
        return backends.describe(device_type)
    except backends.BackendError as error:
        raise UserError(str(error)) from error


def describe(config: TrainConfig, world, trainer, kernels: str) -> None:
    """Log one line about what is trained and how."""
    trained = sum(getattr(p, "ds_numel", p.numel()) for _, p in trainer.engine.trainable)
    logger.info(
        "%s: %d prompts, %.2f M trained parameters (%s%s), %s on %d x %s, ZeRO %d, %s rollouts from %s with "
        "omega = %g, %s reference, kernels: %s",
        config.model.path,
        trainer.table.prompts,
        trained / 1e6,
        f"LoRA rank {config.lora.rank}" if config.lora.rank else "full weights",
        "" if trainer.adapter.boundary is None else f" of {' and '.join(trainer.adapter.trained_denoisers)}",
        config.engine.precision,
        world.size,
        world.device.type,
        trainer.engine.stage,
        config.rollout.mode,
        config.rollout.start,
        config.rollout.omega,
        config.reference.kind,
        kernels,
    )


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code, as `runtime.command.run_command` does.

    It is 0 also after a signal that has stopped the run with a checkpoint.
    """
    words = sys.argv[1:] if argv is None else argv
    return run_command(lambda: _command(words))


def _command(argv: list[str]) -> None:
    """`run`, with the log of a command."""
    quiet_libraries()
    setup_logging(launched_rank())
    run(argv)


if __name__ == "__main__":
    sys.exit(main())

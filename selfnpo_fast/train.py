"""Train a negative model: `deepspeed selfnpo_fast/train.py --config configs/digits.yaml` or `selfnpo train`."""

from __future__ import annotations

import sys
from pathlib import Path

# Run as a script, Python puts this folder first on the path, where our modules would shadow others of the same name.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _HERE]

import os  # noqa: E402

from selfnpo_fast.config import TrainConfig  # noqa: E402
from selfnpo_fast.console import logger, quiet_libraries, setup_logging  # noqa: E402
from selfnpo_fast.errors import UserError  # noqa: E402
from selfnpo_fast.folders import check_run_folder, clear_run_folder  # noqa: E402

# A checkout has them beside the package, an installed package inside it.
CONFIGS = _HERE.parent / "configs" if (_HERE.parent / "configs").is_dir() else _HERE / "configs"
DEFAULT_CONFIG = CONFIGS / "digits.yaml"


def build_parser():
    """The command line: --config, --print_config, one dotted option per field of TrainConfig, and how to treat the
    output folder.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="selfnpo train",
        description="Train a negative model (Self-NPO).",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file; later options override it")
    parser.add_class_arguments(TrainConfig, fail_untyped=True)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the output folder")
    parser.add_argument("--overwrite", action="store_true", help="delete what the output folder holds")
    return parser


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def parse(argv: list[str]):
    """`(config, resume, overwrite, config_yaml)` from the command line. Raises UserError for what cannot be."""
    from jsonargparse import ArgumentError, Namespace

    argv = [word for word in argv if not word.startswith(("--local_rank", "--local-rank"))]
    if not any(word.startswith(("--config", "-h", "--help")) for word in argv):
        logger.info("no --config given: running %s", DEFAULT_CONFIG)
        argv = ["--config", str(DEFAULT_CONFIG), *argv]
    parser = build_parser()
    try:
        namespace = parser.parse_args(argv)
        resume, overwrite = namespace.pop("resume"), namespace.pop("overwrite")
        namespace.pop("config")
        text = parser.dump(Namespace(**namespace), skip_validation=True)
        config = parser.instantiate(namespace)
        config = TrainConfig(**{key: value for key, value in vars(config).items() if not key.startswith("__")})
    except (ArgumentError, TypeError, ValueError) as error:
        raise UserError(_one_line(error)) from error
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other; give one")
    return config, resume, overwrite, text


def train(argv: list[str]) -> None:
    """One whole run. Raises UserError for bad input, before anything is written."""
    config, resume, overwrite, text = parse(argv)
    output = check_run_folder(config.output, resume=resume, overwrite=overwrite)

    import torch

    from selfnpo_fast.checkpoint import newest_checkpoint
    from selfnpo_fast.recorder import Recorder
    from selfnpo_fast.trainer import Trainer, load_inputs
    from selfnpo_fast.world import init_world

    world = init_world()
    setup_logging(world.rank)
    newest = newest_checkpoint(output / "checkpoints", config, world) if resume else None
    trainer = Trainer(config, load_inputs(config, world), world, output)
    if newest is not None:
        trainer.resume(newest)
    elif resume:
        logger.info("--resume: no checkpoint in %s; starting from the beginning", output)
    if world.size > 1:
        torch.distributed.barrier()  # every rank has looked at the folder before rank 0 changes it
    if world.is_main:
        if overwrite:
            clear_run_folder(output)
        output.mkdir(parents=True, exist_ok=True)
        (output / "config.yaml").write_text(text)
    setup_logging(world.rank, output / "train.log")
    describe(config, world, trainer)
    recorder = Recorder(config, world, output, trainer.update)
    try:
        negative = trainer.run(recorder)
    finally:
        recorder.close()
    logger.info("negative model: %s", negative)


def describe(config: TrainConfig, world, trainer) -> None:
    """Say once what was chosen."""
    trained = sum(getattr(p, "ds_numel", p.numel()) for _, p in trainer.engine.trainable)
    logger.info(
        "%s: %d prompts, %.2f M trained parameters (%s), %s on %d x %s, ZeRO %d, %s rollouts from %s with w = %g, "
        "%s reference, kernels: PyTorch reference",
        config.model.path,
        trainer.table.prompts,
        trained / 1e6,
        f"LoRA rank {config.lora.rank}" if config.lora.rank else "full weights",
        config.engine.precision,
        world.size,
        world.device.type,
        trainer.engine.stage,
        config.rollout.mode,
        config.rollout.start,
        config.rollout.w,
        config.reference.kind,
    )


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 after one line about bad input."""
    quiet_libraries()
    rank = int(os.environ.get("RANK", 0))
    setup_logging(rank)
    try:
        train(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

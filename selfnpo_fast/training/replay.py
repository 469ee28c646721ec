"""The pairs of one update of a past run, made again: `selfnpo train --replay-step N`.

The run continues from the newest checkpoint before update N, in memory only, so that the reference
and the rollout are what they were.
"""

from __future__ import annotations

import json

import torch
from PIL import Image
from safetensors.torch import save_file

from selfnpo_fast.models import Adapter
from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.folders import begin_aside, finish_aside, writing
from selfnpo_fast.runtime.images import image_grid
from selfnpo_fast.runtime.stopping import check_stop
from selfnpo_fast.training.outputs import json_row
from selfnpo_fast.training.recorder import Recorder
from selfnpo_fast.training.trainer import Trainer

COLUMNS = 12
"""Pairs in the picture."""
LOGGED = 8
"""Pairs in the log."""


def replay(trainer: Trainer, recorder: Recorder, step: int) -> None:
    """Write the pairs of update `step` to `replay/update-NNNNNNN` in the run's folder.

    pairs.safetensors    the fields of the pairs, by name, worst loss first
    pairs.jsonl          one line per pair, worst loss first
    grid.png             the worst pairs, decoded; of a video its middle frame

    Nothing else in the folder changes. All ranks take part; rank 0 writes. Raises RunError where it
    cannot.
    """
    logger.info("making updates %d to %d again, without recording them", trainer.update + 1, step)
    while trainer.update < step - 1:
        check_stop(f"before update {step} was reached; nothing is written")
        trainer.train_update(recorder)
        recorder.discard()
    pairs = _pairs_of_all_ranks(trainer)
    if pairs is None:
        return
    rows = _rows(pairs, trainer.prompts)
    target = trainer.output / "replay" / f"update-{step:07d}"
    lines, grid = "".join(json.dumps(json_row(row)) + "\n" for row in rows), _grid(trainer, pairs, rows)
    with writing(target):
        aside = begin_aside(target)
        save_file(pairs, aside / "pairs.safetensors")
        (aside / "pairs.jsonl").write_text(lines, encoding="utf-8")
        grid.save(aside / "grid.png")
        finish_aside(aside, target)
    for row in rows[:LOGGED]:
        logger.info("loss %(loss).4g  s %(s)d  t %(t)d  sample %(sample_id)d  %(prompt)r", row)
    logger.info("all %d pairs of update %d, worst first: %s", len(rows), step, target)


def _pairs_of_all_ranks(trainer: Trainer) -> dict[str, torch.Tensor] | None:
    """The next update's pairs and losses by name, on the host, worst first; None above rank 0."""
    micro_batches = [trainer.method.inspect(trainer.predict, pairs) for pairs in trainer.producer.take().micro_batches]
    of_rank = {name: torch.cat([part[name] for part in micro_batches]).cpu() for name in micro_batches[0]}
    by_rank = trainer.world.gather(of_rank)
    if not trainer.world.is_main:
        return None
    pairs = {name: torch.cat([part[name] for part in by_rank]) for name in of_rank}
    order = pairs["loss"].nan_to_num(nan=torch.inf).argsort(descending=True)
    return {name: value[order].contiguous() for name, value in pairs.items()}


def _rows(pairs: dict[str, torch.Tensor], prompts: list[str]) -> list[dict]:
    """The lines of pairs.jsonl."""
    return [
        {
            "sample_id": int(pairs["sample_ids"][i]),
            "t": int(pairs["t"][i]),
            "s": int(pairs["s"][i]),
            "loss": float(pairs["loss"][i]),
            "weight": float(pairs["weight"][i]),
            "prompt": prompts[row - 1] if (row := int(pairs["rows"][i])) else "",
        }
        for i in range(len(pairs["loss"]))
    ]


def _pictures(adapter: Adapter, latents: torch.Tensor) -> torch.Tensor:
    """Pictures (N, 3, H, W) of latents (N, ...); of a video the frame in its middle."""
    if not adapter.family.draws_videos:
        return adapter.decode(latents).cpu()
    middle = adapter.size.frames // 2
    return torch.cat([adapter.decode(one)[:, middle].cpu() for one in latents.split(1)])


def _grid(trainer: Trainer, pairs: dict[str, torch.Tensor], rows: list[dict]) -> Image.Image:
    """The worst pairs, decoded: the student's input, its x0 if the method gives it, the target."""
    columns = min(COLUMNS, len(rows))
    labels = [
        f"sample {row['sample_id']}, t {row['t']}, s {row['s']}, loss {row['loss']:.3g}" for row in rows[:columns]
    ]
    captions = {"x_s": labels, "student_x0": ["student's x0"] * columns, "target": ["target"] * columns}
    shown = [name for name in captions if name in pairs]
    stacks = [pairs[name][:columns].to(trainer.world.device) for name in shown]
    finite = [stack.nan_to_num(nan=0, posinf=0, neginf=0) for stack in stacks]
    pictures = torch.cat([_pictures(trainer.adapter, stack) for stack in finite])
    texts = [text for name in shown for text in captions[name]]
    return image_grid(pictures, columns, texts, title="The highest losses: input x_s, student's x0, target")

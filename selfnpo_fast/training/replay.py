"""The pairs of one update of a past run, made again for a look: `selfnpo train --replay-step N`.

The run goes on from the newest checkpoint before N, in memory alone, so that reference and slots are what they were.
"""

from __future__ import annotations

import json
from dataclasses import fields

import torch
from safetensors.torch import save_file
from torch import nn

from selfnpo_fast.rollout import Pairs
from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.folders import begin_aside, finish_aside
from selfnpo_fast.runtime.images import image_grid
from selfnpo_fast.training.recorder import Recorder
from selfnpo_fast.training.trainer import Trainer
from selfnpo_kernels import guided_step

PICTURES = 12


def replay(trainer: Trainer, recorder: Recorder, step: int) -> None:
    """Write `replay/update-NNNNNNN` in the run's folder: pairs.safetensors, pairs.jsonl (worst first) and grid.png.

    Nothing else in the folder changes. All ranks take part; rank 0 writes.
    """
    logger.info("making updates %d to %d again, without recording them", trainer.update + 1, step)
    while trainer.update < step - 1:
        trainer.train_update(recorder)
        recorder.pending = 0  # sums nobody will read
    micro_batches = [_look(trainer, pairs) for pairs in trainer.producer.take().micro_batches]
    mine = {name: torch.cat([part[name] for part in micro_batches]).cpu() for name in micro_batches[0]}
    everyones = trainer.world.gather(mine)
    if not trainer.world.is_main:
        return
    pairs = {name: torch.cat([part[name] for part in everyones]) for name in mine}
    order = pairs["loss"].nan_to_num(nan=torch.inf).argsort(descending=True)
    pairs = {name: value[order].contiguous() for name, value in pairs.items()}
    rows = [
        {
            "sample_id": int(pairs["sample_ids"][i]),
            "t": int(pairs["t"][i]),
            "s": int(pairs["s"][i]),
            "loss": float(pairs["loss"][i]),
            "weight": float(pairs["weight"][i]),
            "prompt": trainer.prompts[row - 1] if (row := int(pairs["rows"][i])) else "",
        }
        for i in range(len(order))
    ]
    target = trainer.output / "replay" / f"update-{step:07d}"
    aside = begin_aside(target)
    save_file(pairs, aside / "pairs.safetensors")
    (aside / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    _grid(trainer, pairs, rows).save(aside / "grid.png")
    finish_aside(aside, target)
    for row in rows[:8]:
        logger.info("loss %(loss).4g  s %(s)d  t %(t)d  sample %(sample_id)d  %(prompt)r", row)
    logger.info("all %d pairs of update %d, worst first: %s", len(rows), step, target)


@torch.no_grad()
def _look(trainer: Trainer, pairs: Pairs) -> dict[str, torch.Tensor]:
    """The fields of the pairs, the loss (B,) and the student's own x0 (B, ...) of each."""
    pred = trainer.adapter.predict(trainer.engine, pairs.x_s, pairs.s, trainer.table.gather(pairs.rows))
    _, loss = trainer.objective(pred, pairs.x_s, pairs.s, pairs.target, pairs.weight)
    k = nn.functional.pad(trainer.objective.k, (0, 5))  # x0 alone; the step it makes leads nowhere
    _, x0 = guided_step(pred, None, pairs.x_s, k, index=pairs.s)
    return {field.name: getattr(pairs, field.name) for field in fields(pairs)} | {"loss": loss, "student_x0": x0}


def _grid(trainer: Trainer, pairs: dict[str, torch.Tensor], rows: list[dict]):
    """Student's input, student's x0 and target of the worst pairs, decoded."""
    columns = min(PICTURES, len(rows))
    stacks = [pairs[name][:columns].to(trainer.world.device) for name in ("x_s", "student_x0", "target")]
    finite = [stack.nan_to_num(nan=0, posinf=0, neginf=0) for stack in stacks]
    pictures = torch.cat([trainer.adapter.decode(stack).cpu() for stack in finite])
    facts = [f"sample {row['sample_id']}, t {row['t']}, s {row['s']}, loss {row['loss']:.3g}" for row in rows[:columns]]
    captions = [*facts, *["student's x0"] * columns, *["target"] * columns]
    return image_grid(pictures, columns, captions, title="The highest losses: input x_s, student's x0, target")

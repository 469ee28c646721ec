"""What a run has read, recorded in its checkpoints: prompts, latents and base by their content.

A path says nothing about what lies there. A run that goes on with other prompts, pictures or
weights would mix two runs without a word.

Shape letter: N prompts.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable
from pathlib import Path

import torch

from selfnpo_fast.data.prompts import fingerprint as texts_fingerprint
from selfnpo_fast.diffusion.schedule_facts import ScheduleFacts, check_same_schedule
from selfnpo_fast.models.conditioning import ConditioningTable
from selfnpo_fast.negatives.fingerprint import TOLERANCE, fingerprint, matches
from selfnpo_fast.negatives.weights import WeightReader
from selfnpo_fast.runtime.console import logger, say_once
from selfnpo_fast.runtime.errors import UserError, one_line
from selfnpo_fast.training.methods.base import MethodInputs

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integers that have as many bytes as an element."""
_SKETCHED = 32
"""Rows of a tensor that its sketch looks at."""
_CHUNK = 1024
"""Latents that get their codes at once."""
_CODED, _CODES = 65_536, 4
"""Latents that have codes, and codes of one latent."""
_CODE_TOLERANCE = 0.02
"""Largest difference of two codes of one picture, in shares of the root mean square of all codes.
An autoencoder on another machine moves them by a thousandth, and another picture moves all four by
less than this in about one case of 10^7."""
ENCODER_TOLERANCE = 0.1
"""Largest difference of the sketched embeddings of encoders in two dtypes, as a share of their
norm: bfloat16 moves them by one or two hundredths, and another encoder by about their norm."""


def weights_sha256(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A hash of named tensors: of each the name, dtype, shape and the sum of its bits as integers.

    A weight that has changed changes it, and so does another model. (Weights of one tensor that
    have changed places do not.) The sums are made where the tensors are.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(weights):
        words = tensor.detach().contiguous().view(-1).view(_WORDS[tensor.element_size()])
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {words.sum(dtype=torch.int64).item()}\n".encode())
    return digest.hexdigest()


def _alike(saved: dict, now: dict, rows: WeightReader) -> bool:
    """Whether saved embeddings are those of these rows, up to rounding; `now` are their own."""
    if saved["sketch"].keys() != now["sketch"].keys():
        return False
    other = saved.get("encoder", "float32") != now["encoder"]
    return matches(saved["sketch"], rows, ENCODER_TOLERANCE if other else TOLERANCE)


def latent_codes(latents: torch.Tensor) -> str:
    """Four numbers of each latent (N, ...), as the base64 of float16; of at most 65,536 latents.

    They are projections on fixed waves of unit length: about normal for latents that are, and
    little changed by rounding, as no hash is.
    """
    size, coded = latents[0].numel(), latents[:: -(-len(latents) // _CODED)]
    position = torch.arange(size, dtype=torch.float64)[:, None]
    waves = torch.cos(position * (torch.arange(_CODES) + 1.7)) * math.sqrt(2 / size)
    codes = torch.cat([chunk.flatten(1) @ waves.to(chunk.dtype) for chunk in coded.split(_CHUNK)])
    return base64.b64encode(codes.clamp(-6e4, 6e4).half().contiguous().numpy().tobytes()).decode()


def changed_latents(codes: str, others: str) -> int:
    """How many latents have other codes. Raises ValueError where their numbers are not the same."""
    one, other = (
        torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.float16).view(-1, _CODES).float()
        for text in (codes, others)
    )
    if one.shape != other.shape:
        raise ValueError(f"codes of {len(one)} and {len(other)} latents")
    same = (one - other).abs() <= _CODE_TOLERANCE * other.square().mean().sqrt()
    return int((~same).any(dim=1).sum())


def _rows(table: ConditioningTable) -> WeightReader:
    """Evenly chosen rows of a table as tensors (1, ...), for a sketch of their values."""
    share, length = max(1, _SKETCHED // len(table.rows)), table.prompts + 1
    count = min(share, length)
    chosen = table.fetch(torch.arange(count) * length // count)
    rows = {f"{name}.{i}": row[None] for name, tensor in chosen.items() for i, row in enumerate(tensor)}
    return WeightReader("inputs", {name: tuple(row.shape) for name, row in rows.items()}, rows.__getitem__)


class InputRecord:
    """The inputs of one run, and their comparison with those that a checkpoint records.

    Prompts and base are compared by hashes. Another machine computes latents and text embeddings
    with another rounding: those are compared up to that.
    """

    def __init__(
        self,
        inputs: MethodInputs,
        table: ConditioningTable,
        schedule: ScheduleFacts,
        weights: Iterable[tuple[str, torch.Tensor]],
        *,
        commit: str | None,
        encoder: torch.dtype,
    ) -> None:
        """Looks at everything once.

        inputs      N prompts, or N latents with their captions and fingerprint
        table       the text embeddings of the prompts
        schedule    prediction type and noise levels of the model
        weights     of the base's denoiser, by name
        commit      of the Hub that the base is from, if any
        encoder     the dtype in which the text encoders were loaded
        """
        prompts, latents = inputs.prompts, inputs.latents
        self.texts = "prompts" if latents is None else "captions"
        self._embeddings, self._schedule = _rows(table), schedule
        self.values = {
            self.texts: {"count": len(prompts), "sha256": texts_fingerprint(prompts)},
            "embeddings": {
                "sketch": fingerprint(self._embeddings),
                "encoder": str(encoder).removeprefix("torch."),
            },
            "schedule": schedule.record(),
            "base": {"sha256": weights_sha256(weights), "commit": commit},
        }
        if latents is not None:
            codes = latent_codes(latents)
            self.values["latents"] = {"count": len(latents), "sha256": inputs.latents_fingerprint, "codes": codes}

    def refuse_changed(self, saved: object, checkpoint: Path) -> None:
        """UserError that names the first input which is not what `saved` says.

        `saved` are the `values` that the checkpoint holds; None where it is older than this record.
        """
        if saved is None:
            say_once(
                f"{checkpoint} does not record its inputs: whether prompts, data and base are still the same is not "
                "looked at"
            )
            return
        try:
            for changed in (self._texts_change, self._latents_change, self._base_change, self._embeddings_change):
                if (text := changed(saved)) is not None:
                    raise UserError(
                        f"{text} since {checkpoint} was written; put back what was there, or start again in another "
                        "output folder"
                    )
        except UserError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{checkpoint}/state.json holds no record of inputs: {one_line(error)}") from error

    def _texts_change(self, saved: dict) -> str | None:
        """What has become of prompts or captions; None if nothing."""
        now, then = self.values[self.texts], saved.get(self.texts)
        if now == then:
            return None
        before = then["count"] if then else 0
        kind = "" if before != now["count"] else ", of which some are others or in another place"
        return f"{self.texts}: they have changed ({before} before, {now['count']} now{kind})"

    def _latents_change(self, saved: dict) -> str | None:
        """The same of the latents of real data."""
        now, then = self.values.get("latents"), saved.get("latents")
        if now is None or now["sha256"] == then["sha256"]:
            return None
        if now["count"] != then["count"]:
            return f"data.source: its pictures have changed ({then['count']} latents before, {now['count']} now)"
        if changed := changed_latents(then["codes"], now["codes"]):
            return f"data.source: {changed} of its {now['count']} pictures have changed"
        logger.warning(
            "the latents are those of the checkpoint but for their rounding: they were encoded again; the run goes on, "
            "but not in the same bits"
        )
        return None

    def _base_change(self, saved: dict) -> str | None:
        """The same of the denoiser's weights and of the noise levels."""
        now, then = self.values["base"], saved["base"]
        if now["sha256"] != then["sha256"]:
            commits = f" (commit {one_line(then['commit'], 40)} before, {now['commit']} now)" if then["commit"] else ""
            return f"model.path: the base's weights have changed{commits}"
        try:
            check_same_schedule(self._schedule, ScheduleFacts.of_record(saved["schedule"], "the checkpoint"))
        except UserError:
            return "model.path: the base's prediction type or noise levels have changed"
        return None

    def _embeddings_change(self, saved: dict) -> str | None:
        """The same of the text encoders, by what they make of the prompts."""
        if _alike(saved["embeddings"], self.values["embeddings"], self._embeddings):
            return None
        return "model.path: the base's text encoders have changed"

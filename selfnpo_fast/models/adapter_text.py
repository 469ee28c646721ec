"""What an adapter knows of text: the rows that a prompt has, and how they are encoded.

Shape letters: B samples, N prompts.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from selfnpo_fast.models import text
from selfnpo_fast.models.conditioning import Conditioning, Row, joined
from selfnpo_fast.models.family import Family
from selfnpo_fast.models.folder import ModelFolder
from selfnpo_fast.models.size import Size


class EncodesText:
    """The part of `base.Adapter` that is about text. Subclasses say what rows are."""

    family: Family
    path: str
    index: dict
    folder: ModelFolder
    denoiser_config: dict
    size: Size
    _variant: str | None
    _loaded: Any

    @property
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one prompt's row by name, as `encode_prompts` makes it; reads config files
        only."""
        raise NotImplementedError

    @property
    def text_tokens(self) -> Mapping[str, int]:
        """How many tokens of a prompt the pipeline takes, by the name of the tokenizer, where it is
        the pipeline that says so and not the text encoder."""
        return {}

    @property
    def conditioning_rows(self) -> dict[str, Row]:
        """What `encode_batch` makes of one prompt by name; reads config files only.

        By default rows of `conditioning_shapes` in the network's dtype. An adapter with ragged rows
        states them here, and its `conditioning_shapes` are `given_shapes` of them.
        """
        return {name: Row(shape=shape) for name, shape in self.conditioning_shapes.items()}

    @functools.cached_property
    def text_sha256(self) -> str:
        """A hash of all files that prompts are encoded with, and of the size of pictures, which
        rows may depend on; 64 hex digits. Reads the text encoders' files."""
        facts = [self.family.pipeline_class, self.index, self.denoiser_config, self.text_tokens, str(self.size)]
        return text.files_sha256(self.folder, self.family.part_classes, self._variant, facts)

    @contextlib.contextmanager
    def text_encoders(self, device: torch.device, dtype: torch.dtype | None = None) -> Iterator[text.TextEncoders]:
        """The text encoders in `dtype`, loaded for as long as the block runs.

        By default the dtype is `text.encoder_dtype` of a run in float32. The encoders of a pipeline
        that is loaded are taken as they are.
        """
        encoders = text.TextEncoders(
            self._text_pipeline(device, dtype or text.encoder_dtype(device, torch.float32)),
            self.family.part_classes,
            self.text_tokens,
            lambda pipe, prompts: self.encode_batch(pipe, prompts, device),
            self.unconditional,
            self.path,
        )
        try:
            yield encoders
        finally:
            encoders.close()
            if device.type == "cuda" and self._loaded is None:
                torch.cuda.empty_cache()  # what comes next has tensors of other sizes

    @torch.no_grad()
    def encode_prompts(
        self, prompts: list[str], device: torch.device, dtype: torch.dtype | None = None
    ) -> Conditioning:
        """Conditioning rows (N, ...) float32 of `prompts`; row order is kept. Loads and drops the
        text encoders, which are in `dtype` as `text_encoders` says.

        Ragged rows are padded to the largest length that there can be, and have their masks. A line
        names the prompts that are longer than the encoders' limits, and are cut there.
        """
        with self.text_encoders(device, dtype) as encoders:
            encoders.say_what_is_cut(prompts)
            return self._whole([rows for rows in encoders.stream(prompts, start=1)])

    @torch.no_grad()
    def encode_branches(
        self, prompts: list[str], device: torch.device, negative_prompts: list[str] | None = None
    ) -> tuple[Conditioning, Conditioning]:
        """`encode_prompts` of both branches: of the prompts, and of the negative prompts, by default
        the unconditional row (1, ...). The text encoders are loaded once."""
        with self.text_encoders(device) as encoders:
            encoders.say_what_is_cut([*prompts, *(negative_prompts or [])])
            rows = self._whole([*encoders.stream(prompts, start=1)])
            if negative_prompts is None:
                return rows, self._whole([encoders.batch([], 0)])
            return rows, self._whole([*encoders.stream(negative_prompts, start=1)])

    @torch.no_grad()
    def encode_empty(self, device: torch.device, dtype: torch.dtype | None = None) -> Conditioning:
        """The unconditional row (1, ...), as `encode_prompts` gives rows."""
        with self.text_encoders(device, dtype) as encoders:
            return self._whole([encoders.batch([], 0)])

    def _whole(self, batches: list[dict]) -> Conditioning:
        """Encoded batches as rows (N, ...); floating point numbers as float32."""
        ragged = any(isinstance(value, list) for value in batches[0].values())
        rows = joined(self.conditioning_rows if ragged else {}, batches, full=True)
        return {name: value.float() if value.is_floating_point() else value for name, value in rows.items()}

    def unconditional(self, row: dict) -> dict:
        """The unconditional row, given the text encoders' answer (1, ...) to the empty prompt."""
        return row

    def encode_batch(self, pipe: Any, prompts: list[str], device: torch.device) -> dict:
        """Conditioning rows of a few prompts, by the pipeline's own `encode_prompt`: a tensor
        (B, ...) by name, or a list of B tensors where rows are ragged."""
        raise NotImplementedError

    def _text_pipeline(self, device: torch.device, dtype: torch.dtype) -> Any:
        """The pipeline class with its text parts only: its own encode_prompt is the truth about
        prompts."""
        if self._loaded is not None:
            return self._loaded
        cls = self.family.load_class(self.family.pipeline_class)
        classes = {part: self.index[part][1] for part in self.family.part_classes}
        return text.text_pipeline(cls, classes, self.folder, self._variant, dtype, self.text_tokens).to(device)

"""The text parts of a pipeline: loading them, and what of a prompt an encoder never sees.

Text encoders and tokenizers are classes of transformers. Their names in a pipeline begin with
`TEXT_ENCODER` and `TOKENIZER`, and end alike where they belong together. Errors are ValueErrors
unless a function says otherwise.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from selfnpo_fast.models.folder import TEXT_SUFFIXES, TRANSFORMERS_WEIGHTS, ModelFolder, loading
from selfnpo_fast.models.parts import check_amount, check_config, check_loaded
from selfnpo_fast.runtime.console import say_once
from selfnpo_fast.runtime.errors import one_line, shortened
from selfnpo_fast.runtime.files import open_regular
from selfnpo_fast.runtime.limits import MAX_TOKENS
from selfnpo_fast.runtime.stopping import check_stop

TEXT_ENCODER, TOKENIZER = "text_encoder", "tokenizer"
UNKNOWN_LENGTH = 10**29
"""transformers writes 1e30 for a tokenizer that does not know how many tokens its encoder takes."""
SHOWN = 3
"""How many prompts a line names."""
BATCH = 64
"""Prompts that are encoded at once."""


def encoder_dtype(device: torch.device, precision: torch.dtype) -> torch.dtype:
    """The dtype in which text encoders are loaded: bfloat16 on a GPU, and on a CPU that of the
    run."""
    return torch.bfloat16 if device.type == "cuda" else precision


def text_pipeline(
    cls: Any,
    classes: Mapping[str, str],
    folder: ModelFolder,
    variant: str | None,
    dtype: torch.dtype,
    tokens: Mapping[str, int],
) -> Any:
    """A pipeline of class `cls` with its text parts only, whose own encode_prompt is the truth
    about prompts.

    `classes` names the class of each part, `tokens` how many tokens each tokenizer takes whose
    encoder has no limit of its own; encoders are in `dtype`. Raises UserError where a part cannot
    be loaded.
    """
    import transformers

    found: dict[str, Any] = {}
    for part, name in classes.items():
        with loading(folder.path, part.replace("_", " "), folder.field):
            if part.startswith(TEXT_ENCODER):
                found[part] = load_text_encoder(getattr(transformers, name), folder, part, variant, dtype)
            elif part.startswith(TOKENIZER):
                found[part] = load_tokenizer(getattr(transformers, name), folder, part)
    for part in [part for part in found if part.startswith(TOKENIZER)]:
        with loading(folder.path, part.replace("_", " "), folder.field):
            limit = tokens.get(part)
            if limit is None:
                positions = found[encoder_of(part)].config.max_position_embeddings
                limit = token_limit(found[part].model_max_length, positions, folder.path)
            found[part].model_max_length = limit
    # The other parts are left out.
    known = {name: value for name, value in inspect.signature(cls.__init__).parameters.items() if name != "self"}
    absent: dict[str, Any] = {name: None for name, value in known.items() if value.default is value.empty}
    if "requires_safety_checker" in known:
        absent["requires_safety_checker"] = False
    with loading(folder.path, "text encoder", folder.field):
        return cls(**(absent | found))


def encoder_of(tokenizer: str) -> str:
    """The name of the text encoder that a tokenizer belongs to."""
    return tokenizer.replace(TOKENIZER, TEXT_ENCODER)


def read_text_config(folder: ModelFolder, part: str, name: str) -> Any:
    """The config of the text encoder `part` of a model, of transformers' class `name`. Raises
    UserError where there is none."""
    import transformers

    config = folder.json(f"{part}/config.json")
    with loading(folder.path, f"{part}/config.json", folder.field):
        return text_config(getattr(transformers, name), config)


def text_config(cls: Any, config: dict[str, Any]) -> Any:
    """The config of a text encoder of transformers from its config.json.

    Only fields of the encoder's own architecture are taken: the others can name files, kernels and
    adapters to load.
    """
    from transformers import PreTrainedConfig

    kind = cls.config_class
    nested = config.get(kind.base_config_key)
    values = nested if isinstance(nested, dict) else config
    check_config(config)
    check_config(values)
    own = [base for base in kind.__mro__ if issubclass(base, PreTrainedConfig) and base is not PreTrainedConfig]
    known = {"use_attention_mask", *(name for base in own for name in base.__annotations__)}
    return kind(**{name: value for name, value in values.items() if name in known})


def load_text_encoder(cls: Any, folder: ModelFolder, part: str, variant: str | None, dtype: torch.dtype) -> nn.Module:
    """A text encoder of transformers in `dtype`, in evaluation mode."""
    from safetensors.torch import load_file

    config = text_config(cls, folder.json(f"{part}/config.json"))
    weights = folder.weights(part, TRANSFORMERS_WEIGHTS, variant)
    with torch.device("meta"):
        check_amount(cls(config), weights)
    tensors: dict[str, torch.Tensor] = {}
    for file in weights.files:
        tensors |= load_file(file)
    # Without a folder's name transformers reads no file of its own choice.
    encoder, info = cls.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=dtype,
        ignore_mismatched_sizes=True,  # they are named below
        local_files_only=True,
        output_loading_info=True,
    )
    check_loaded(encoder, info)
    return encoder.eval()


def load_tokenizer(cls: Any, folder: ModelFolder, part: str) -> Any:
    """A tokenizer of transformers, from its tokenizer.json, vocab.json and merges.txt, or T5's
    spiece.model."""
    path = folder.texts(part)
    own = {name.removeprefix(f"{part}/") for name in folder.files if name.startswith(f"{part}/")}
    if "tokenizer.json" not in own and "spiece.model" in own:
        if importlib.util.find_spec("sentencepiece") is None:  # transformers would go on with no words at all
            raise ValueError("its spiece.model needs the package sentencepiece to be read; pip install sentencepiece")
    elif "tokenizer.json" not in own and not {"vocab.json", "merges.txt"} <= own:
        raise ValueError("there is neither tokenizer.json nor vocab.json with merges.txt; give a whole pipeline")
    return cls.from_pretrained(str(path), local_files_only=True)


def token_limit(stated: Any, positions: int, where: str) -> int:
    """How many tokens of a prompt are taken, at most the encoder's `positions`.

    `stated` is a tokenizer's model_max_length. Where that is missing or transformers' number for
    unknown, the encoder's positions are taken, and a line that begins with `where` says so once.
    Raises ValueError for other values; two tokens are start and end.
    """
    if stated is None or (isinstance(stated, int | float) and stated >= UNKNOWN_LENGTH):
        say_once(f"{where}: the tokenizer names no model_max_length; the encoder's {positions} tokens are its limit")
        stated = positions
    most = min(positions, MAX_TOKENS)
    if isinstance(stated, bool) or not isinstance(stated, int) or not 2 <= stated <= most:
        raise ValueError(
            f"the tokenizer's model_max_length is {shortened(stated)}; expected 2 to {most}, the encoder's positions"
        )
    return stated


def check_tokenizers(pipe: Any, names: Iterable[str], tokens: Mapping[str, int]) -> None:
    """ValueError where a tokenizer among the attributes `names` of `pipe` would fill up prompts to
    more tokens than any encoder takes; transformers runs out of memory then, and ends the
    process.

    `tokens` has the limits of those that the pipeline itself limits.
    """
    for name in names:
        limit = tokens.get(name, getattr(pipe, name).model_max_length) if name.startswith(TOKENIZER) else 1
        if not 1 <= limit <= MAX_TOKENS:
            raise ValueError(
                f"its model_max_length is {shortened(limit)}; set {name}.model_max_length to the text encoder's "
                "max_position_embeddings"
            )


def what_is_cut(pipe: Any, names: Iterable[str], prompts: Sequence[str], own: Mapping[str, int]) -> str | None:
    """A line that says how many of the prompts are longer than a tokenizer's limit, and which; None
    where all fit.

    The tokenizers are those among the attributes `names` of `pipe`, and `own` has the limits of
    those that the pipeline itself limits. A pipeline cuts such prompts, and of what is cut nothing
    reaches the picture.
    """
    distinct = list(dict.fromkeys(prompts))
    limits, cut = set(), set()
    for name in names:
        if not name.startswith(TOKENIZER):
            continue
        tokenizer, texts = getattr(pipe, name), distinct
        limit = own.get(name, tokenizer.model_max_length)
        if hasattr(pipe, "maybe_convert_prompt"):  # words that stand for several tokens
            texts = pipe.maybe_convert_prompt(distinct, tokenizer)
        tokens = tokenizer(texts, verbose=False).input_ids
        longer = {i for i, ids in enumerate(tokens) if len(ids) > limit}
        if longer:
            limits.add(limit)
            cut |= longer
    if not cut:
        return None
    shown = ", ".join(repr(one_line(distinct[i], 40)) for i in sorted(cut)[:SHOWN])
    return (
        f"{len(cut)} of {len(distinct)} prompts are longer than the {min(limits)} tokens that the text encoder "
        f"takes; what lies beyond is cut: {shown}{', ...' if len(cut) > SHOWN else ''}"
    )


def files_sha256(folder: ModelFolder, parts: Iterable[str], variant: str | None, facts: object) -> str:
    """A hash of the files that the text parts among `parts` are loaded from, and of `facts`, which
    JSON can hold; 64 hex digits. Reads all of the files."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for part in sorted(parts):
        if part.startswith(TEXT_ENCODER):
            files = [folder.fetch(f"{part}/config.json"), *folder.weights(part, TRANSFORMERS_WEIGHTS, variant).files]
        elif part.startswith(TOKENIZER):
            names = (name for name in folder.files if name.startswith(f"{part}/") and name.endswith(TEXT_SUFFIXES))
            files = [folder.fetch(name) for name in names]
        else:
            continue
        for path in sorted(files):
            with open_regular(path, folder.field) as file:
                digest.update(f"{part}/{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


class TextEncoders:
    """The text parts of a pipeline while they are loaded.

    Batch 0 of some prompts is the unconditional row alone, and batch i + 1 has BATCH of them.
    """

    def __init__(
        self,
        pipe: Any,
        names: Iterable[str],
        tokens: Mapping[str, int],
        encode: Callable[[Any, list[str]], dict],
        unconditional: Callable[[dict], dict],
        where: str,
    ) -> None:
        """Encoders that are loaded.

        names            the pipeline's parts
        tokens           the limits of the tokenizers that the pipeline itself limits
        encode           gives the rows of a few prompts
        unconditional    makes the unconditional row of that of the empty prompt
        where            what messages call the model
        """
        self._pipe, self._names, self._where = pipe, tuple(names), where
        self._tokens, self._encode, self._unconditional = tokens, encode, unconditional
        with loading(where, "tokenizer"):
            check_tokenizers(pipe, self._names, tokens)

    def close(self) -> None:
        """Let go of the encoders, which cannot be used any more."""
        self._pipe = None

    def what_is_cut(self, prompts: Sequence[str]) -> str | None:
        """A line about the prompts that are longer than the encoders' limits; None where none is."""
        with loading(self._where, "tokenizer"):
            return what_is_cut(self._pipe, self._names, prompts, self._tokens)

    def say_what_is_cut(self, prompts: Sequence[str]) -> None:
        """Say that line once."""
        if line := self.what_is_cut(prompts):
            say_once(line)

    @torch.no_grad()
    def rows(self, prompts: list[str]) -> dict:
        """The rows of a few prompts, in the encoders' dtype and on their device: a tensor (B, ...)
        by name, or a list of B tensors where rows are ragged.

        Raises UserError where one is not finite.
        """
        with loading(self._where, "text encoder"):
            rows = self._encode(self._pipe, prompts)
            for value in rows.values():
                if not all(part.isfinite().all() for part in (value if isinstance(value, list) else [value])):
                    raise ValueError("the weights are damaged: a prompt's embedding is not finite")
            return rows

    @staticmethod
    def batches(prompts: Sequence[str]) -> int:
        """How many batches there are."""
        return 1 + -(-len(prompts) // BATCH)

    def batch(self, prompts: Sequence[str], number: int) -> dict:
        """Batch `number` of `prompts`, as `rows` gives it."""
        if number == 0:
            return self._unconditional(self.rows([""]))
        return self.rows(list(prompts[(number - 1) * BATCH : number * BATCH]))

    def stream(self, prompts: Sequence[str], start: int = 0) -> Iterator[dict]:
        """The batches of `prompts` from `start` on, one after the other."""
        for number in range(start, self.batches(prompts)):
            check_stop("while prompts were encoded; nothing is written, the same command starts again")
            yield self.batch(prompts, number)

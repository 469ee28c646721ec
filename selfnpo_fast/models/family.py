"""The facts about a model family.

Everything outside models/ and diffusion/ asks `Family` and `base.Adapter`, and names no family.
docs/adding_a_model.md lists the steps.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from selfnpo_fast.diffusion.levels import Levels
from selfnpo_fast.models.call_rules import CallRule, OneCall
from selfnpo_fast.models.parts import check_config


class SharedParts:
    """What a second network borrows from the denoiser while both run; the base borrows nothing."""

    def follow(self) -> None:
        """Called before each forward of the second network: take over what the denoiser carries
        now."""

    def restore(self) -> None:
        """Give back what was taken over."""


class Family:
    """The facts about one model family. Class attributes are the facts; methods have defaults that
    suit most families.

    An instance is registered in `selfnpo_fast.models` under its pipeline's class name.
    """

    adapter: type | None = None
    """The subclass of `base.Adapter` that loads and calls the family's parts; None for a family
    that a negative can be attached to, and nothing else."""
    pipeline_class: str
    """The class that model_index.json names."""
    denoiser_class: str
    """The class of the network that is trained and guided."""
    denoiser_name: str
    """The pipeline's attribute, the folder of its weights, and the prefix of its keys in LoRA
    files."""
    library: str = "diffusers"
    """The module that holds both classes."""
    part_classes: Mapping[str, tuple[str, ...]] = {}
    """The classes that other parts may be of, by the part's name: text encoders and tokenizers of
    transformers, whose names begin so, and other networks of diffusers. No other class is loaded.
    The scheduler may be any of diffusers."""
    experts: tuple[str, ...] = ()
    """The pipeline's attributes that hold further denoisers of the same class, each for some of the
    steps. Any of them may be None, and so may the first. Of a model that is trained there is at most
    one, for the times below `base.Adapter.boundary`."""
    guided_pipelines: tuple[str, ...] = ()
    """Pipeline classes that a negative can be attached to. Each has been read: it calls its
    denoisers as `call_rule` says."""
    call_rule: CallRule = OneCall()
    """Which rows or calls of `guided_pipelines` are negative."""
    flat_layers: tuple[str, ...] = ()
    """Layers, by the beginnings of their paths, whose input has no half for each branch: one row
    serves both, or rows are the tokens of prompts of different lengths."""
    first_method: str = "check_inputs"
    """The method of `guided_pipelines` that every call of theirs begins with. A pipeline without it
    is not told when its denoiser was replaced while a negative is attached."""
    repeated_blocks: tuple[str, ...] = ()
    """Classes of the blocks that a denoiser has many of: they are compiled one by one. diffusers'
    own list (`_repeated_blocks`) is added."""
    input_name: str = "hidden_states"
    """The denoiser's first argument, whose rows are samples."""
    time_name: str = "timestep"
    """The denoiser's argument that is the time, (B,)."""
    row_names: frozenset[str] = frozenset({"timestep", "encoder_hidden_states"})
    """The other arguments whose leading dimension counts samples, where it is not 1; a list's
    tensors have the list's name, and those of a dict are named `argument.entry`."""
    list_rows: frozenset[str] = frozenset()
    """Arguments that are lists with one entry for each sample."""
    not_rows: frozenset[str] = frozenset()
    """Arguments, named in the same way, whose leading dimension does not count samples. A tensor
    that is named in neither is refused next to full weights where it is as long as the batch."""
    time_dtype: torch.dtype = torch.int64
    """Of the times that the denoiser is given: int64 for the index of a noise level, float32 for
    what is no whole number."""
    draws_videos: bool = False
    """Whether a size has frames."""
    inert_options: frozenset[str] = frozenset()
    """Options of the denoiser's config that leave the function it computes unchanged."""
    lora_rate: float = 1e-4
    """The learning rate that is proposed together with a rank, and that the family's shipped `_lora`
    config has. Low-rank weights start from nothing: the rate of full weights leaves them there."""
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """The layers that are proposed together with a rank, and that the family's shipped `_lora`
    config has; names or their ends, as in `lora.targets`."""
    text_lora_prefixes: tuple[str, ...] = ("text_encoder.", "text_encoder_2.", "text_encoder_3.")
    """What keys of text encoders begin with in LoRA files."""

    def load_class(self, name: str) -> type:
        """A class of `library` by name. Raises AttributeError where there is none."""
        return getattr(importlib.import_module(self.library), name)

    def new_denoiser(self, config: dict) -> nn.Module:
        """The denoiser of a config with random weights.

        Raises ValueError for a config that asks for more than any network has, and any error for
        one that is wrong.
        """
        check_config(config)
        return self.load_class(self.denoiser_class).from_config(config)

    def levels(self, scheduler: Any, tokens: int | None = None) -> Levels:
        """The noise levels and the prediction that a scheduler instance stands for, and what the
        network is given as time; `tokens` is that of `base.Adapter.tokens`.

        A flow whose network is given sigma, or 1 - sigma, or predicts x_0 - eps, replaces `time` and
        `prediction` (dataclasses.replace).
        """
        return Levels.of(scheduler, tokens)

    @property
    def denoiser_names(self) -> tuple[str, ...]:
        """The pipeline's attributes that hold denoisers."""
        return (self.denoiser_name, *self.experts)

    def checkpoint_gradients(self, denoiser: nn.Module, function: Callable | None = None) -> None:
        """Recompute the blocks' activations in the backward pass, through `function` where one is
        given."""
        denoiser.enable_gradient_checkpointing(function)

    def why_unserved(self, config: dict) -> str | None:
        """Why a denoiser of this config can neither be trained nor sampled from; None where it can.

        Such a denoiser wants inputs that the adapter does not give, or has other outputs.
        """
        return None

    def why_unguided(self, config: dict) -> str | None:
        """Why a denoiser of this config has no negative branch; None where it has one."""
        return None

    def why_unsampled(self, config: dict) -> str | None:
        """Why `GuidedSampler` cannot serve a denoiser of this config; None where it can."""
        return None

    def shared_parts(self, denoiser: nn.Module, network: nn.Module) -> SharedParts:
        """What a second network has to borrow from the denoiser that it runs next to."""
        return SharedParts()

    def original_paths(self, paths: Iterable[str]) -> dict[str, str]:
        """The path that the original authors' code gives to each of the denoiser's modules, by the
        path here; `paths` are those of all modules.

        Checkpoints and LoRA files of other programs use these names. Modules without one are left
        out.
        """
        return {}

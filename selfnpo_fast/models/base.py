"""The socket for model families: `Family` holds the facts about one, `Adapter` loads and calls its
parts.

Everything outside models/ and diffusion/ asks these two and names no family. docs/adding_a_model.md
lists the steps.

Shape letters: B samples, N prompts.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from selfnpo_fast.diffusion.schedule import NoiseSchedule
from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.dtypes import network_dtype
from selfnpo_fast.runtime.errors import UserError, one_line

Conditioning = dict[str, torch.Tensor]
"""Named tensors with one row per prompt, as the denoiser's keyword arguments."""


Predict = Callable[[torch.Tensor, torch.Tensor, Conditioning], torch.Tensor]
"""(x (B, ...), t (B,), conditioning rows (B, ...)) -> raw network output (B, ...)."""


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

    adapter: type[Adapter]
    """Loads and calls the family's parts."""
    pipeline_class: str
    """The class that model_index.json names."""
    denoiser_class: str
    """The class of the network that is trained and guided."""
    denoiser_name: str
    """The pipeline's attribute, the folder of its weights, and the prefix of its keys in LoRA
    files."""
    library: str = "diffusers"
    """The module that holds both classes."""
    guided_pipelines: tuple[str, ...] = ()
    """Pipeline classes that a negative can be attached to. Each has been read: at every step it
    calls its denoiser once, with 2B rows of which the first B are negative where `is_guided` says
    so, and with unguided rows elsewhere."""
    first_method: str = "check_inputs"
    """The method of `guided_pipelines` that every call of theirs begins with. A pipeline without it
    is not told when its denoiser was replaced while a negative is attached."""
    repeated_blocks: tuple[str, ...] = ()
    """Classes of the blocks that a denoiser has many of: they are compiled one by one. diffusers'
    own list (`_repeated_blocks`) is added."""
    input_name: str = "hidden_states"
    """The denoiser's first argument, whose rows are samples."""
    row_names: frozenset[str] = frozenset({"timestep", "encoder_hidden_states"})
    """The other arguments whose leading dimension counts samples, where it is not 1; a list's
    tensors have the list's name, and those of a dict are named `argument.entry`."""
    not_rows: frozenset[str] = frozenset()
    """Arguments, named in the same way, whose leading dimension does not count samples. A tensor
    that is named in neither is refused next to full weights where it is as long as the batch."""
    inert_options: frozenset[str] = frozenset()
    """Options of the denoiser's config that leave the function it computes unchanged."""
    text_lora_prefixes: tuple[str, ...] = ("text_encoder.", "text_encoder_2.", "text_encoder_3.")
    """What keys of text encoders begin with in LoRA files."""

    def load_class(self, name: str) -> type:
        """A class of `library` by name. Raises AttributeError where there is none."""
        return getattr(importlib.import_module(self.library), name)

    def new_denoiser(self, config: dict) -> nn.Module:
        """The denoiser of a config with random weights."""
        return self.load_class(self.denoiser_class).from_config(config)

    def schedule(self, scheduler: Any) -> NoiseSchedule:
        """The noise levels and the prediction type that a scheduler instance stands for."""
        return NoiseSchedule.from_scheduler(scheduler)

    def is_guided(self, pipe: Any) -> bool:
        """Whether guidance is on for the step that a pipeline of `guided_pipelines` is
        computing."""
        return bool(pipe.do_classifier_free_guidance)

    def checkpoint_gradients(self, denoiser: nn.Module, function: Callable | None = None) -> None:
        """Recompute the blocks' activations in the backward pass, through `function` where one is
        given."""
        denoiser.enable_gradient_checkpointing(function)

    def why_unguided(self, config: dict) -> str | None:
        """Why a denoiser of this config has no negative branch; None where it has one."""
        return None

    def why_unsampled(self, config: dict) -> str | None:
        """Why `GuidedSampler` cannot serve a denoiser of this config; None where it can."""
        return None

    def shared_parts(self, denoiser: nn.Module, network: nn.Module) -> SharedParts:
        """What a second network has to borrow from the denoiser that it runs next to."""
        return SharedParts()

    def from_original_names(self, keys: list[str], config: dict) -> dict[str, str] | None:
        """The file's key of each of the denoiser's tensors in a checkpoint of the original authors'
        naming.

        None where the keys are not of such a checkpoint. Raises ValueError where they do not fit
        the config.
        """
        return None

    def from_foreign_lora(
        self, tensors: dict[str, torch.Tensor], denoiser: nn.Module
    ) -> tuple[dict[str, torch.Tensor], dict[str, float]] | None:
        """A LoRA in a naming of other programs as `<layer>.lora_A.weight` and `.lora_B.weight`, and
        alpha by layer.

        None where the keys are of no such naming. Raises ValueError where they do not fit the
        denoiser.
        """
        return None


class Adapter:
    """Loads the parts of a pipeline one by one and calls its denoiser.

    No pickled weights are read: every part comes from safetensors. Subclasses say what latents,
    text and pictures are.
    """

    family: Family

    def __init__(
        self,
        path: str,
        *,
        revision: str | None = None,
        variant: str | None = None,
        resolution: int | None = None,
    ) -> None:
        self.path = path
        self._hub = {"revision": revision, "variant": variant}
        self._resolution = resolution
        self._loaded: Any = None  # the pipeline whose parts these are, where there is one
        self.layout_copies = 0  # outputs that `predict` had to copy into row-major order

    @classmethod
    def from_pipeline(cls, pipe: Any) -> Adapter:
        """An adapter over the parts of a pipeline that is loaded: nothing is read, copied or
        moved."""
        adapter = cls(str(pipe.config.get("_name_or_path") or type(pipe).__name__))
        adapter._loaded = pipe
        adapter.denoiser_config = adapter.checked_config(dict(getattr(pipe, adapter.denoiser_name).config))
        adapter._scheduler = pipe.scheduler
        return adapter

    @property
    def denoiser_name(self) -> str:
        """The pipeline's attribute that holds the denoiser, and the folder of its weights."""
        return self.family.denoiser_name

    @property
    def _revision(self) -> str | None:
        return self._hub["revision"]

    # The denoiser

    @functools.cached_property
    def denoiser_config(self) -> dict:
        """The denoiser's config.json."""
        cls = self.family.load_class(self.family.denoiser_class)
        with loading(self.path, f"{self.denoiser_name}/config.json"):
            config = cls.load_config(self.path, subfolder=self.denoiser_name, revision=self._revision)
            return self.checked_config(config)

    def checked_config(self, config: dict) -> dict:
        """The denoiser's config with the types that this adapter relies on. Raises any error where
        they are others."""
        return config

    def new_denoiser(self, dtype: torch.dtype) -> nn.Module:
        """The denoising network with random weights in `dtype`, in evaluation mode; reads
        config.json only."""
        with loading(self.path, self.denoiser_name):
            return self.family.new_denoiser(self.denoiser_config).to(dtype).eval()

    def load_denoiser(self, dtype: torch.dtype, field: str = "model.path") -> nn.Module:
        """The denoising network with its weights in `dtype`, in evaluation mode; errors name
        `field`."""
        with loading(self.path, self.denoiser_name, field):
            refuse_pickles(self.path, self.denoiser_name)
            denoiser, info = self.family.load_class(self.family.denoiser_class).from_pretrained(
                self.path,
                subfolder=self.denoiser_name,
                torch_dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                **self._hub,
            )
            if info["missing_keys"]:  # diffusers only warns, and leaves those weights random
                raise ValueError(f"the weights lack {sorted(info['missing_keys'])[0]}")
            refuse_nan(denoiser)
        return denoiser.eval()

    def predict(self, denoiser: Callable, x: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        """The raw network output (B, ...) at states x (B, ...), timesteps t (B,) and conditioning
        rows (B, ...).

        Inputs are cast to the network's dtype; the output keeps it and is row-major, as the fused
        ops need it.
        """
        dtype = network_dtype(denoiser)
        cond = {name: rows.to(dtype) for name, rows in cond.items()}
        out = denoiser(x.to(dtype), t, **self.arguments(cond), return_dict=False)[0]
        return out if out.is_contiguous() else self._row_major(out)

    def arguments(self, cond: Conditioning) -> dict:
        """The denoiser's keyword arguments that conditioning rows stand for."""
        return cond

    def _row_major(self, out: torch.Tensor) -> torch.Tensor:
        """A channels_last network output made row-major: one copy, counted and said once."""
        if not self.layout_copies and not torch.compiler.is_compiling():
            logger.info("network outputs are made row-major: one copy of %s per forward", tuple(out.shape))
        self.layout_copies += 1
        return out.contiguous()

    # The schedule

    @functools.cached_property
    def scheduler_config(self) -> dict:
        """The scheduler's config, from which solvers for sampling are made."""
        return dict(self._scheduler.config)

    @functools.cached_property
    def _scheduler(self) -> Any:
        import diffusers

        with loading(self.path, "scheduler"):
            config = diffusers.DDIMScheduler.load_config(self.path, subfolder="scheduler", revision=self._revision)
            named = getattr(diffusers, str(config.get("_class_name")), None)
            if not (inspect.isclass(named) and issubclass(named, diffusers.SchedulerMixin)):
                raise UserError(f"model.path: {self.path} names an unknown scheduler: {config.get('_class_name')!r}")
            return named.from_config(config)

    @functools.cached_property
    def schedule(self) -> NoiseSchedule:
        """Noise levels and prediction type, read from the pipeline's scheduler instance.

        Raises UserError for options that make a solver step non-linear in the network's output.
        """
        for option in ("clip_sample", "thresholding"):
            if self.scheduler_config.get(option):
                raise UserError(
                    f"model.path: {self.path}: the scheduler's {option} is true, and a clipped step is not linear; set "
                    "it to false in scheduler/scheduler_config.json"
                )
        with loading(self.path, "scheduler"):
            schedule = self.family.schedule(self._scheduler)
            schedule.check()
            return schedule

    def check_steps(self, steps: int, field: str = "steps") -> None:
        """UserError that names `field` where the model has too few timesteps for `steps` solver
        steps."""
        most = self.schedule.num_train_timesteps
        if not 1 <= steps < most:
            expected = f"expected 1 to {most - 1} of the model's {most} timesteps"
            raise UserError(f"{field}: {steps} is not possible; {expected}")

    # Sizes

    @property
    def default_resolution(self) -> int:
        """Height and width in pixels of the pictures that the model was made for."""
        raise NotImplementedError

    @property
    def resolution(self) -> int:
        """Picture height and width in pixels."""
        return self.default_resolution if self._resolution is None else self._resolution

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of one latent, of any rank."""
        return self.latent_shape_of(self.resolution, self.resolution, "model.resolution")

    def latent_shape_of(self, height: int, width: int, field: str = "") -> tuple[int, ...]:
        """The shape of the latent of a picture of this size in pixels.

        Raises UserError for a size that the model cannot draw, naming `field`, or else the side.
        """
        raise NotImplementedError

    def check_size(self, field: str = "model.resolution") -> None:
        """UserError that names `field` where the resolution is none that the model can draw."""
        self.latent_shape_of(self.resolution, self.resolution, field)

    def sized(self, cond: Conditioning, height: int, width: int) -> Conditioning:
        """The rows for pictures of another size in pixels than the adapter's resolution."""
        return cond

    # Text

    @property
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one prompt's row by name, as `encode_prompts` makes it; reads config files
        only."""
        raise NotImplementedError

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str], device: torch.device, batch_size: int = 64) -> Conditioning:
        """Conditioning rows (N, ...) float32 of `prompts`; row order is kept. Loads and drops the
        text encoders."""
        pipe = self._text_pipeline(device)
        with loading(self.path, "text encoder"):
            parts = [
                self.encode_batch(pipe, prompts[i : i + batch_size], device) for i in range(0, len(prompts), batch_size)
            ]
            rows = {name: torch.cat([part[name] for part in parts]).float() for name in parts[0]}
            if not all(row.isfinite().all() for row in rows.values()):
                raise ValueError("the weights are damaged: a prompt's embedding is not finite")
            return rows

    def encode_empty(self, device: torch.device) -> Conditioning:
        """The unconditional row (1, ...): the text encoder's answer to the empty prompt."""
        return self.encode_prompts([""], device)

    def encode_batch(self, pipe: Any, prompts: list[str], device: torch.device) -> Conditioning:
        """Conditioning rows of a few prompts, by the pipeline's own `encode_prompt`."""
        raise NotImplementedError

    def _text_pipeline(self, device: torch.device) -> Any:
        """The pipeline class with its text parts only: its own encode_prompt is the truth about
        prompts."""
        if self._loaded is not None:
            return self._loaded
        cls = self.family.load_class(self.family.pipeline_class)
        known = inspect.signature(cls.__init__).parameters
        left_out = (self.denoiser_name, "vae", "safety_checker", "feature_extractor", "image_encoder")
        absent: dict[str, Any] = {name: None for name in left_out if name in known}
        if "requires_safety_checker" in known:
            absent["requires_safety_checker"] = False
        with loading(self.path, "text encoder"):
            refuse_pickles(self.path, "text_encoder*")
            return cls.from_pretrained(self.path, use_safetensors=True, **absent, **self._hub).to(device)

    # Pictures

    @property
    def vae_sha256(self) -> str:
        """A hash of the autoencoder's weights and config, 64 hex digits: equal ones give equal
        latents."""
        raise NotImplementedError

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, height, width) float32 in [-1, 1] from scaled latents (B, ...)."""
        raise NotImplementedError

    def encode(self, images: torch.Tensor, ids: torch.Tensor, seed: int) -> torch.Tensor:
        """Scaled latents (B, ...) float32 from pictures (B, 3, height, width) in [-1, 1], on their
        device.

        A latent's noise depends on the seed and its own id in ids (B,) int64 only.
        """
        raise NotImplementedError


# What every loader guards against.


@contextmanager
def loading(path: str, part: str, field: str = "model.path") -> Iterator[None]:
    """Turn what a loader throws over a broken file into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a truncated file surfaces as any of a dozen types; the cause is chained
        raise UserError(f"{field}: cannot load {part} from {path}: {one_line(error)}") from error


def refuse_pickles(path: str, part: str) -> None:
    """ValueError where a folder's list of shards names other files than safetensors, which loaders
    then unpickle."""
    for index in Path(path).glob(f"{part}/*.index*.json"):
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        if not all(str(name).endswith(".safetensors") for name in named):
            raise ValueError(f"{index.name} names files that are not safetensors")


def refuse_nan(module: nn.Module) -> None:
    """ValueError where a weight is not finite."""
    for name, parameter in module.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"the weights are damaged: {name} is not finite")

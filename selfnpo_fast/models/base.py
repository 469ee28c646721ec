"""`Adapter` loads the parts of a model and calls its denoiser; `family.Family` holds the facts.

Everything outside models/ and diffusion/ asks these two and names no family. docs/adding_a_model.md
lists the steps.

Shape letters: B samples, N prompts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from selfnpo_fast.models import parts
from selfnpo_fast.models.adapter_levels import HasLevels
from selfnpo_fast.models.adapter_size import HasSize
from selfnpo_fast.models.adapter_text import EncodesText
from selfnpo_fast.models.autoencoder import Pieces
from selfnpo_fast.models.conditioning import Conditioning
from selfnpo_fast.models.experts import NAMES, Experts, check_alike
from selfnpo_fast.models.family import Family
from selfnpo_fast.models.folder import DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS, ModelFolder, loading
from selfnpo_fast.models.size import AskedSize, Size
from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.dtypes import network_dtype
from selfnpo_fast.runtime.errors import UserError, shortened

Predict = Callable[[torch.Tensor, torch.Tensor, Conditioning], torch.Tensor]
"""(x (B, ...), t (B,), conditioning rows (B, ...)) -> raw network output (B, ...)."""


class Adapter(HasSize, HasLevels, EncodesText):
    """Loads the parts of a pipeline one by one and calls its denoiser.

    No pickled weights are read: every part comes from safetensors. Subclasses say what latents,
    text and pictures are.
    """

    family: Family

    def __init__(
        self,
        path: str,
        *,
        folder: ModelFolder | None = None,
        index: dict | None = None,
        variant: str | None = None,
        asked: AskedSize | None = None,
        expert: str | None = None,
        pieces: Pieces | None = None,
    ) -> None:
        """An adapter of the files in `folder`, whose model_index.json is `index`.

        path      names them in messages
        asked     the size to train on or to draw; by default the model's own
        expert    `model.expert` of the config
        pieces    how the autoencoder saves memory
        """
        self.path = path
        self.index = index or {}
        self._files = folder
        self._variant = variant
        self._asked, self._expert = asked or AskedSize(), expert
        self.pieces = pieces or Pieces()
        self._at_device: dict[tuple, Any] = {}  # what calls need besides rows, by device
        self._loaded: Any = None  # the pipeline whose parts these are, where there is one
        self.layout_copies = 0  # outputs that `predict` had to copy into row-major order

    @classmethod
    def from_pipeline(cls, pipe: Any) -> Adapter:
        """An adapter over the parts of a pipeline that is loaded: nothing is read, copied or moved.

        Raises UserError where a part is missing, and for a denoiser that is not served.
        """
        adapter = cls(str(pipe.config.get("_name_or_path") or type(pipe).__name__))
        adapter._loaded = pipe
        adapter.index = {name: value for name, value in pipe.config.items() if not name.startswith("_")}
        for part in (*adapter.denoiser_names, *adapter.family.part_classes):
            if getattr(pipe, part, None) is None:
                raise UserError(f"pipe: its {part} is None; load the pipeline with all of its parts")
        configs = {name: dict(getattr(pipe, name).config) for name in adapter.denoiser_names}
        check_alike(configs, "pipe")
        adapter.denoiser_config = adapter._served(configs[adapter.denoiser_name], "pipe: its")
        adapter._scheduler = pipe.scheduler
        return adapter

    @property
    def denoiser_name(self) -> str:
        """The pipeline's attribute that holds the denoiser, and the folder of its weights; of two
        denoisers that of high noise levels."""
        return self.family.denoiser_name

    @property
    def denoiser_names(self) -> tuple[str, ...]:
        """The attributes of all denoisers that the model has."""
        return (self.denoiser_name, *(name for name in self.family.experts if self._has(name)))

    @property
    def trained_denoisers(self) -> tuple[str, ...]:
        """Those of `denoiser_names` that `model.expert` says to train; all of them by default."""
        names = self.denoiser_names
        return names if self._expert not in NAMES or len(names) == 1 else (names[NAMES.index(self._expert)],)

    @property
    def boundary(self) -> float | None:
        """The time from which on the first of two denoisers predicts, and below which the second
        does; None of a model with one."""
        return None

    def _has(self, part: str) -> bool:
        """Whether model_index.json names a part."""
        entry = self.index.get(part)
        return isinstance(entry, list | tuple) and len(entry) == 2 and entry[1] is not None

    @property
    def folder(self) -> ModelFolder:
        """The files of the model. Raises UserError where the adapter has none."""
        if self._files is None:
            raise UserError(f"model.path: {self.path} is a pipeline that is loaded; its files are not known")
        return self._files

    def check(self, *, configs_only: bool = False) -> None:
        """UserError where a part of the model is missing, is not served or does not fit another.

        Reads config files, and what there is of others. With `configs_only` the scheduler, the
        tokenizers and all weights may be missing, and no picture can be made.
        """
        self._check_expert()
        with loading(self.path, "the model"):
            self.denoiser_config  # noqa: B018
            self.check_size()
            reason = self.why_unfit()
        if reason is not None:
            raise UserError(f"model.path: {self.path}: {reason}")
        self.check_forward()
        if self.pieces != Pieces():
            self.pieces.check(self.bare_autoencoder(), "model.")
        if configs_only:
            return
        self.schedule  # noqa: B018
        self.check_pictures()
        for name in self.denoiser_names:
            self.folder.check_weights(name, DIFFUSERS_WEIGHTS, self._variant)
        for part in self.family.part_classes:
            if part.startswith("tokenizer"):
                self.folder.texts(part)
            else:
                stem = TRANSFORMERS_WEIGHTS if part.startswith("text_encoder") else DIFFUSERS_WEIGHTS
                self.folder.check_weights(part, stem, self._variant)

    def _check_expert(self) -> None:
        """UserError for a `model.expert` that the model has not."""
        if self._expert is not None and len(self.denoiser_names) == 1:
            raise UserError(
                f"model.expert: {shortened(self._expert)} is not possible; {self.path} has one denoiser; leave it out"
            )
        if self._expert not in (None, "both", *NAMES):
            raise UserError(f"model.expert: {shortened(self._expert)} is not possible; expected high, low or both")

    def check_forward(self) -> None:
        """UserError where a forward of the denoiser fails in its shapes: one is tried without
        weights and without numbers."""
        shape, rows = self.latent_shape, self.conditioning_shapes

        def run(denoiser: nn.Module) -> torch.Tensor:
            x, t = torch.empty(2, *shape, device="meta"), torch.empty(2, device="meta")
            cond = {name: torch.empty(2, *row, device="meta") for name, row in rows.items()}
            return self._forward(denoiser, x, t, cond)

        with loading(self.path, self.denoiser_name):
            config = self.denoiser_config
            parts.try_forward(lambda: self.family.new_denoiser(config), run, (2, *shape), repr((config, rows)))

    def check_pictures(self) -> None:
        """UserError where `encode` and `decode` would fail in their shapes."""

    def why_unfit(self) -> str | None:
        """Why the parts of the model do not fit each other; None where they do. Reads config
        files."""
        return None

    def _served(self, config: dict, where: str) -> dict:
        """The denoiser's checked config. Raises UserError that begins with `where` for one that is
        not served."""
        family = self.family
        reason = family.why_unserved(config) or family.why_unsampled(config)
        unguided = family.why_unguided(config)
        if unguided is not None:
            reason = f"{unguided}: there is no negative branch"
        if reason is not None:
            raise UserError(f"{where} {self.denoiser_name} {reason}")
        return self.checked_config(config)

    # The denoiser

    @functools.cached_property
    def denoiser_config(self) -> dict:
        """The denoiser's config.json; that of both experts, but for notes of diffusers."""
        configs = {name: self._read_config(name) for name in self.denoiser_names}
        check_alike(configs, f"model.path: {self.path}")
        with loading(self.path, f"{self.denoiser_name}/config.json"):
            return self._served(configs[self.denoiser_name], f"model.path: {self.path}: its")

    def _read_config(self, name: str) -> dict:
        config = self.folder.json(f"{name}/config.json")
        with loading(self.path, f"{name}/config.json"):
            cls = self.family.load_class(self.family.denoiser_class)
            return parts.full_config(cls, config, (self.family.denoiser_class,))

    def checked_config(self, config: dict) -> dict:
        """The denoiser's config with the types that this adapter relies on. Raises any error where
        they are others."""
        return config

    def new_denoiser(self, dtype: torch.dtype) -> nn.Module:
        """The denoising network with random weights in `dtype`, in evaluation mode; reads
        config.json only. Two denoisers are one network, `Experts`."""

        def new(name: str) -> nn.Module:
            with loading(self.path, name):
                return self.family.new_denoiser(self.denoiser_config).to(dtype).eval()

        return self._as_one({name: new(name) for name in self.denoiser_names})

    def load_denoiser(self, dtype: torch.dtype, field: str = "model.path") -> nn.Module:
        """The denoising network with its weights in `dtype`, in evaluation mode; errors name
        `field`. Two denoisers are one network, `Experts`."""

        def load(name: str) -> nn.Module:
            with loading(self.path, name, field):
                cls = self.family.load_class(self.family.denoiser_class)
                return parts.load_network(cls, self.folder, name, self._variant, dtype)

        return self._as_one({name: load(name) for name in self.denoiser_names})

    def denoiser_of(self, pipe: Any) -> nn.Module:
        """The denoising network of a pipeline that is loaded, without torch.compile's wrapper; two
        denoisers as one, `Experts`, of which nothing is copied."""
        networks = {name: getattr(pipe, name) for name in self.denoiser_names}
        return self._as_one({name: getattr(each, "_orig_mod", each) for name, each in networks.items()})

    def _as_one(self, networks: dict[str, nn.Module]) -> nn.Module:
        """One network as it is, two as `Experts`."""
        if len(networks) == 1:
            return networks[self.denoiser_name]
        assert self.boundary is not None, "where there are two denoisers, there is a boundary"
        return Experts(networks, self.boundary, self.family).eval()

    def predict_level(self, denoiser: Callable, x: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        """`predict` at noise levels t (B,) int64 of `schedule`, in the adapter's size."""
        return self.predict(denoiser, x, self.time_of(t), cond)

    def predict(
        self, denoiser: Callable, x: torch.Tensor, t: torch.Tensor, cond: Conditioning, size: Size | None = None
    ) -> torch.Tensor:
        """The raw network output (B, ...) at states x (B, ...), times t (B,) as the network is given
        them, and conditioning rows (B, ...); `size` is that of the states, by default the adapter's.

        States and rows are cast to the network's dtype; the output keeps it and is row-major, as the
        fused ops need it.
        """
        dtype = network_dtype(denoiser)
        cond = {name: rows.to(dtype) if rows.is_floating_point() else rows for name, rows in cond.items()}
        out = self._forward(denoiser, x.to(dtype), t, cond, size)
        return out if out.is_contiguous() else self._row_major(out)

    def _forward(
        self, denoiser: Callable, x: torch.Tensor, t: torch.Tensor, cond: Conditioning, size: Size | None = None
    ) -> torch.Tensor:
        """The denoiser's prediction (B, ...) for inputs in its dtype."""
        positional, named = self.call(x, t, cond, self._fixed(x, size))
        return self.output(denoiser(*positional, **named, return_dict=False))

    def call(self, x: torch.Tensor, t: torch.Tensor, cond: Conditioning, fixed: dict) -> tuple[tuple, dict]:
        """The denoiser's positional and keyword arguments at states x (B, ...), times t (B,) and
        conditioning rows (B, ...), all in its dtype; `fixed` is from `fixed_arguments`.

        A guidance embedding, the same number for every sample, is added here.
        """
        return (x, t), {**self.arguments(cond), **fixed}

    def arguments(self, cond: Conditioning) -> dict:
        """The denoiser's keyword arguments that conditioning rows stand for."""
        return cond

    def fixed_arguments(self, size: Size, device: torch.device, dtype: torch.dtype) -> dict:
        """The denoiser's keyword arguments that depend on nothing but the size, such as rotary
        embeddings and the positions of tokens. They do not count samples, and are made once."""
        return {}

    def output(self, out: tuple) -> torch.Tensor:
        """The prediction (B, ...) in what the denoiser returns, without a learned variance."""
        return out[0]

    def _fixed(self, x: torch.Tensor, size: Size | None) -> dict:
        """`fixed_arguments` for states x, kept by size, device and dtype; of tensors without numbers
        nothing is kept."""
        if type(self).fixed_arguments is Adapter.fixed_arguments:
            return {}
        size = size or self.size
        if x.is_meta or isinstance(x, FakeTensor):
            return self.fixed_arguments(size, x.device, x.dtype)
        key = ("fixed", size, x.device, x.dtype)
        if key not in self._at_device:
            self._at_device[key] = self.fixed_arguments(size, x.device, x.dtype)
        return self._at_device[key]

    def _row_major(self, out: torch.Tensor) -> torch.Tensor:
        """A channels_last network output made row-major: one copy, counted and said once.

        A count in compiled code would be a reason to compile it again at every call.
        """
        if not torch.compiler.is_compiling():
            if not self.layout_copies:
                logger.info("network outputs are made row-major: one copy of %s per forward", tuple(out.shape))
            self.layout_copies += 1
        return out.contiguous()

    # Pictures

    @property
    def vae_sha256(self) -> str:
        """A hash of the autoencoder's weights and config, 64 hex digits: equal ones give equal
        latents."""
        raise NotImplementedError

    def bare_autoencoder(self) -> nn.Module | None:
        """The autoencoder without weights, on the meta device, for questions about it; None where
        there is none that works in pieces."""
        return None

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, height, width) float32 in [-1, 1] from scaled latents (B, ...); of a model
        of videos, clips (B, F, 3, height, width)."""
        raise NotImplementedError

    def encode(self, images: torch.Tensor, ids: torch.Tensor, seed: int) -> torch.Tensor:
        """Scaled latents (B, ...) float32 from pictures (B, 3, height, width) in [-1, 1], on their
        device.

        A latent's noise depends on the seed and its own id in ids (B,) int64 only.
        """
        raise NotImplementedError

    def drop_autoencoder(self) -> None:
        """Forget an autoencoder that was loaded, so that other parts have its memory; it is loaded
        again where it is needed. A loaded pipeline's stays."""
        if self._loaded is None:
            self.__dict__.pop("vae", None)

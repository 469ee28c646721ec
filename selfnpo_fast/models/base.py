"""`Adapter` loads the parts of a model and calls its denoiser; `family.Family` holds the facts.

Everything outside models/ and diffusion/ asks these two and names no family. docs/adding_a_model.md
lists the steps.

Shape letters: B samples, N prompts.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from selfnpo_fast.diffusion.flow_levels import shift_mu
from selfnpo_fast.diffusion.levels import Levels
from selfnpo_fast.models import parts, text
from selfnpo_fast.models.autoencoder import Pieces
from selfnpo_fast.models.conditioning import Row, joined
from selfnpo_fast.models.experts import NAMES, Experts, check_alike
from selfnpo_fast.models.family import Family
from selfnpo_fast.models.folder import DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS, ModelFolder, loading
from selfnpo_fast.models.size import AskedSize, Size
from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.dtypes import network_dtype
from selfnpo_fast.runtime.errors import UserError, shortened

Conditioning = dict[str, torch.Tensor]
"""Named tensors with one row per prompt, as the denoiser's keyword arguments."""


Predict = Callable[[torch.Tensor, torch.Tensor, Conditioning], torch.Tensor]
"""(x (B, ...), t (B,), conditioning rows (B, ...)) -> raw network output (B, ...)."""


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

    def expert(self, t: torch.Tensor) -> torch.Tensor:
        """Which of `denoiser_names` owns each noise level, by its place there: int64 like the levels
        t, which are of any shape."""
        if self.boundary is None:
            return torch.zeros_like(t)
        return (self.time_of(t) < self.boundary).long()

    @property
    def trained_levels(self) -> range:
        """The noise levels of the denoisers that are trained. Raises UserError where there is none."""
        levels = torch.arange(self.schedule.num_train_timesteps)
        owners = [self.denoiser_names.index(name) for name in self.trained_denoisers]
        own = levels[torch.isin(self.expert(levels), torch.tensor(owners))]
        if not len(own):
            raise UserError(
                f"model.expert: {self._expert} has no noise level: the boundary of {self.path} is {self.boundary:g} of "
                f"{len(levels)} timesteps"
            )
        return range(int(own[0]), int(own[-1]) + 1)

    def _row_major(self, out: torch.Tensor) -> torch.Tensor:
        """A channels_last network output made row-major: one copy, counted and said once.

        A count in compiled code would be a reason to compile it again at every call.
        """
        if not torch.compiler.is_compiling():
            if not self.layout_copies:
                logger.info("network outputs are made row-major: one copy of %s per forward", tuple(out.shape))
            self.layout_copies += 1
        return out.contiguous()

    # The schedule

    @property
    def scheduler(self) -> Any:
        """The model's diffusers scheduler, as it is configured; callers do not change it."""
        return self._scheduler

    @functools.cached_property
    def scheduler_config(self) -> dict:
        """The scheduler's config, from which solvers for sampling are made."""
        return dict(self._scheduler.config)

    @functools.cached_property
    def _scheduler(self) -> Any:
        config = self.folder.json("scheduler/scheduler_config.json")
        entry = self.index.get("scheduler")
        # The class that the index names goes before that of the config, as in diffusers.
        name = entry[1] if isinstance(entry, list) and len(entry) == 2 else config.get("_class_name")
        # On the CPU also where networks are being made on another device.
        with loading(self.path, "scheduler"), torch.device("cpu"):
            return parts.load_scheduler(name, config)

    @functools.cached_property
    def schedule(self) -> Levels:
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
            schedule = self.family.levels(self._scheduler, self.tokens())
            schedule.check()
            return schedule

    def time_of(self, t: torch.Tensor) -> torch.Tensor:
        """What the network is given as time at noise levels t int64, in `family.time_dtype`."""
        key = ("time", t.device)
        if key not in self._at_device:
            time = self.schedule.time
            whole = self.family.time_dtype == torch.int64
            same = whole and torch.equal(time, torch.arange(len(time), dtype=time.dtype))
            self._at_device[key] = None if same else time.to(self.family.time_dtype).to(t.device)
        table = self._at_device[key]
        return t if table is None else table[t]

    def tokens(self, size: Size | None = None) -> int | None:
        """The number of tokens of a latent in the denoiser, where noise levels depend on it
        (dynamic shifting); `size` is by default the adapter's."""
        return None

    def check_steps(self, steps: int, field: str = "steps") -> None:
        """UserError that names `field` where the model has too few timesteps for `steps` solver
        steps."""
        most = self.schedule.num_train_timesteps
        if not 1 <= steps < most:
            expected = f"expected 1 to {most - 1} of the model's {most} timesteps"
            raise UserError(f"{field}: {steps} is not possible; {expected}")

    def set_timesteps(self, scheduler: Any, steps: int, size: Size) -> None:
        """Choose the timesteps of `steps` solver steps, for pictures or videos of a size, as the
        family's pipelines do.

        A scheduler whose shift depends on the size (dynamic shifting) is given its mu, by `tokens`.
        """
        if scheduler.config.get("use_dynamic_shifting"):
            scheduler.set_timesteps(steps, mu=shift_mu(scheduler.config, self.tokens(size)))
        else:
            scheduler.set_timesteps(steps)

    # Sizes

    @property
    def default_size(self) -> Size:
        """The size of the pictures or videos that the model was made for."""
        raise NotImplementedError

    @property
    def size(self) -> Size:
        """The size of what is trained on or drawn. Raises UserError where the model names none, and
        a side is not given."""
        return self._filled(self._asked, lambda: self.default_size)

    def size_of(self, asked: AskedSize) -> Size:
        """The size of a call, the adapter's where nothing is asked for."""
        return self._filled(asked, lambda: self.size)

    def _filled(self, asked: AskedSize, default: Callable[[], Size]) -> Size:
        """What is asked for, and the rest by `default`, which is called where it is needed."""
        known = asked.has_sides and not (asked.frames is None and self.family.draws_videos)
        return asked.of(Size(0, 0) if known else default())

    @property
    def resolution(self) -> int:
        """Height and width in pixels of square pictures. Raises UserError where they differ."""
        size = self.size
        if size.height != size.width:
            raise UserError(
                f"model.resolution: {self.path} draws pictures of {size.height} x {size.width} pixels, and square "
                "ones are needed here; give a resolution"
            )
        return size.height

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of one latent, of any rank."""
        return self.latent_shape_of(self.size, self._size_field)

    @property
    def _size_field(self) -> str:
        """What errors about the size name, as in `latent_shape_of`."""
        return "model.resolution" if self._asked.height is None else "model."

    def latent_shape_of(self, size: Size, field: str = "") -> tuple[int, ...]:
        """The shape of the latent of a picture or video of this size.

        Raises UserError for a size that the model cannot draw, naming `side_field(field, side)`:
        the field, or with a section ("model.") or nothing the side in it.
        """
        raise NotImplementedError

    def check_size(self) -> None:
        """UserError that names the field where the size is none that the model can draw."""
        self.latent_shape_of(self.size, self._size_field)

    def smaller_sizes(self, size: Size) -> list[Size]:
        """Sizes that doctor proposes where a run needs too much memory; none of pictures, which a
        model draws badly at other sizes than its own."""
        return []

    def sized(self, cond: Conditioning, size: Size) -> Conditioning:
        """The rows for another size than the adapter's."""
        return cond

    # Text

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

    def drop_autoencoder(self) -> None:
        """Forget an autoencoder that was loaded, so that other parts have its memory; it is loaded
        again where it is needed. A loaded pipeline's stays."""
        if self._loaded is None:
            self.__dict__.pop("vae", None)

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

"""Stable Diffusion 1.x / 2.x, and the base of its relatives: what a denoiser needs, nothing else.

Shape letters: B samples, N prompts, L tokens, D embedding width, C H W latent channels, height and width.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from selfnpo_fast.diffusion.schedule import NoiseSchedule
from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.errors import UserError, one_line
from selfnpo_kernels import Draw, NoiseKey, draw_id, normal

MAX_RESOLUTION = 2**14  # pixels
Conditioning = dict[str, torch.Tensor]
"""Named tensors with one row per prompt, as the denoiser's keyword arguments."""


@contextmanager
def _loading(path: str, part: str, field: str = "model.path"):
    """Turn what a loader throws over a broken file into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a truncated file surfaces as any of a dozen types; the cause is chained
        raise UserError(f"{field}: cannot load {part} from {path}: {one_line(error)}") from error


def _refuse_pickles(path: str, part: str) -> None:
    """A folder's list of shards may name other files than safetensors, which loaders then unpickle."""
    for index in Path(path).glob(f"{part}/*.index*.json"):
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        if not all(str(name).endswith(".safetensors") for name in named):
            raise ValueError(f"{index.name} names files that are not safetensors")


def _refuse_nan(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"the weights are damaged: {name} is not finite")


class StableDiffusionAdapter:
    """Loads the parts of a pipeline one by one and calls its denoiser.

    No pickled weights are read: every part comes from safetensors.
    """

    pipeline_class = "StableDiffusionPipeline"
    denoiser_name = "unet"

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
        self._loaded = None  # the pipeline whose parts these are, where there is one
        self.layout_copies = 0  # outputs that `predict` had to copy into row-major order

    @classmethod
    def from_pipeline(cls, pipe) -> StableDiffusionAdapter:
        """An adapter over the parts of a pipeline that is loaded: nothing is read, copied or moved."""
        adapter = cls(str(pipe.config.get("_name_or_path") or type(pipe).__name__))
        adapter._loaded = pipe
        unet, vae = pipe.unet.config, pipe.vae.config
        adapter.denoiser_config = dict(unet) | {"sample_size": int(unet.sample_size)}
        adapter._scheduler, adapter.vae = pipe.scheduler, pipe.vae
        adapter._vae_config = {"block_out_channels": list(vae.block_out_channels)}
        return adapter

    @functools.cached_property
    def denoiser_config(self) -> dict:
        """The denoiser's config.json."""
        from diffusers import UNet2DConditionModel

        with _loading(self.path, f"{self.denoiser_name}/config.json"):
            config = UNet2DConditionModel.load_config(self.path, subfolder=self.denoiser_name, revision=self._revision)
            return config | {"sample_size": int(config["sample_size"]), "in_channels": int(config["in_channels"])}

    @property
    def _revision(self) -> str | None:
        return self._hub["revision"]

    @functools.cached_property
    def scheduler_config(self) -> dict:
        """The scheduler's config, from which solvers for sampling are made."""
        return dict(self._scheduler.config)

    @functools.cached_property
    def _scheduler(self):
        import diffusers

        with _loading(self.path, "scheduler"):
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
        with _loading(self.path, "scheduler"):
            schedule = NoiseSchedule.from_scheduler(self._scheduler)
            levels = schedule.alphas_cumprod
            if not ((levels >= 0) & (levels <= 1)).all():  # also where one is not a number
                raise ValueError("its betas give an alphas_cumprod outside of 0 to 1")
            return schedule

    @functools.cached_property
    def vae_scale(self) -> int:
        """Pixels per latent cell along one axis."""
        return 2 ** (len(self._vae_config["block_out_channels"]) - 1)

    @functools.cached_property
    def _vae_config(self) -> dict:
        from diffusers import AutoencoderKL

        with _loading(self.path, "vae/config.json"):
            config = AutoencoderKL.load_config(self.path, subfolder="vae", revision=self._revision)
            return {"block_out_channels": list(config["block_out_channels"])}

    @property
    def resolution(self) -> int:
        """Picture height and width in pixels."""
        if self._resolution is not None:
            return self._resolution
        return self.denoiser_config["sample_size"] * self.vae_scale

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent."""
        return self.latent_shape_of(self.resolution, self.resolution, "model.resolution")

    def latent_shape_of(self, height: int, width: int, field: str = "") -> tuple[int, int, int]:
        """(C, H, W) of the latent of a picture in pixels; errors name `field`, or else the side."""
        for side, pixels in (("height", height), ("width", width)):
            if pixels % self.vae_scale or not 1 <= pixels <= MAX_RESOLUTION:
                raise UserError(
                    f"{field or side}: {pixels} is no multiple of {self.vae_scale} from {self.vae_scale} to "
                    f"{MAX_RESOLUTION}"
                )
        return (self.denoiser_config["in_channels"], height // self.vae_scale, width // self.vae_scale)

    def check_size(self, field: str = "model.resolution") -> None:
        """UserError that names `field` where the resolution is none that the model can draw."""
        self.latent_shape_of(self.resolution, self.resolution, field)

    @staticmethod
    def sized(cond: Conditioning, height: int, width: int) -> Conditioning:
        """The rows for pictures of another size in pixels than the adapter's own."""
        return cond

    def new_denoiser(self, dtype: torch.dtype) -> nn.Module:
        """The denoising network with random weights in `dtype`, in evaluation mode; reads config.json alone."""
        from diffusers import UNet2DConditionModel

        with _loading(self.path, self.denoiser_name):
            return UNet2DConditionModel.from_config(self.denoiser_config).to(dtype).eval()

    @property
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one prompt's row by name, as `encode_prompts` makes it, read from the encoder's config.json."""
        text = self._text_config("text_encoder")
        return {"encoder_hidden_states": (text.max_position_embeddings, text.hidden_size)}

    def _text_config(self, part: str):
        from transformers import CLIPTextConfig

        with _loading(self.path, f"{part}/config.json"):
            return CLIPTextConfig.from_pretrained(self.path, subfolder=part, revision=self._revision)

    def load_denoiser(self, dtype: torch.dtype, field: str = "model.path") -> nn.Module:
        """The denoising network with its weights in `dtype`, in evaluation mode; errors name `field`."""
        from diffusers import UNet2DConditionModel

        with _loading(self.path, self.denoiser_name, field):
            _refuse_pickles(self.path, self.denoiser_name)
            denoiser, info = UNet2DConditionModel.from_pretrained(
                self.path,
                subfolder=self.denoiser_name,
                torch_dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                **self._hub,
            )
            if info["missing_keys"]:  # diffusers only warns, and leaves those weights random
                raise ValueError(f"the weights lack {sorted(info['missing_keys'])[0]}")
            _refuse_nan(denoiser)
        return denoiser.eval()

    @functools.cached_property
    def vae(self) -> nn.Module:
        """The autoencoder, float32."""
        from diffusers import AutoencoderKL

        with _loading(self.path, "vae"):
            _refuse_pickles(self.path, "vae")
            vae = AutoencoderKL.from_pretrained(self.path, subfolder="vae", use_safetensors=True, **self._hub)
            _refuse_nan(vae)
        return vae.eval().requires_grad_(False)

    @functools.cached_property
    def vae_sha256(self) -> str:
        """A hash of the autoencoder's weights and config, 64 hex digits: equal ones give equal latents."""
        config = {key: value for key, value in self.vae.config.items() if not key.startswith("_")}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for name, value in self.vae.state_dict().items():
            digest.update(name.encode())
            digest.update(value.cpu().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def _text_pipeline(self, device: torch.device):
        """The pipeline class with its text parts alone: its own encode_prompt is the truth about prompts."""
        import diffusers

        if self._loaded is not None:
            return self._loaded
        cls = getattr(diffusers, self.pipeline_class)
        optional = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
        known = inspect.signature(cls.__init__).parameters
        absent = {name: None for name in ("unet", "vae", *optional) if name in known}
        if "requires_safety_checker" in known:
            absent["requires_safety_checker"] = False
        with _loading(self.path, "text encoder"):
            _refuse_pickles(self.path, "text_encoder*")
            return cls.from_pretrained(self.path, use_safetensors=True, **absent, **self._hub).to(device)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str], device: torch.device, batch_size: int = 64) -> Conditioning:
        """Conditioning rows (N, ...) float32 of `prompts`; row order is kept. Loads and drops the text encoders."""
        pipe = self._text_pipeline(device)
        with _loading(self.path, "text encoder"):
            parts = [
                self._encode(pipe, prompts[i : i + batch_size], device) for i in range(0, len(prompts), batch_size)
            ]
            rows = {name: torch.cat([part[name] for part in parts]).float() for name in parts[0]}
            if not all(row.isfinite().all() for row in rows.values()):
                raise ValueError("the weights are damaged: a prompt's embedding is not finite")
            return rows

    def encode_empty(self, device: torch.device) -> Conditioning:
        """The unconditional row (1, ...): the text encoder's answer to the empty prompt."""
        return self.encode_prompts([""], device)

    def _encode(self, pipe, prompts: list[str], device: torch.device) -> Conditioning:
        embeds, _ = pipe.encode_prompt(prompts, device, 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeds}

    def predict(self, denoiser: nn.Module, x: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        """The raw network output (B, C, H, W) at states x (B, C, H, W), timesteps t (B,) and conditioning (B, ...).

        Inputs are cast to the network's dtype; the output keeps it and is row-major, as the fused ops need it.
        """
        dtype = next(denoiser.parameters()).dtype
        cond = {name: rows.to(dtype) for name, rows in cond.items()}
        out = denoiser(x.to(dtype), t, **self._arguments(cond), return_dict=False)[0]
        return out if out.is_contiguous() else self._row_major(out)

    def _row_major(self, out: torch.Tensor) -> torch.Tensor:
        """A channels_last network output made row-major: one copy, counted and said once."""
        if not self.layout_copies and not torch.compiler.is_compiling():
            logger.info("network outputs are made row-major: one copy of %s per forward", tuple(out.shape))
        self.layout_copies += 1
        return out.contiguous()

    @staticmethod
    def _arguments(cond: Conditioning) -> dict:
        return cond

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, height, width) float32 in [-1, 1] from scaled latents (B, C, H, W).

        About a million pixels at a time: four pictures of 512x512, one of 1024x1024.
        """
        pixels = latents[0, 0].numel() * self.vae_scale**2
        batch_size = max(1, 2**20 // pixels)
        vae = self.vae.to(latents.device)
        upcast = vae.dtype == torch.float16 and vae.config.force_upcast  # SDXL's overflows in float16
        if upcast:
            vae.to(torch.float32)
        scaled = latents.float() / vae.config.scaling_factor + (vae.config.shift_factor or 0)
        pictures = [vae.decode(part.to(vae.dtype)).sample.float().clamp(-1, 1) for part in scaled.split(batch_size)]
        if upcast:
            vae.to(torch.float16)
        return torch.cat(pictures)

    @torch.no_grad()
    def encode(self, images: torch.Tensor, ids: torch.Tensor, seed: int) -> torch.Tensor:
        """Scaled latents (B, C, H, W) float32 from pictures (B, 3, height, width) in [-1, 1], on their device.

        Sampled from the autoencoder's posterior: a picture's noise depends on the seed and its own id in ids (B,)
        int64 alone, so that batches may be cut in any way. About a million pixels at a time, as in `decode`.
        """
        vae = self.vae.to(images.device)
        size = max(1, 2**20 // images[0, 0].numel())
        latents = []
        for part, key_ids in zip(images.float().split(size), ids.split(size), strict=True):
            posterior = vae.encode(part).latent_dist
            noise = normal(NoiseKey(seed, key_ids, draw_id(Draw.POSTERIOR)), posterior.mean.shape[1:])
            # The posterior has a deviation for each element, which no fused op knows: each picture meets this once.
            sample = torch.addcmul(posterior.mean, posterior.std, noise)
            latents.append((sample - (vae.config.shift_factor or 0)) * vae.config.scaling_factor)
        return torch.cat(latents)

"""Stable Diffusion 3 and 3.5: facts for attaching a negative."""

from __future__ import annotations

from selfnpo_fast.models.call_rules import OneCall
from selfnpo_fast.models.family import Family


class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5."""

    pipeline_class = "StableDiffusion3Pipeline"
    denoiser_class = "SD3Transformer2DModel"
    denoiser_name = "transformer"
    guided_pipelines = (
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
        "StableDiffusion3ControlNetPipeline",
    )
    call_rule = OneCall(positive_argument="skip_layers")  # skip-layer guidance
    row_names = frozenset(
        {
            *("timestep", "encoder_hidden_states", "pooled_projections", "block_controlnet_hidden_states"),
            *("joint_attention_kwargs.ip_adapter_image_embeds", "joint_attention_kwargs.ip_hidden_states"),
            "joint_attention_kwargs.temb",
        }
    )

"""Qwen-Image: facts for attaching a negative."""

from __future__ import annotations

from selfnpo_fast.models.call_rules import TwoCalls
from selfnpo_fast.models.family import Family


class QwenImage(Family):
    """Qwen-Image and Qwen-Image-Edit."""

    pipeline_class = "QwenImagePipeline"
    denoiser_class = "QwenImageTransformer2DModel"
    denoiser_name = "transformer"
    guided_pipelines = (
        "QwenImagePipeline",
        "QwenImageImg2ImgPipeline",
        "QwenImageInpaintPipeline",
        "QwenImageEditPipeline",
    )
    call_rule = TwoCalls(guided_local="do_true_cfg", scale_local="true_cfg_scale", given_local="has_neg_prompt")
    row_names = frozenset({"timestep", "encoder_hidden_states", "encoder_hidden_states_mask", "guidance"})

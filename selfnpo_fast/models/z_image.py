"""Z-Image: facts for attaching a negative."""

from __future__ import annotations

from selfnpo_fast.models.call_rules import Branch, OneCall
from selfnpo_fast.models.family import Family


class ZImage(Family):
    """Z-Image. Its `guidance_scale` is omega, where other pipelines' is omega + 1."""

    pipeline_class = "ZImagePipeline"
    denoiser_class = "ZImageTransformer2DModel"
    denoiser_name = "transformer"
    guided_pipelines = ("ZImagePipeline",)
    call_rule = OneCall(guided_local="apply_cfg", half=Branch.LAST_HALF)
    first_method = "prepare_latents"  # it has no check_inputs
    input_name = "x"
    row_names = frozenset({"t"})
    list_rows = frozenset({"x", "cap_feats"})
    flat_layers = ("cap_embedder",)  # prompts of different lengths, one after the other

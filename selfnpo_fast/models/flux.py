"""FLUX.1: facts for attaching a negative."""

from __future__ import annotations

from selfnpo_fast.models.call_rules import TwoCalls
from selfnpo_fast.models.family import Family


class Flux(Family):
    """FLUX.1, where it is guided by a negative prompt (`true_cfg_scale`)."""

    pipeline_class = "FluxPipeline"
    denoiser_class = "FluxTransformer2DModel"
    denoiser_name = "transformer"
    guided_pipelines = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline")
    call_rule = TwoCalls(guided_local="do_true_cfg", scale_local="true_cfg_scale", given_local="has_neg_prompt")
    row_names = frozenset({"timestep", "encoder_hidden_states", "pooled_projections", "guidance"})
    not_rows = frozenset({"img_ids", "txt_ids"})  # one row for each token

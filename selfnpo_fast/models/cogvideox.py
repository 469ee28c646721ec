"""CogVideoX: facts for attaching a negative."""

from __future__ import annotations

from selfnpo_fast.models.call_rules import OneCall
from selfnpo_fast.models.family import Family


class CogVideoX(Family):
    """CogVideoX 2B and 5B, and CogVideoX 1.5."""

    pipeline_class = "CogVideoXPipeline"
    denoiser_class = "CogVideoXTransformer3DModel"
    denoiser_name = "transformer"
    guided_pipelines = ("CogVideoXPipeline", "CogVideoXImageToVideoPipeline", "CogVideoXVideoToVideoPipeline")
    # The scale that the pipeline keeps changes from step to step (use_dynamic_cfg).
    call_rule = OneCall(guided_local="do_classifier_free_guidance")
    row_names = frozenset({"timestep", "encoder_hidden_states", "timestep_cond", "ofs"})
    flat_layers = ("ofs_embedding",)  # given one row for all samples
    not_rows = frozenset({"image_rotary_emb"})  # one row for each token

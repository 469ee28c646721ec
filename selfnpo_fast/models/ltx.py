"""LTX-Video: facts for attaching a negative."""

from __future__ import annotations

from selfnpo_fast.models.family import Family


class LTXVideo(Family):
    """LTX-Video."""

    pipeline_class = "LTXPipeline"
    denoiser_class = "LTXVideoTransformer3DModel"
    denoiser_name = "transformer"
    guided_pipelines = ("LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline")
    row_names = frozenset({"timestep", "encoder_hidden_states", "encoder_attention_mask", "video_coords"})
    not_rows = frozenset({"rope_interpolation_scale"})

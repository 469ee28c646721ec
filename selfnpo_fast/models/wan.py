"""Wan 2.1 and 2.2: facts for attaching a negative."""

from __future__ import annotations

from selfnpo_fast.models.call_rules import TwoCalls
from selfnpo_fast.models.family import Family


class Wan(Family):
    """Wan 2.1, and Wan 2.2 with its two experts."""

    pipeline_class = "WanPipeline"
    denoiser_class = "WanTransformer3DModel"
    denoiser_name = "transformer"
    experts = ("transformer_2",)  # the low-noise expert of Wan 2.2
    guided_pipelines = ("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline")
    call_rule = TwoCalls()
    row_names = frozenset({"timestep", "encoder_hidden_states", "encoder_hidden_states_image"})

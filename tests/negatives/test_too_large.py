"""Updates that no network survives are refused, at every door, before a black picture is drawn."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from fuzzing import assert_one_line, assert_refused, call
from safetensors.torch import load_file, save_file
from tiny_negatives import save_with_diffusers, with_lora

from selfnpo_fast import attach_negative, cli
from selfnpo_fast.guidance.sampler import GuidedSampler
from selfnpo_fast.models import load_adapter
from selfnpo_fast.negatives.load import Negative, load_negative
from selfnpo_fast.negatives.low_rank import MAX_UPDATE, LowRank
from selfnpo_fast.negatives.merge import merge
from selfnpo_fast.negatives.sources import LORA_FILE
from selfnpo_fast.runtime.errors import UserError

LAYER = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.write_sd(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def pipe(base) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(base, local_files_only=True)


@pytest.fixture(scope="module")
def state(base, tmp_path_factory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("lora")
    save_with_diffusers(folder, with_lora(load_adapter(str(base)), 2, None))
    return load_file(folder / LORA_FILE)


def times(factor: float):
    return lambda state: {key: value * factor if "lora_B" in key else value for key, value in state.items()}


def with_alpha(alpha: float):
    return lambda state: state | {f"{LAYER}.alpha": torch.tensor(alpha)}


DAMAGES = {
    "times 1e30": (times(1e30), {}),
    "both times 1e20": (lambda s: {key: value * 1e20 for key, value in s.items()}, {}),
    "negative": (times(-1e30), {}),
    "an infinite factor": (lambda s: s | {f"{LAYER}.lora_A.weight": torch.full((2, 16), torch.inf)}, {}),
    "a factor that is no number": (lambda s: s | {f"{LAYER}.lora_A.weight": torch.full((2, 16), torch.nan)}, {}),
    "alpha 1e30": (with_alpha(1e30), {}),
    "alpha infinite": (with_alpha(float("inf")), {}),
    "alpha no number": (with_alpha(float("nan")), {}),
    "lora_alpha 1e30": (dict, {"unet.lora_alpha": 1e30}),
    "lora_alpha infinite": (dict, {"unet.lora_alpha": float("inf")}),
    "lora_alpha no number": (dict, {"unet.lora_alpha": float("nan")}),
    "lora_alpha of 400 digits": (dict, {"unet.lora_alpha": 10**400}),
    "a pattern's alpha": (dict, {"unet.lora_alpha": 1, "unet.alpha_pattern": {"to_q": 1e30}}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_door_refuses_it(base, pipe, state, damage, tmp_path):
    change, config = DAMAGES[damage]
    path = tmp_path / "lora.safetensors"
    metadata = {"lora_adapter_metadata": json.dumps(config)} if config else None
    save_file({key: value.clone() for key, value in change(state).items()}, path, metadata=metadata)
    save_file({key: value.clone() for key, value in state.items()}, tmp_path / "good.safetensors")
    output = tmp_path / "output"
    doors = {
        "attach": lambda: attach_negative(pipe, path),
        "sampler": lambda: GuidedSampler.from_pipeline(pipe, path),
        "mixed": lambda: load_negative(pipe.unet, path, alpha=0.5, beta=0.5, base=base),
        "merge": lambda: merge(base, path, output),
        "merge, bf16": lambda: merge(base, path, output, dtype="bf16"),
        "positive": lambda: merge(base, tmp_path / "good.safetensors", output, positive=path),
    }
    for name, door in doors.items():
        field = "positive" if name == "positive" else "negative"
        words = "is larger than any weight|is not finite|is not readable"
        with pytest.raises(UserError, match=rf"^{field}: {path} .*({words})") as caught:
            door()
        assert_one_line(str(caught.value))
    attach_negative(pipe, tmp_path / "good.safetensors").detach()
    if damage not in ("times 1e30", "lora_alpha infinite"):
        return
    words = ["sample", "--model", str(base), "--negative", str(path), "--prompt", "a", "--output", str(output)]
    code, error = call(cli.main, words)
    assert_refused(code, error, "negative: ", str(path))
    assert not output.exists()


def test_the_bound_is_one_of_elements():
    """Rows and columns that are large in other places than each other make no large element."""
    down, up = torch.zeros(2, 5), torch.zeros(4, 2)
    down[0, 1], up[2, 1] = 1e6, 1e6
    assert not LowRank(down=down, up=up, scale=1.0).is_too_large()
    up[2, 0] = 0.06
    assert not LowRank(down=down, up=up, scale=1.0).is_too_large()
    assert LowRank(down=down, up=up, scale=1.1).is_too_large()
    assert LowRank(down=down, up=up, scale=1.1).delta().max() > MAX_UPDATE
    assert LowRank(down=down, up=up, scale=float("nan")).is_too_large()


def test_what_overflows_the_positives_dtype_alone(base, state, tmp_path):
    """W + delta is beyond float16, W and delta are not; the same update fits into bfloat16."""
    down, up = torch.zeros(1, 16), torch.zeros(16, 1)
    down[0, 0], up[0, 0] = 250.0, 250.0
    save_file({f"{LAYER}.lora_A.weight": down, f"{LAYER}.lora_B.weight": up}, tmp_path / "lora.safetensors")
    positive = load_adapter(str(base)).load_denoiser(torch.float32)
    with torch.no_grad():
        positive.get_submodule(LAYER.removeprefix("unet.")).weight[0, 0] = 60_000
    positive.save_pretrained(tmp_path / "tuned" / "unet")
    merge(tmp_path / "tuned", tmp_path / "lora.safetensors", tmp_path / "fits", dtype="bf16")
    with pytest.raises(UserError, match=r"^negative: .* does not fit into fp16: .*to_q.weight is not finite"):
        merge(tmp_path / "tuned", tmp_path / "lora.safetensors", tmp_path / "output", dtype="fp16")
    half = copy.deepcopy(positive).half()
    with pytest.raises(UserError, match=r"^negative: .* too large for torch.float16: .*to_q.weight is not finite"):
        load_negative(half, tmp_path / "lora.safetensors", alpha=0.5, base=tmp_path / "tuned")
    assert not (tmp_path / "output").exists()


def test_updates_in_memory_are_checked_too(base, state, tmp_path):
    save_file({key: value.clone() for key, value in state.items()}, tmp_path / "lora.safetensors")
    positive = load_adapter(str(base)).load_denoiser(torch.float32)
    deltas = load_negative(positive, tmp_path / "lora.safetensors").deltas
    for scale in (1e30, float("inf"), float("nan")):
        huge = {path: dataclasses.replace(delta, scale=scale) for path, delta in deltas.items()}
        with pytest.raises(UserError, match=r"^negative: the update of .* is larger than any weight can be"):
            load_negative(positive, Negative("huge", deltas=huge))


@pytest.mark.parametrize("value", [1e300, -1e300, float("inf"), float("nan"), 1.1, -0.1, True, "1", None])
@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_strengths_have_one_range(base, tmp_path, name, value):
    with pytest.raises(UserError, match=rf"^{name}: .* is not possible; expected 0 to 1"):
        merge(base, tmp_path / "n", tmp_path / "output", positive=tmp_path / "p", **{name: value})
    with pytest.raises(UserError, match=rf"^{name}: .* is not possible; expected 0 to 1"):
        load_negative(tiny.unet(), tmp_path / "n", **{name: value})

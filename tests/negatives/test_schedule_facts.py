"""A negative whose output means another thing than the model's is refused, wherever its files say
what it means."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from fuzzing import assert_one_line, assert_refused, call
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_negatives import moved, save_with_diffusers, with_lora

from selfnpo_fast import attach_negative, cli, train
from selfnpo_fast.diffusion.schedule_facts import ScheduleFacts, check_same_schedule
from selfnpo_fast.guidance.correlation import correlation
from selfnpo_fast.guidance.sampler import GuidedSampler
from selfnpo_fast.models import load_adapter
from selfnpo_fast.negatives.load import load_negative
from selfnpo_fast.negatives.merge import merge
from selfnpo_fast.negatives.sources import LORA_FILE, RECORD
from selfnpo_fast.runtime.errors import UserError

CPU = torch.device("cpu")
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """An epsilon model."""
    return tiny.write_sd(tmp_path_factory.mktemp("epsilon"))


@pytest.fixture(scope="module")
def network(base) -> torch.nn.Module:
    return load_adapter(str(base)).load_denoiser(torch.float32)


@pytest.fixture(scope="module")
def negatives(base, network, tmp_path_factory) -> dict[str, Path]:
    """Negatives of a v-prediction model, whose tensors fit the epsilon model, by where they say
    it."""
    folder = tmp_path_factory.mktemp("negatives")
    other = moved(network, 3, 0.05)
    paths = {name: folder / name for name in ("pipeline", "record", "file", "lora", "kohya", "marked")}
    other.save_pretrained(paths["pipeline"] / "unet")
    tiny.scheduler("v_prediction").save_pretrained(paths["pipeline"] / "scheduler")
    paths["denoiser"] = paths["pipeline"] / "unet"
    paths["in denoiser"] = paths["denoiser"] / "diffusion_pytorch_model.safetensors"
    other.save_pretrained(paths["record"] / "unet")
    facts = ScheduleFacts.of_scheduler(tiny.scheduler("v_prediction"), "x")
    (paths["record"] / RECORD).write_text(
        json.dumps({"path": str(base), "fingerprint": {}, "schedule": facts.record()})
    )
    weights = {name: value.clone() for name, value in other.state_dict().items()}
    for name, metadata, extra in (
        ("file", {"modelspec.prediction_type": "v"}, {}),
        ("marked", {}, {"v_pred": torch.zeros(0)}),
    ):
        paths[name] = folder / f"{name}.safetensors"
        save_file(weights | extra, paths[name], metadata={"format": "pt", **metadata})
    save_with_diffusers(folder, with_lora(load_adapter(str(base)), 2, None))
    state = load_file(folder / LORA_FILE)
    (folder / LORA_FILE).unlink()
    for name, metadata in (
        ("lora", {"selfnpo_base": json.dumps({"path": str(base), "fingerprint": {}, "schedule": facts.record()})}),
        ("kohya", {"ss_v_parameterization": "True"}),
    ):
        paths[name] = folder / f"{name}.safetensors"
        save_file(state, paths[name], metadata=metadata)
    return paths


PLACES = ["pipeline", "denoiser", "in denoiser", "record", "file", "marked", "lora", "kohya"]


@pytest.fixture(scope="module")
def shared(base) -> StableDiffusionPipeline:
    """The pipeline of the epsilon model."""
    return pipeline(base)


@pytest.fixture
def pipe(shared) -> StableDiffusionPipeline:
    """The same with its own scheduler, and without a negative."""
    shared.scheduler = tiny.scheduler()
    return shared


def pipeline(folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize("place", PLACES)
def test_every_door_refuses_another_prediction_type(base, network, negatives, pipe, place, tmp_path):
    """The same file is taken by a v-prediction pipeline of the same weights."""
    path = str(negatives[place])
    adapter = load_adapter(str(base))
    loaded = load_negative(network, path)
    rows = adapter.encode_prompts(["a cat"], CPU)
    doors = {
        "attach": lambda: attach_negative(pipe, path),
        "sampler": lambda: GuidedSampler.from_pipeline(pipe, path),
        "loaded": lambda: GuidedSampler(adapter, network, loaded),
        "attach loaded": lambda: attach_negative(pipe, loaded),
        "merge": lambda: merge(base, path, tmp_path / "merged"),
        "base": lambda: load_negative(network, path, base=base),
        "correlation": lambda: correlation(adapter, network, loaded, rows, rows),
    }
    for name, door in doors.items():
        with pytest.raises(UserError, match=r"^negative: prediction type v_prediction of .* epsilon of ") as caught:
            door()
        assert path in str(caught.value), name
        assert_one_line(str(caught.value))
    pipe.scheduler = tiny.scheduler("v_prediction")
    attach_negative(pipe, path).detach()
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("command", ["sample", "correlate", "merge"])
def test_commands_refuse_another_prediction_type(base, negatives, command, tmp_path):
    path, output = str(negatives["lora"]), str(tmp_path / "output")
    words = {
        "sample": ["--model", base, "--prompt", "a", "--output", output],
        "correlate": ["--model", base],
        "merge": ["--base", base, "--output", output],
    }[command]
    code, error = call(cli.main, [command, "--negative", path, *map(str, words)])
    assert_refused(code, error, "negative: prediction type v_prediction", path)
    assert not Path(output).exists()


def test_evaluate_refuses_another_prediction_type(tmp_path):
    """It draws with the embedded digits model, an epsilon model."""
    moved(load_adapter("digits").load_denoiser(torch.float32), 1, 0.01).save_pretrained(tmp_path / "n" / "unet")
    tiny.scheduler("v_prediction").save_pretrained(tmp_path / "n" / "scheduler")
    output = tmp_path / "output"
    code, error = call(cli.main, ["evaluate", "--negative", str(tmp_path / "n"), "--output", str(output)])
    assert_refused(code, error, f"negative: prediction type v_prediction of {tmp_path}/n does not go with epsilon")


def test_merge_compares_the_positive_too(base, negatives, tmp_path):
    with pytest.raises(UserError, match=r"^positive: prediction type v_prediction of .*/pipeline does not go with"):
        merge(base, negatives["lora"], tmp_path / "m", positive=negatives["pipeline"])


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SAMPLERS = {
    "karras": lambda: DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True, algorithm_type="sde-dpmsolver++"),
    "euler": lambda: EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing", use_exponential_sigmas=True),
    "pndm": lambda: PNDMScheduler(**BETAS, skip_prk_steps=True),
    "unipc": lambda: UniPCMultistepScheduler(**BETAS),
    "lcm": lambda: LCMScheduler(**BETAS),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_another_solver_of_the_same_schedule_is_taken(pipe, network, name, tmp_path):
    """Full weights beside a scheduler of one class, a pipeline with one of another."""
    moved(network, 4, 0.05).save_pretrained(tmp_path / "unet")
    tiny.scheduler().save_pretrained(tmp_path / "scheduler")
    pipe.scheduler = SAMPLERS[name]()
    attach_negative(pipe, tmp_path).detach()
    SAMPLERS[name]().save_pretrained(tmp_path / "scheduler")
    pipe.scheduler = tiny.scheduler()
    attach_negative(pipe, tmp_path).detach()


@pytest.mark.parametrize("rescaled", ["negative", "pipeline", "both"])
@pytest.mark.parametrize("kind", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_zero_terminal_snr_of_one_only(network, pipe, tmp_path, rescaled, kind):
    """The classes write the last level as 0 or as 2^-24."""
    moved(network, 4, 0.05).save_pretrained(tmp_path / "n" / "unet")
    options = {**BETAS, "prediction_type": "v_prediction"}
    DDIMScheduler(**options, rescale_betas_zero_snr=rescaled != "pipeline").save_pretrained(tmp_path / "n/scheduler")
    pipe.scheduler = kind(**options, rescale_betas_zero_snr=rescaled != "negative")
    if rescaled == "both":
        attach_negative(pipe, tmp_path / "n").detach()
        return
    one, two = ("the pipeline", tmp_path / "n") if rescaled == "pipeline" else (tmp_path / "n", "the pipeline")
    with pytest.raises(UserError, match=rf"^negative: .* of {one} is rescaled to zero terminal SNR .* of {two} is not"):
        attach_negative(pipe, tmp_path / "n")


def test_other_betas(pipe, network, tmp_path):
    moved(network, 4, 0.05).save_pretrained(tmp_path / "unet")
    DDIMScheduler(**BETAS | {"beta_schedule": "linear"}).save_pretrained(tmp_path / "scheduler")
    with pytest.raises(
        UserError, match=rf"^negative: the noise schedule of {tmp_path} .*alphas_cumprod at timestep \d+"
    ):
        attach_negative(pipe, tmp_path)
    DDIMScheduler(**BETAS, num_train_timesteps=100).save_pretrained(tmp_path / "scheduler")
    with pytest.raises(UserError, match=rf"^negative: {tmp_path} has 100 timesteps, the pipeline 1000"):
        attach_negative(pipe, tmp_path)


def test_facts_are_read_at_the_right_timesteps():
    schedule = tiny.scheduler(num_train_timesteps=65)
    facts = ScheduleFacts.of_scheduler(schedule, "x")
    assert facts.levels == tuple(schedule.alphas_cumprod[::2].double().tolist())
    assert ScheduleFacts.of_record(json.loads(json.dumps(facts.record())), "x") == facts


@pytest.mark.parametrize("rank", [0, 2])
def test_runs_record_the_schedule(tmp_path, rank):
    """A run's own negative says what it was trained for, and goes with its own base alone."""
    model = tiny.write_sd(tmp_path / "v", "v_prediction")
    words = ["--config", str(CONFIGS / "digits.yaml"), "--output", str(tmp_path / "run"), "--model.path", str(model)]
    words += ["--updates", "1", "--engine.batch_size", "4", "--rollout.grid_steps", "5", "--rollout.pool", "2"]
    assert train.main([*words, "--log.sample_every", "-1", "--lora.rank", str(rank)]) == 0
    negative = tmp_path / "run" / "negative"
    if rank:
        with safe_open(negative / LORA_FILE, "pt") as file:
            record = json.loads(file.metadata()["selfnpo_base"])
    else:
        record = json.loads((negative / RECORD).read_text())
    expected = ScheduleFacts.of_scheduler(tiny.scheduler("v_prediction"), "x").record()
    assert record["schedule"] == expected
    v_pipe = pipeline(model)
    attach_negative(v_pipe, negative).detach()
    v_pipe.scheduler = tiny.scheduler()
    with pytest.raises(UserError, match="prediction type v_prediction"):
        attach_negative(v_pipe, negative)


def test_a_merge_records_the_schedule(base, pipe, negatives, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    tiny.scheduler("v_prediction").save_pretrained(tmp_path / "base" / "scheduler")
    folder = merge(tmp_path / "base", negatives["kohya"], tmp_path / "merged")
    with pytest.raises(UserError, match=rf"prediction type v_prediction of {folder} does not go with epsilon"):
        attach_negative(pipe, folder)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"modelspec.prediction_type": "epsilon"}, ("epsilon", None)),
        ({"modelspec.prediction_type": "v", "ss_v_parameterization": "False"}, ("v_prediction", None)),
        ({"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, ("v_prediction", True)),
        ({"ss_v_parameterization": "False", "ss_zero_terminal_snr": "False"}, ("epsilon", False)),
        ({"ss_v_parameterization": "None"}, (None, None)),
        ({"modelspec.prediction_type": ""}, (None, None)),
    ],
)
def test_metadata_of_other_programs(metadata, expected):
    facts = ScheduleFacts.of_metadata(metadata, [], "x")
    assert (facts.prediction_type, facts.zero_snr) == expected


def test_nothing_is_compared_that_nothing_says(pipe, network, tmp_path):
    """Files of before load as they did, and schedulers without alphas_cumprod stay possible."""
    epsilon = ScheduleFacts.of_scheduler(tiny.scheduler(), "x")
    check_same_schedule(ScheduleFacts("y"), epsilon)
    check_same_schedule(None, epsilon)
    check_same_schedule(ScheduleFacts.of_scheduler(object(), "y"), epsilon)
    moved(network, 4, 0.05).save_pretrained(tmp_path / "unet")
    pipe.scheduler = tiny.scheduler("v_prediction")
    attach_negative(pipe, tmp_path).detach()


@pytest.mark.parametrize(
    "config",
    [
        {"num_train_timesteps": 10**12},
        {"num_train_timesteps": "x"},
        {"beta_schedule": "x"},
        {"beta_start": "x"},
        {"trained_betas": {}},
    ],
)
def test_damaged_scheduler_configs(base, network, tmp_path, config):
    moved(network, 4, 0.05).save_pretrained(tmp_path / "unet")
    tiny.scheduler().save_pretrained(tmp_path / "scheduler")
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(UserError, match=r"^negative: ") as caught:
        load_negative(network, tmp_path)
    assert_one_line(str(caught.value), str(tmp_path))


@pytest.mark.parametrize("name", ["NoSuchScheduler", "UNet2DConditionModel", "os", None, ["x"]])
def test_a_scheduler_of_another_class_is_said(base, network, tmp_path, name, caplog):
    moved(network, 4, 0.05).save_pretrained(tmp_path / "unet")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": name, "prediction_type": "v_prediction"})
    )
    assert load_negative(network, tmp_path).schedule.prediction_type == "v_prediction"
    assert "is not known: its noise levels are not compared" in caplog.text


@pytest.mark.parametrize(
    "record",
    [[], 3, {}, {"prediction_type": 1}, {"prediction_type": "v", "num_train_timesteps": "x", "alphas_cumprod": None}],
)
def test_damaged_records(base, network, tmp_path, record):
    moved(network, 4, 0.05).save_pretrained(tmp_path / "unet")
    (tmp_path / RECORD).write_text(json.dumps({"schedule": record}))
    with pytest.raises(UserError, match=rf"^negative: {tmp_path}: its record of the schedule is damaged") as caught:
        load_negative(network, tmp_path)
    assert_one_line(str(caught.value))

"""Checkpoints that hold anything, under hashes that are right: they load, or one line refuses them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import crash
import pytest
import tiny
import torch
from fuzzing import assert_one_line, fuzz
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from selfnpo_fast import train
from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.runtime.folders import MANIFEST, write_manifest
from selfnpo_fast.runtime.world import init_world
from selfnpo_fast.training.inputs import load_inputs
from selfnpo_fast.training.recorder import Recorder
from selfnpo_fast.training.resumable import newest_checkpoint, read_state
from selfnpo_fast.training.trainer import Trainer

NAMES = {
    "plain": {"ranks": 1, "zero": 0, "reference": "ema", "mode": "continuous", "lora": 0},
    "overlap, lora, lockstep": {
        **{"ranks": 1, "zero": 0, "reference": "frozen", "mode": "lockstep", "lora": 2},
        "overlap": True,
    },
    "8 bit": {"ranks": 1, "zero": 0, "reference": "frozen", "mode": "lockstep", "lora": 0},
}
VALUES = [None, True, "", "x", "0", -1, 0, 1, 0.5, 2**53 + 1, 10**400, [], [[]], {}, {"a": 1}, [None, None]]
VALUES += [float("nan"), float("inf"), [1] * 3, "x" * 100_000]


class Resumable:
    """A checkpoint of update 2, a copy to damage, and the trainer that resumes from it."""

    def __init__(self, name: str, folder: Path) -> None:
        model = tiny.write_sd(folder / "model")
        argv = [*crash.words(NAMES[name], model, folder / "run"), "--updates", "2", "--log.every", "2"]
        argv += ["--optimizer.name", "adamw8bit"] if name == "8 bit" else []
        assert train.main(argv) == 0
        self.whole = folder / "run" / "checkpoints" / "update-0000002"
        self.copies = folder / "copies"
        self.copies.mkdir()
        self.world, self.config = init_world(), train.parse(argv).config
        self.inputs = load_inputs(self.config, self.world)
        self.trainer = Trainer(self.config, self.inputs, self.world, folder / "run")
        self.recorder = Recorder(self.config, self.world, self.trainer.adapter.schedule.num_train_timesteps)

    def copy(self) -> Path:
        """A fresh copy, whose manifest is written when it is loaded."""
        shutil.rmtree(self.copies)
        target = self.copies / self.whole.name
        shutil.copytree(self.whole, target)
        (target / MANIFEST).unlink()
        return target

    def loads(self, folder: Path, *, changed: str = "") -> bool:
        """Whether the copy is resumed from; if not, it is refused by one line that names it."""
        write_manifest(folder)
        try:
            newest = newest_checkpoint(self.copies, self.config, self.world)
            self.inputs.refuse_changed(newest, self.world)
            self.trainer.resume(newest, self.recorder)
        except UserError as error:
            assert_one_line(str(error), changed, *([] if changed else [str(self.copies)]))
            return False
        self.trainer.producer.settle()
        return True


@pytest.fixture(scope="module")
def all_saved(tmp_path_factory) -> Iterator[dict[str, Resumable]]:
    made = {name: Resumable(name, tmp_path_factory.mktemp("hostile")) for name in NAMES}
    yield made
    for resumable in made.values():
        resumable.trainer.producer.close()


@pytest.fixture(params=NAMES)
def saved(request, all_saved) -> Resumable:
    return all_saved[request.param]


@pytest.fixture(scope="module")
def plain(all_saved) -> Resumable:
    return all_saved["plain"]


def test_an_honest_copy_loads(saved):
    assert saved.loads(saved.copy())


# Tensors


def other_shape(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[None]


def one_for_all(tensor: torch.Tensor) -> torch.Tensor:
    """A shape that a copy would broadcast."""
    return tensor.flatten()[:1].clone() if tensor.numel() != 1 else torch.cat([tensor.flatten()] * 2)


def other_dtype(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.int32 if tensor.dtype == torch.float64 else torch.float64)


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "shape": other_shape,
    "one for all": one_for_all,
    "dtype": other_dtype,
}


@pytest.mark.parametrize("change", [*CHANGES, "missing", "unknown", "renamed"])
def test_no_tensor_of_another_kind_is_used(change, saved):
    """One tensor of each part of each file."""
    for path in sorted(saved.whole.glob("*.safetensors")):
        tensors = load_file(path)
        parts = {name.partition(".")[0] if path.name.startswith("rank") else "": name for name in tensors}
        for name in parts.values():
            changed = dict(tensors)
            if change in CHANGES:
                changed[name] = CHANGES[change](changed[name])
            elif change != "unknown":
                moved = changed.pop(name)
                if change == "renamed":
                    changed[f"{name}_"] = moved
            else:
                changed[f"{name}_"] = torch.zeros(1)
            folder = saved.copy()
            save_file({key: value.contiguous() for key, value in changed.items()}, folder / path.name)
            assert not saved.loads(folder, changed=path.name), f"{path.name}: {name}"


def integers(path: Path) -> list[str]:
    """The names of integer tensors, one of each kind."""
    kinds = {re.sub(r"\d+", "", name): name for name, tensor in load_file(path).items() if tensor.dtype == torch.int64}
    return list(kinds.values())


@pytest.mark.parametrize("value", [-2, 2**63 - 1])
def test_indices_out_of_range_are_refused(value, saved):
    """On a GPU such an index reads foreign memory."""
    for path in (saved.whole / "rank0.safetensors", saved.whole / "reference.safetensors"):
        for name in integers(path):
            folder, tensors = saved.copy(), load_file(path)
            tensors[name].view(-1)[:1] = value
            save_file(tensors, folder / path.name)
            assert not saved.loads(folder, changed=path.name), name


@pytest.mark.parametrize("value", [0, 1, 7, 1000])
def test_an_index_that_is_let_in_makes_an_update(value, plain):
    """What the ranges above allow, the kernels and tables take."""
    path = plain.whole / "rank0.safetensors"
    for name in integers(path):
        folder, tensors = plain.copy(), load_file(path)
        tensors[name].view(-1)[:1] = value
        save_file(tensors, folder / path.name)
        if plain.loads(folder, changed=path.name):
            plain.trainer.train_update(plain.recorder)
            plain.recorder.discard()


def test_a_state_of_a_random_generator_is_looked_at(plain):
    folder, tensors = plain.copy(), load_file(plain.whole / "rank0.safetensors")
    tensors["rng.cpu"].fill_(255)
    save_file(tensors, folder / "rank0.safetensors")
    assert not plain.loads(folder, changed="rank0.safetensors does not fit this run: rng")


@pytest.mark.parametrize("name", ["student", "exp_avg", "reference", "rank0"])
def test_a_file_that_belongs_to_it_has_to_be_there(name, plain):
    """Also where the manifest says nothing of it, or the state neither."""
    folder = plain.copy()
    (folder / f"{name}.safetensors").unlink()
    assert not plain.loads(folder, changed=f"{name}.safetensors belongs to it, and the manifest does not list it")
    (folder / MANIFEST).unlink()
    edit(folder, lambda state: state["files"].remove(f"{name}.safetensors"))
    assert not plain.loads(folder, changed="update-0000002")


def test_a_file_that_does_not_belong_to_it_is_not_read(plain):
    """No moments are there before the first step; those of another run may lie there."""
    folder = plain.copy()
    edit(folder, lambda state: (state["engine"].update(steps=0), state["files"].remove("exp_avg.safetensors")))
    shutil.copy(plain.whole / "student.safetensors", folder / "exp_avg.safetensors")
    assert plain.loads(folder)


# state.json


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "state.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))


def places(value: object, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all entries of nested objects, except those of config and inputs, which are
    compared."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key)
            if key not in ("config", "inputs", "versions"):
                yield from places(inner, (*path, key))


@fuzz(40)
@given(data=st.data())
def test_a_state_with_other_values(plain, data):
    state = json.loads((plain.whole / "state.json").read_text())
    path = data.draw(st.sampled_from(sorted(places(state))))
    value = data.draw(st.sampled_from([..., *VALUES]))
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    folder = plain.copy()
    (folder / "state.json").write_text(json.dumps(state))
    if plain.loads(folder, changed=str(plain.copies) if path[0] != "inputs" else ""):
        json.dumps(plain.recorder.counters.state_dict(), allow_nan=False)


BAD_COUNTERS = {
    "NaN": lambda state: state["recorder"].update(norm=float("nan")),
    "negative": lambda state: state["engine"].update(steps=-1),
    "huge": lambda state: state["engine"].update(lr_steps=10**300),
    "a loss scale": lambda state: state["engine"].update(loss_scale={"cur_scale": 1.0}),
    "an attribute": lambda state: state["engine"].update(loss_scale={"__class__": 1}),
    "an infinite loss": lambda state: state["recorder"].update(recent=[float("inf")]),
    "too many losses": lambda state: state["recorder"].update(recent=[1.0] * 101),
    "more updates than there were": lambda state: state["recorder"].update(pending=1),
    "too few flags": lambda state: state["recorder"].update(applied=[True]),
    "no counters": lambda state: state.pop("recorder"),
    "another update": lambda state: state.update(update=3),
    "a negative update": lambda state: state.update(update=-2),
    "an update that is true": lambda state: state.update(update=True),
    "no ranks": lambda state: state.update(world_size=0),
    "many ranks": lambda state: state.update(world_size=10**9),
    "no versions": lambda state: state.pop("versions"),
    "another config": lambda state: state["config"].update(seed="x" * 10**6),
    "many configs": lambda state: state["config"].update({str(i): i for i in range(10**5)}),
    "files that are none": lambda state: state.update(files=[3]),
    "a file elsewhere": lambda state: state["files"].append("../../config.yaml"),
}


@pytest.mark.parametrize("name", BAD_COUNTERS)
def test_impossible_counters_are_refused(name, plain):
    folder = plain.copy()
    edit(folder, BAD_COUNTERS[name])
    assert not plain.loads(folder, changed="update-0000002")


@pytest.mark.parametrize(
    "content", [b"", b"[" * 200_000, b'{"a":' * 200_000, b"\xff\xfe{", b"[]", b"null", b"9" * 5000]
)
def test_a_state_that_is_no_json_is_refused(content, plain):
    folder = plain.copy()
    (folder / "state.json").write_bytes(content)
    assert not plain.loads(folder, changed="state.json")
    with pytest.raises(UserError):
        read_state(folder)


def test_a_command_refuses_it_with_one_line(plain, tmp_path, capfd):
    """The same through the front door."""
    output = tmp_path / "run"
    shutil.copytree(plain.whole.parents[1], output)
    folder = output / "checkpoints" / "update-0000002"
    edit(folder, BAD_COUNTERS["NaN"])
    (folder / MANIFEST).unlink()
    write_manifest(folder)
    capfd.readouterr()
    words = crash.words(NAMES["plain"], plain.whole.parents[2] / "model", output)
    argv = [*words, "--log.every", "2", "--resume"]
    assert train.main(argv) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {folder}/state.json does not fit this run: recorder: norm is nan")

"""Six attacks of all kinds; `python tests/tools/crash.py --kills 50` is the long form."""

from __future__ import annotations

import random

import crash
import pytest
import tiny

# Between them, every choice of every option.
FEW = [
    {"ranks": 1, "zero": 0, "reference": "ema", "mode": "continuous", "lora": 0, "overlap": True},
    {"ranks": 2, "zero": 2, "reference": "frozen", "mode": "lockstep", "lora": 2, "overlap": False},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_sd(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("case", [FEW[0], pytest.param(FEW[1], marks=pytest.mark.slow)], ids=str)
def test_a_killed_run_ends_in_the_same_bits(case, model, tmp_path):
    kinds = ["ranks", "rival", "launcher", "full disk", "ranks", "interrupt"]
    assert set(kinds) == set(crash.KINDS)
    crash.crash(case, kinds, tmp_path, model, random.Random(3))


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in crash.all_cases() if case not in FEW][::7], ids=str)
def test_more_of_them(case, model, tmp_path):
    crash.crash(case, ["ranks", "ranks"], tmp_path, model, random.Random(4))


def test_the_comparison_sees_a_single_bit(model, tmp_path):
    """The comparison on which the tests above rest can fail."""
    from safetensors.torch import load_file, save_file

    case = FEW[0]
    for name in ("one", "two"):
        argv = crash.words(case, model, tmp_path / name)
        assert crash.finish(crash.start(1, argv, tmp_path), tmp_path) == [0]
    crash.assert_equal(tmp_path / "one", tmp_path / "two")
    path = max((tmp_path / "two" / "checkpoints").iterdir()) / "student.safetensors"
    tensors = load_file(path)
    tensors["conv_in.bias"][0] *= 1 + 2**-23
    save_file(tensors, path)
    with pytest.raises(AssertionError, match=r"conv_in\.bias differs"):
        crash.assert_equal(tmp_path / "one", tmp_path / "two")

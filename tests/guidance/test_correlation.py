"""Correlation and the variance of guidance against closed form; the recommended alpha."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import tiny
import torch
from fuzzing import assert_refused, call
from tiny_negatives import merged, moved, save_with_diffusers, with_lora
from torch import nn

from selfnpo_fast import cli
from selfnpo_fast.diffusion.levels import Levels
from selfnpo_fast.guidance.correlation import ALPHAS, BOUND, Moments, alphas_of, correlation, moments
from selfnpo_fast.models import load_adapter
from selfnpo_fast.negatives.load import load_negative
from selfnpo_fast.runtime.errors import UserError

CPU = torch.device("cpu")
SHAPE = (4, 32, 32)
CONDITIONING = {"rows": torch.zeros(16, 1)}


def gaussian(seed: int, batch: int = 16) -> torch.Tensor:
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("w", [0.0, 1.0, 6.5])
@pytest.mark.parametrize("rho", [0.0, 0.9, -0.3])
def test_moments_in_closed_form(rho, w):
    p, z = 2 * gaussian(0) + 5, gaussian(1)
    n = 3 * (rho * (p - 5) / 2 + (1 - rho**2) ** 0.5 * z) - 1
    found = moments(p, n, 10.0)
    # 65,536 draws: standard errors of 0.4% of a variance and 0.4 points of a correlation.
    assert found.positive == pytest.approx(4, rel=0.02)
    assert found.negative == pytest.approx(9, rel=0.02)
    assert found.rho == pytest.approx(rho, abs=0.02)
    guided = ((w + 1) * p.double() - w * n.double()).var(correction=0).item()
    assert found.variance_ratio(w) == pytest.approx(guided / p.double().var(correction=0).item(), rel=1e-9)


@pytest.mark.parametrize("w", [0.5, 1.0, 6.5])
def test_the_papers_warning(w):
    independent = Moments(1.0, 1.0, 1.0, 0.0)
    assert independent.variance_ratio(w) == pytest.approx(2 * w**2 + 2 * w + 1)
    assert Moments(1.0, 1.0, 1.0, 1.0).variance_ratio(w) == pytest.approx(1)
    assert moments(gaussian(0), gaussian(1), 1.0).variance_ratio(w) == pytest.approx(2 * w**2 + 2 * w + 1, rel=0.03)


def test_constant_and_non_finite_predictions_are_refused():
    for n in (torch.ones(2, *SHAPE), torch.full((2, *SHAPE), float("nan"))):
        with pytest.raises(UserError, match=r"^negative: a prediction at timestep 7 is constant or not finite"):
            moments(gaussian(0, 2), n, 7.0)


class Synthetic(nn.Module):
    """Predicts with variance 1 and correlation rho with the positive, at every state."""

    def __init__(self, rho: float) -> None:
        super().__init__()
        self.rho, self.weight = rho, nn.Parameter(torch.zeros(1))

    def predict(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seed = int(t[0])
        return self.rho * gaussian(seed) + (1 - self.rho**2) ** 0.5 * gaussian(seed + 10_000)


def synthetic_adapter(plain: float):
    """The positive is at correlation `plain` with itself under the negative branch's prompt."""

    def predict(network: Synthetic, x: torch.Tensor, t: torch.Tensor, cond: dict) -> torch.Tensor:
        if network.rho == 1 and cond is not CONDITIONING:
            return Synthetic(plain).predict(x, t)
        return network.predict(x, t)

    return SimpleNamespace(
        scheduler=tiny.scheduler(),
        schedule=Levels.of(tiny.scheduler()),
        set_timesteps=lambda scheduler, steps, _: scheduler.set_timesteps(steps),
        size=None,
        latent_shape=SHAPE,
        predict=predict,
    )


def measure(negative: nn.Module, plain: float = 0.98, **options):
    rows = {"rows": torch.zeros(1, 1)}
    return correlation(synthetic_adapter(plain), Synthetic(1.0), negative, CONDITIONING, rows, steps=4, **options)


def ratio(rho: float, w: float) -> float:
    return 1 + 2 * w * (w + 1) * (1 - rho)


def test_known_correlations_are_measured():
    found = measure(Synthetic(0.8), guidance_scale=5.0)
    assert [level.timestep for level in found.levels] == [751, 501, 251, 1]
    for level, plain in zip(found.levels, found.plain, strict=True):
        assert level.rho == pytest.approx(0.8, abs=0.01)
        assert plain.rho == pytest.approx(0.98, abs=0.01)
        assert level.variance_ratio(4) == pytest.approx(ratio(0.8, 4), rel=0.05)
    assert found.excess == pytest.approx(ratio(0.8, 4) / ratio(0.98, 4), rel=0.1)
    text = str(found).splitlines()
    assert "independent predictions would have 41)" in text[0]
    assert len(text) == 6 and "recommended" not in text[-1]


@pytest.mark.parametrize("smallest", [1.0, 0.7, 0.0])
def test_the_smallest_alpha_that_is_stable_is_recommended(smallest):
    """Correlation falls with alpha; the bound is crossed halfway between two alphas of the grid."""
    w, plain = 6.5, 0.98
    limit = 1 - (BOUND * ratio(plain, w) - 1) / (2 * w * (w + 1))
    asked = []

    def alphas(alpha: float) -> Synthetic:
        asked.append(alpha)
        return Synthetic(min(1.0, limit + 0.02 * (alpha - smallest + 0.05)))

    found = measure(Synthetic(0.99), plain, alphas=alphas)
    assert found.alpha == smallest
    assert asked == list(ALPHAS[: ALPHAS.index(smallest) + 2])
    assert f"recommended alpha: {smallest:g}" in str(found)


def test_where_no_alpha_is_stable():
    found = measure(Synthetic(0.5), alphas=lambda alpha: Synthetic(0.5))
    assert found.alpha == 1
    assert str(found).splitlines()[-1].startswith("even alpha 1 gives more than 1.5 times")


def test_impossible_scales_are_named():
    for scale in (0.5, float("nan"), float("inf")):
        with pytest.raises(UserError, match=rf"^guidance_scale: {scale} is not possible"):
            measure(Synthetic(0.9), guidance_scale=scale)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return load_adapter(str(tiny.write_sd(tmp_path_factory.mktemp("base"))))


def test_real_networks(adapter, tmp_path):
    """A negative at alpha 0 is further from a fine-tuned positive than one at alpha 1.

    A negative that equals the positive is plain guidance.
    """
    base = adapter.load_denoiser(torch.float32)
    positive = moved(base, 1, 0.08)
    moved(base, 2, 0.01).save_pretrained(tmp_path / "unet")
    rows, empty = adapter.encode_prompts(["a cat", "two birds"], CPU), adapter.encode_empty(CPU)

    def measured(negative):
        return correlation(adapter, positive, negative, rows, empty, steps=3, guidance_scale=3.0)

    far, near = (measured(load_negative(positive, tmp_path, alpha=alpha, base=adapter.path)) for alpha in (0.0, 1.0))
    for a, b in zip(far.levels, near.levels, strict=True):
        assert a.rho < b.rho < 1
    same = measured(copy.deepcopy(positive))
    assert same.levels == same.plain
    assert same.excess == 1
    alphas = alphas_of(positive, tmp_path, adapter.path)
    found = correlation(adapter, positive, copy.deepcopy(positive), rows, empty, steps=3, alphas=alphas)
    assert found.alpha in ALPHAS


def test_a_lora_is_measured_as_its_network(adapter, tmp_path):
    base = adapter.load_denoiser(torch.float32)
    network = with_lora(adapter, 2, None)
    save_with_diffusers(tmp_path, network)
    rows, empty = adapter.encode_prompts(["a cat"], CPU), adapter.encode_empty(CPU)
    found, expected = (
        correlation(adapter, base, negative, rows, empty, steps=3).levels
        for negative in (load_negative(base, tmp_path), merged(adapter, network, 1.0))
    )
    for a, b in zip(found, expected, strict=True):
        assert a.rho == pytest.approx(b.rho, abs=1e-5)


def test_the_command(adapter, tmp_path, capsys):
    base = adapter.load_denoiser(torch.float32)
    moved(base, 2, 0.01).save_pretrained(tmp_path / "negative/unet")
    (tmp_path / "prompts.txt").write_text("a cat\ntwo birds\n")
    words = ["correlate", "--model", adapter.path, "--prompts", str(tmp_path / "prompts.txt"), "--steps", "2"]
    assert cli.main([*words, "--negative", str(tmp_path / "negative")]) == 0
    report = capsys.readouterr().out
    assert report.count("timestep ") == 2
    assert "alpha: give --base" in report
    words_base = ["--negative", str(tmp_path / "negative"), "--base"]
    assert cli.main([*words, *words_base, adapter.path]) == 0
    assert "alpha has no effect: the positive is the base" in capsys.readouterr().out
    moved(base, 3, 0.05).save_pretrained(tmp_path / "before/unet")
    assert cli.main([*words, *words_base, str(tmp_path / "before")]) == 0
    assert "recommended alpha: " in capsys.readouterr().out
    for extra, message in (
        ([], "negative: none given"),
        (["--negative", "x.ckpt"], "it is a pickle"),
        (["--negative", str(tmp_path / "negative"), "--steps", "0"], "steps: 0 is not possible"),
        (["--negative", str(tmp_path / "negative"), "--guidance_scale", "0.5"], "guidance_scale: 0.5 is not possible"),
    ):
        code, error = call(cli.main, [*words, *extra])
        assert_refused(code, error, message)

"""Measures of digit pictures: colours by construction, scores against a plain forward, files."""

from __future__ import annotations

import pytest
import torch

from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.scoring.digits import scorer as scorer_module
from selfnpo_fast.scoring.digits.colours import background_colour, ink_colour, match_colours
from selfnpo_fast.scoring.digits.domain import Label, digits_domain
from selfnpo_fast.scoring.digits.measures import digits_measures
from selfnpo_fast.scoring.digits.network import DigitScorer
from selfnpo_fast.scoring.digits.scorer import FittedScorer
from selfnpo_fast.scoring.metrics import frechet_distance, knn_samples


def stroke(thickness: float) -> torch.Tensor:
    """Coverage (32, 32) in 0..1 of a slanted antialiased bar, 18 pixels long."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    across = ((x - 16) + 0.3 * (y - 16)).abs() / 1.044
    inside = (thickness / 2 + 0.5 - across).clamp(0, 1)
    return inside * ((y - 16).abs() <= 9)


def paint(labels: list[Label], coverage: torch.Tensor) -> torch.Tensor:
    """Pictures (N, 3, 32, 32) in [-1, 1] of one coverage map in the colours of the labels."""
    domain = digits_domain()
    ink = domain.ink_rgb[[label.ink for label in labels]][:, :, None, None]
    background = domain.background_rgb[[label.background for label in labels]][:, :, None, None]
    return torch.lerp(background, ink, coverage) * 2 - 1


def prompts_of(labels: list[Label]) -> list[str]:
    return [digits_domain().prompt(label) for label in labels]


@pytest.fixture(scope="module")
def network() -> DigitScorer:
    torch.manual_seed(0)
    return DigitScorer().eval()


@pytest.mark.parametrize("thickness", [1.5, 2.3, 5.0])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_all_560_colourings_match(thickness, noise):
    labels = digits_domain().labels()
    images = paint(labels, stroke(thickness))
    images = images + noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert match_colours(images.clamp(-1, 1), labels).all()


def test_every_wrong_ink_or_background_is_told():
    labels = digits_domain().labels()
    images = paint(labels, stroke(2.3))
    other_ink = [Label(label.digit, (label.ink + 1) % 8, label.background) for label in labels]
    other_background = [Label(label.digit, label.ink, (label.background + 1) % 7) for label in labels]
    assert not match_colours(images, other_ink).any()
    assert not match_colours(images, other_background).any()


def test_blank_pictures_match_nothing():
    labels = digits_domain().labels()
    assert not match_colours(paint(labels, torch.zeros(32, 32)), labels).any()


def test_colours_are_those_painted_in():
    label = Label(3, 4, 2)
    domain, images = digits_domain(), paint([label], stroke(3.0))
    # Observed 1e-7: the thick stroke has more than 16 pixels of pure ink.
    background = background_colour(images)
    torch.testing.assert_close(background, domain.background_rgb[[2]], atol=1e-6, rtol=0)
    torch.testing.assert_close(ink_colour(images, background), domain.ink_rgb[[4]], atol=1e-6, rtol=0)


def test_background_survives_a_spoilt_corner():
    label = Label(0, 0, 0)
    images = paint([label], stroke(3.0))
    images[:, :, :10, :10] = -1
    assert match_colours(paint([label], stroke(3.0)), [label]).all()
    torch.testing.assert_close(background_colour(images), digits_domain().background_rgb[[0]])


def test_scores_are_those_of_the_network(network, monkeypatch):
    monkeypatch.setattr(scorer_module, "BATCH_SIZE", 33)
    labels = digits_domain().labels()[::7]
    images = paint(labels, stroke(2.0))
    scorer = FittedScorer(network, torch.zeros(9, 64), {})
    scores = digits_measures(scorer).score(images, prompts_of(labels))
    with torch.no_grad():
        features, logits, realness = network(images)
    log_prob = torch.stack([row.log_softmax(0)[label.digit] for row, label in zip(logits, labels, strict=True)])
    # Convolutions of another batch size round differently; observed 5e-7.
    torch.testing.assert_close(scorer.features(images), features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores["digit_log_prob"], log_prob, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores["realness"], 1 / (1 + (-realness).exp()), atol=1e-5, rtol=1e-5)
    assert scores["digit_correct"].tolist() == [
        int(row.argmax()) == label.digit for row, label in zip(logits, labels, strict=True)
    ]
    assert scores["colour_match"].all()


def test_all_measures_of_a_set_of_pictures_share_one_forward():
    torch.manual_seed(0)
    network, forwards = DigitScorer(), []
    network.register_forward_hook(lambda module, inputs, output: forwards.append(len(inputs[0])))
    labels = digits_domain().labels()[::7]
    images = paint(labels, stroke(2.0))
    real = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    measures = digits_measures(FittedScorer(network, real, {}), k=3)
    first = measures.score(images, prompts_of(labels)), measures.compare(images)
    assert forwards == [80]
    # An equal tensor is another one, and a change in place is seen.
    again = measures.score(images.clone(), prompts_of(labels)), measures.compare(images)
    assert forwards == [80, 80, 80]
    assert all(torch.equal(first[0][name], again[0][name]) for name in first[0])
    assert first[1]["frechet"] == again[1]["frechet"]
    before = measures.score(images, prompts_of(labels))["realness"]
    images.mul_(0.5)
    assert not torch.equal(measures.score(images, prompts_of(labels))["realness"], before)


def test_set_measures_compare_the_features_with_real_ones(network):
    labels = digits_domain().labels()[::7]
    images = paint(labels, stroke(2.0))
    real = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    scorer = FittedScorer(network, real, {})
    found = digits_measures(scorer, k=3).compare(images)
    features = scorer.features(images)
    assert found["frechet"] == frechet_distance(features, real)
    samples = knn_samples(features, real, 3)
    for name, side in (("precision", "generated"), ("density", "generated"), ("recall", "real"), ("coverage", "real")):
        assert found[name].side == side
        assert torch.equal(found[name].values, getattr(samples, name))
    assert digits_measures(scorer, k=3).least_images == 4


def test_a_saved_scorer_loads_and_scores_the_same(network, tmp_path):
    labels = digits_domain().labels()[:20]
    images, features = paint(labels, stroke(2.0)), torch.randn(30, 64)
    FittedScorer.save(tmp_path / "scorers", network, features, {"test_digit_accuracy": "0.9876"})
    loaded = FittedScorer.load(tmp_path / "scorers")
    assert loaded.quality == {"test_digit_accuracy": "0.9876"}
    assert torch.equal(loaded.real_features, features)
    expected = FittedScorer(network, features, {}).features(images)
    assert torch.equal(loaded.features(images), expected)


def test_a_training_network_is_scored_in_eval_mode(network):
    torch.manual_seed(0)
    training = DigitScorer().train()
    labels = digits_domain().labels()[:8]
    images = paint(labels, stroke(2.0))
    batch = FittedScorer(training, torch.zeros(9, 64), {}).features(images)
    single = FittedScorer(network, torch.zeros(9, 64), {}).features(images[:1])
    torch.testing.assert_close(batch[:1], single, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("damage", ["missing", "truncated", "other network"])
def test_an_unreadable_scorer_is_one_clear_line(network, tmp_path, damage):
    FittedScorer.save(tmp_path, network if damage != "other network" else DigitScorer(width=8), torch.zeros(9, 64), {})
    path = tmp_path / "scorer.safetensors"
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"scorers: .*benchmarks\.digits_model\.build") as caught:
        FittedScorer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_wrong_pictures_or_prompts_are_refused(network):
    measures, prompts = digits_measures(FittedScorer(network, torch.zeros(9, 64), {})), prompts_of([Label(0, 0, 0)])
    with pytest.raises(UserError, match=r"images: shape \(1, 3, 64, 64\)"):
        measures.score(torch.zeros(1, 3, 64, 64), prompts)
    with pytest.raises(UserError, match="prompts: 1 of them for 2 images"):
        measures.score(torch.zeros(2, 3, 32, 32), prompts)
    for measure in measures.picture[:3]:
        with pytest.raises(UserError, match="prompt: 'a red fish' is none of the digits' sentences"):
            measure.score(torch.zeros(2, 3, 32, 32), [*prompts, "a red fish"])

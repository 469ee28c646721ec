"""Distances between feature sets against closed forms and brute force."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from selfnpo_fast.scoring import metrics
from selfnpo_fast.scoring.metrics import KnnSamples, frechet_distance, knn_samples

KNN = ("precision", "density", "recall", "coverage")


def with_moments(n: int, mean: torch.Tensor, root: torch.Tensor, seed: int) -> torch.Tensor:
    """Samples (n, D) float64 of mean `mean` and unbiased covariance root^T root, both exact."""
    raw = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q = torch.linalg.qr(raw - raw.mean(0)).Q
    return q * (n - 1) ** 0.5 @ root + mean


def cloud(n: int, d: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


def means(samples: KnnSamples) -> tuple[float, ...]:
    """Precision, density, recall, coverage: the means of their terms."""
    return tuple(getattr(samples, name).double().mean().item() for name in KNN)


def brute_force(generated: torch.Tensor, real: torch.Tensor, k: int) -> tuple[float, float, float, float]:
    """Precision, density, recall, coverage by the definitions, sample by sample."""

    def radius(points, i):
        return sorted(math.dist(points[i], points[j]) for j in range(len(points)) if j != i)[k - 1]

    g, r = generated.double().tolist(), real.double().tolist()
    radius_g, radius_r = [radius(g, i) for i in range(len(g))], [radius(r, i) for i in range(len(r))]
    hits = [[math.dist(x, y) <= radius_r[j] for j, y in enumerate(r)] for x in g]
    back = [[math.dist(x, y) <= radius_g[i] for i, x in enumerate(g)] for y in r]
    return (
        sum(map(any, hits)) / len(g),
        sum(map(sum, hits)) / (k * len(g)),
        sum(map(any, back)) / len(r),
        sum(any(row[j] for row in hits) for j in range(len(r))) / len(r),
    )


def test_frechet_of_commuting_gaussians_is_closed_form():
    mean_a, mean_b = torch.tensor([1.0, -2, 0, 3]).double(), torch.tensor([0.0, 1, 1, -1]).double()
    sd_a, sd_b = torch.tensor([1.0, 2, 0.5, 3]).double(), torch.tensor([2.0, 2, 1, 0]).double()
    a, b = with_moments(50, mean_a, sd_a.diag(), 0), with_moments(70, mean_b, sd_b.diag(), 1)
    expected = (mean_a - mean_b).square().sum() + (sd_a - sd_b).square().sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-12)


@given(st.integers(1, 12), st.integers(0, 10**6), st.floats(1e-3, 1e3))
@settings(max_examples=25, deadline=None)
def test_frechet_agrees_with_the_matrix_square_root(d, seed, scale):
    a, b = scale * cloud(d + 20, d, seed).double(), scale * (1.5 * cloud(d + 30, d, seed + 1, 0.3)).double()
    cov_a, cov_b = torch.cov(a.T).reshape(d, d).numpy(), torch.cov(b.T).reshape(d, d).numpy()
    root = sqrtm(cov_a @ cov_b).real
    expected = (a.mean(0) - b.mean(0)).square().sum().item() + (cov_a + cov_b - 2 * root).trace()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_frechet_of_a_set_to_itself_is_zero_even_when_singular():
    features = cloud(40, 64, 0)  # fewer samples than dimensions
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(features, features.flip(0)) == pytest.approx(0, abs=1e-10)
    constant = torch.ones(10, 3)
    assert frechet_distance(constant, constant + 2) == pytest.approx(12)


@given(
    st.integers(2, 5), st.integers(6, 40), st.integers(6, 40), st.integers(1, 4), st.floats(0, 2), st.integers(0, 99)
)
@settings(max_examples=40, deadline=None)
def test_knn_metrics_agree_with_brute_force(d, n, m, k, shift, seed):
    generated, real = cloud(n, d, seed, shift), cloud(m, d, seed + 1000)
    found = means(knn_samples(generated, real, k))
    assert found == pytest.approx(brute_force(generated, real, k), abs=1e-12)


def test_chunks_change_nothing(monkeypatch):
    generated, real = cloud(100, 8, 0, 0.5), cloud(130, 8, 1)
    whole = knn_samples(generated, real)
    monkeypatch.setattr(metrics, "CHUNK", 7)
    parts = knn_samples(generated, real)
    for name in KNN:
        assert torch.equal(getattr(whole, name), getattr(parts, name)), name


def test_identical_sets_overlap_fully():
    features = cloud(200, 16, 0)
    precision, density, recall, coverage = means(knn_samples(features, features))
    assert (precision, recall, coverage) == (1, 1, 1)
    # A sample lies in its ball and, on average, in those of k others.
    assert density == pytest.approx(1.2)


def test_disjoint_sets_do_not_overlap():
    assert means(knn_samples(cloud(60, 4, 0, 100.0), cloud(80, 4, 1))) == (0, 0, 0, 0)


def test_a_collapsed_model_is_precise_but_not_diverse():
    real = cloud(300, 4, 0)
    precision, _, recall, _ = means(knn_samples(0.05 * cloud(300, 4, 1), real))
    assert precision > 0.99
    assert recall < 0.1


def test_duplicates_lie_in_their_own_balls():
    features = torch.ones(12, 3)
    precision, _, recall, coverage = means(knn_samples(features, features))
    assert (precision, recall, coverage) == (1, 1, 1)


def test_there_is_one_term_per_sample():
    generated, real = cloud(50, 4, 0, 0.5), cloud(60, 4, 1)
    terms = knn_samples(generated, real)
    assert len(terms.precision) == len(terms.density) == 50
    assert len(terms.recall) == len(terms.coverage) == 60
    assert means(terms) == pytest.approx(brute_force(generated, real, 5), abs=1e-12)


@pytest.mark.parametrize(
    ("generated", "real", "k", "message"),
    [
        (torch.zeros(9, 4), torch.zeros(9, 5), 5, r"features: shapes \(9, 4\) and \(9, 5\)"),
        (torch.zeros(5, 4), torch.zeros(9, 4), 5, "features: 5 samples are too few; give at least 6"),
        (torch.full((9, 4), torch.nan), torch.zeros(9, 4), 5, "features: some are not finite"),
        (torch.zeros(9, 4), torch.zeros(9, 4), 0, "k: 0 is not possible"),
    ],
)
def test_impossible_input_is_refused(generated, real, k, message):
    with pytest.raises(ValueError, match=message):
        knn_samples(generated, real, k)

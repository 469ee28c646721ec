"""The counter-based noise against Random123's known answers and against chance."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from selfnpo_kernels import Draw, NoiseKey, draw_id, permute, philox, randint, uniform
from selfnpo_kernels.rng import normal

MASK = 0xFFFFFFFF

# kat_vectors of Random123: (counter, key) -> Philox4x32-10.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, (MASK, MASK), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(counter, key, expected):
    out = philox(tuple(torch.tensor(c) for c in counter), key[0] | key[1] << 32)
    assert tuple(int(word) for word in out) == expected


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


@given(
    seed=st.integers(0, 2**63 - 1),
    first=st.integers(0, 2**62),
    count=st.integers(1, 5),
    size=st.integers(1, 13),
)
def test_noise_does_not_depend_on_the_batch(seed, first, count, size):
    samples = torch.arange(first, first + count)
    draws = draw_id(Draw.RENOISE, torch.arange(count))
    whole = normal(NoiseKey(seed, samples, draws), (size,))
    for i in range(count):
        single = normal(NoiseKey(seed, samples[i : i + 1], draws[i : i + 1]), (size,))
        assert torch.equal(whole[i : i + 1], single)


def test_noise_does_not_depend_on_the_shape():
    key = NoiseKey(7, ids(3), 0)
    assert torch.equal(normal(key, (2, 3, 5)).flatten(), normal(key, (31,))[0, :30])


def test_float64_normals_have_the_same_uniforms():
    """Box-Muller in the wider type, from the same 24 bits."""
    key = NoiseKey(11, torch.arange(50) + 2**40, 3)
    narrow, wide = normal(key, (401,)), normal(key, (401,), torch.float64)
    assert narrow.dtype == torch.float32
    assert wide.dtype == torch.float64
    # Observed 9e-7: an angle of up to 2 pi, rounded to 24 bits, times a radius of up to 5.8.
    torch.testing.assert_close(narrow.double(), wide, rtol=0, atol=3e-6)


@given(seed=st.integers(-(2**63), 2**63 - 1), sample=st.integers(-(2**63), 2**63 - 1), draw=st.integers(0, 2**32 - 1))
def test_keys_are_64_bits_whatever_their_sign(seed, sample, draw):
    """A negative seed equals the unsigned seed of the same bits.

    One draw id for all samples equals one for each.
    """
    out = normal(NoiseKey(seed, ids(sample), draw), (5,))
    assert torch.equal(out, normal(NoiseKey(seed % 2**64, ids(sample), draw), (5,)))
    assert torch.equal(out, normal(NoiseKey(seed, ids(sample), ids(draw)), (5,)))
    assert torch.isfinite(out).all()


@given(seed=st.integers(0, 2**64 - 1), bit=st.integers(0, 63))
def test_every_bit_of_seed_and_id_counts(seed, bit):
    base = normal(NoiseKey(seed, ids(5), 1), (4,))
    other = 5 ^ 1 << bit if bit < 63 else 5 - 2**63
    assert not torch.equal(base, normal(NoiseKey(seed ^ 1 << bit, ids(5), 1), (4,)))
    assert not torch.equal(base, normal(NoiseKey(seed, ids(other), 1), (4,)))


def test_normals_are_normal():
    draws = normal(NoiseKey(1, torch.arange(64), draw_id(Draw.START_NOISE)), (4096,))
    assert stats.kstest(draws.flatten().numpy(), "norm").pvalue > 1e-3
    assert abs(draws.mean().item()) < 0.01
    assert abs(draws.var().item() - 1) < 0.01


def test_seed_id_and_draw_all_matter():
    base = normal(NoiseKey(5, ids(9), 0), (4096,))
    for other in (NoiseKey(6, ids(9), 0), NoiseKey(5 + 2**32, ids(9), 0), NoiseKey(5, ids(9 + 2**32), 0)):
        assert abs(torch.corrcoef(torch.cat([base, normal(other, (4096,))]))[0, 1].item()) < 0.08
    for kind in Draw:
        if kind is not Draw.START_NOISE:
            other = normal(NoiseKey(5, ids(9), draw_id(kind)), (4096,))
            assert abs(torch.corrcoef(torch.cat([base, other]))[0, 1].item()) < 0.08


def test_draw_ids_are_distinct():
    index = torch.arange(-1, 50)
    every = torch.cat([draw_id(kind, index) for kind in Draw])
    assert len(every.unique()) == len(every)


def test_uniform_and_randint_cover_their_range_evenly():
    samples = torch.arange(20_000)
    u = uniform(NoiseKey(2, samples, draw_id(Draw.PROMPT_DROPOUT)))
    assert u.min() >= 0
    assert u.max() < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
    counts = randint(NoiseKey(2, samples, draw_id(Draw.RENOISE_TIME)), 7).bincount(minlength=7)
    assert len(counts) == 7
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


@given(seed=st.integers(0, 2**64 - 1), high=st.integers(1, 2**31 - 1))
def test_randint_and_uniform_share_their_first_word(seed, high):
    """floor(high * bits / 2^32), and the upper 24 of those bits: exact for every `high`."""
    key = NoiseKey(seed, ids(1, 2, 3), 4)
    counter = (torch.zeros(3, dtype=torch.int64), ids(1, 2, 3), ids(0, 0, 0), ids(4, 4, 4))
    words = [int(word) for word in philox(counter, seed)[0]]
    assert randint(key, high).tolist() == [word * high >> 32 for word in words]
    assert uniform(key).tolist() == [(word >> 8) / 2**24 for word in words]
    highs = ids(high, 1, 2)
    assert randint(key, highs).tolist() == [word * h >> 32 for word, h in zip(words, highs.tolist(), strict=True)]


@given(size=st.integers(1, 2**31 - 1), key=st.integers(0, 2**64 - 1), epoch=st.integers(-3, 2**40))
def test_permute_stays_in_range_and_apart(size, key, epoch):
    """For sizes that no table could hold: neighbours at both ends stay in range, and distinct."""
    position = torch.tensor(sorted({*range(min(size, 5)), *range(max(0, size - 5), size)}))
    out = permute(position, size, key, torch.full_like(position, epoch))
    assert 0 <= out.min()
    assert out.max() < size
    assert len(out.unique()) == len(position)


@given(size=st.integers(1, 300), key=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**40))
def test_permute_is_a_permutation(size, key, epoch):
    out = permute(torch.arange(size), size, key, torch.full((size,), epoch))
    assert sorted(out.tolist()) == list(range(size))


def test_permute_mixes_well():
    """Over many epochs every position gets all numbers equally often; neighbours are separated."""
    size, epochs = 23, 2000
    epoch = torch.arange(epochs).repeat_interleave(size)
    table = permute(torch.arange(size).repeat(epochs), size, 99, epoch).view(epochs, size)
    for position in (0, 7, 22):
        assert stats.chisquare(table[:, position].bincount(minlength=size).numpy()).pvalue > 1e-3
    follows = (table[:, 1:] - table[:, :-1] == 1).float().mean().item()
    assert abs(follows - 1 / size) < 0.01
    one = torch.zeros(100, dtype=torch.int64)
    assert permute(torch.arange(100), 100, 1, one).tolist() != permute(torch.arange(100), 100, 2, one).tolist()

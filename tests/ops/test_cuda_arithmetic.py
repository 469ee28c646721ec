"""The CUDA column of tests/helpers/tolerances.py, derived without a GPU.

First, which approximate instructions the PTX of each kernel holds. Then, how far results can be off
if these instructions err by all that the PTX ISA allows: emulated.py computes as the kernels do,
and the tests measure its errors as the tests of the ops measure theirs.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys

import cases
import emulated
import exact
import numpy as np
import pytest
import test_x0_loss
import torch
from cases import BF16, F16, F32, worst_error
from emulated import Choice, F, choices, fma, two_products
from tolerances import tolerance

from selfnpo_kernels import aot

SQRT, DIV = emulated.DOCUMENTED
# The approximate instructions of each call of aot.FLOORS; the others have none.
APPROXIMATE = {
    "normal": {SQRT},
    "affine_noise": {SQRT},
    "affine_noise, a row and a draw for each": {SQRT},
    "guided_step, x0_prev and noise": {SQRT},
    "guided_step, everything": {SQRT},
    "tdft_step, from noise": {SQRT},
    "tdft_step, unconditional": {SQRT},
    "tdft_step, naive": {SQRT},
    "tdft_step, from data": {SQRT},
    "x0_loss, huber": {SQRT, DIV},
    "x0_loss, no slope": {SQRT, DIV},
}
# What takes subnormal numbers for zero: the square root, and the fused operations of libdevice's
# logarithm. The emulation meets no subnormal number in either.
FLUSHING = {"sqrt.approx.ftz.f32", "fma.rn.ftz.f32"}
LISTING = """
import re
from selfnpo_kernels import aot
from selfnpo_kernels.triton import common
for mixture in ("fp32", "bf16"):
    for call in aot.FLOORS:
        with common.recorded() as launches:
            aot.calls(*aot.MIXTURES[mixture], *aot.SHAPES["common"])[call]()
        for kernel, arguments, options in launches:
            ptx = aot.compiled(kernel, arguments, options, 90).asm["ptx"]
            found = set(re.findall(r"^\\s*(?:@!?%p\\d+ )?([a-z][a-z0-9_]*(?:\\.[\\w:]+)*)\\s", ptx, re.MULTILINE))
            log = ",".join(sorted(set(re.findall(r"0f(" + LOG + ")", ptx))))
            print(call, kernel.__name__, " ".join(sorted(found)), log, sep="|")
"""


@functools.cache
def instructions() -> list[tuple[str, str, set[str], set[str]]]:
    """(call, kernel, opcodes, constants of the logarithm) of the kernels, compiled for sm_90."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    constants = "|".join((*emulated.LOG_BITS, emulated.LN2_BITS))
    code = f"LOG = {constants!r}" + LISTING
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines()]
    return [(call, kernel, set(found.split()), set(filter(None, log.split(",")))) for call, kernel, found, log in rows]


def test_approximate_instructions_are_those_of_the_derivation():
    """Whatever does not round to nearest; without .ftz, which follows below."""
    found: dict[str, set[str]] = {}
    for call, _, opcodes, _ in instructions():
        inexact = {name for name in opcodes if re.search(r"\.(approx|full|rz|rm|rp)\b.*\.b?f(16|32|64)", name)}
        found.setdefault(call, set()).update(name.replace(".ftz", "") for name in inexact)
        assert {name for name in opcodes if ".ftz" in name} <= FLUSHING
    assert set(found) == set(aot.FLOORS)
    assert {call: names for call, names in found.items() if names} == APPROXIMATE


def test_the_logarithm_is_the_one_that_is_emulated():
    """All constants of the emulated __nv_logf are in the PTX of every kernel that draws normals."""
    whole = {*emulated.LOG_BITS, emulated.LN2_BITS}
    draws = [call for call, names in APPROXIMATE.items() if names == {SQRT}]
    found = {(call, kernel): constants for call, kernel, _, constants in instructions() if call in draws}
    assert len(found) == len(draws)
    assert all(constants == whole for constants in found.values())
    assert not any(constants == whole for call, _, _, constants in instructions() if call not in draws)


def test_the_emulated_logarithm_is_within_its_documented_ulp():
    """One ulp by CUDA's programming guide, near 1 and near 0, too."""
    ends = np.arange(1, 2**16)
    for kept in (ends, 2**24 - ends, np.random.default_rng(0).integers(1, 2**24, 10**5)):
        u = F(kept) * F(2.0**-24)
        value = np.log(np.float64(u))
        assert np.max(np.abs(emulated.log(u) - value) / np.spacing(np.abs(F(value)))) < 0.9


def test_without_errors_of_instructions_the_emulation_is_the_interpreter():
    """The same normals as the kernels' in the interpreter, but for the fused operations."""
    words = emulated.random_words(0, 10**4)
    values, sizes = emulated.normal_sizes(words)
    found = torch.from_numpy(emulated.box_muller(words, Choice()))
    assert worst_error(found, values, sizes) <= tolerance("normal", "triton", "fp32")


# The derivations: the largest error of each op


@functools.cache
def hard_words() -> np.ndarray:
    """(n, 2) uint32: awkward words, and those whose radius or angle errs most of many."""
    rng = np.random.default_rng(1)
    out = [emulated.awkward_words()[::3]]
    radius = rng.integers(0, 2**24, 2**18, dtype=np.uint32) << np.uint32(8)
    angle = rng.integers(0, 2**20, 2**18, dtype=np.uint32) << np.uint32(8)
    for side in (-1, 1):
        straight = np.stack([radius, np.zeros_like(radius)], axis=-1)
        turned = np.stack([np.full_like(angle, 2**31), angle], axis=-1)
        errors = []
        for words, choice in ((straight, Choice(sqrt=side)), (turned, Choice())):
            values, sizes = emulated.normal_sizes(words)
            errors.append((side * (np.abs(emulated.box_muller(words, choice)) - np.abs(values)) / sizes).max(1))
        worst = radius[np.argsort(errors[0])[-150:]], angle[np.argsort(errors[1])[-150:]]
        out.append(np.stack(np.meshgrid(*worst), axis=-1).reshape(-1, 2))
    return np.concatenate(out)


@functools.cache
def hard_normals(sqrt: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(emulated float32, exact, sizes), each (n,), of `hard_words`."""
    values, sizes = emulated.normal_sizes(hard_words())
    return emulated.box_muller(hard_words(), Choice(sqrt=sqrt)).ravel(), values.ravel(), sizes.ravel()


def error(found: np.ndarray, terms: tuple[np.ndarray, np.ndarray]) -> float:
    return worst_error(torch.from_numpy(found), *terms)


def numbers(seed: int, size, *scales: float) -> list[np.ndarray]:
    """A float32 array of normals for each scale."""
    rng = np.random.default_rng(seed)
    return [F(scale * rng.standard_normal(size)) for scale in scales]


def linear(*terms: tuple) -> tuple[np.ndarray, np.ndarray]:
    """`exact.linear` of float32 (coefficient, value) or (coefficient, value, size)."""
    return exact.linear(*((np.float64(k), np.float64(v), np.float64(s[0] if s else v)) for k, v, *s in terms))


def of_normal() -> float:
    return max(error(z, terms) for z, *terms in map(hard_normals, (-1, 1)))


def of_affine_noise() -> float:
    worst = 0.0
    for choice in choices(sqrt=True):
        z, *terms = hard_normals(choice.sqrt)
        for i, scale in enumerate((0.0, 1e-3, 1.0, 1e3)):
            x, k0, k1 = numbers(i, z.shape, scale, 1, 1)
            worst = max(worst, error(two_products(choice, k0, x, k1, z), linear((k0, x), (k1, *terms))))
    return worst


def guided(pos, neg, w, scale) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """(p as kernels compute it, its exact (value, size))."""
    p, pd, nd, wd = fma(w, pos - neg, pos), np.float64(pos), np.float64(neg), np.float64(w)
    s = np.float64(scale)
    size = np.abs(pd) + np.abs(wd) * (np.abs(pd) + np.abs(nd))
    return p * scale, (s * ((1 + wd) * pd - wd * nd), np.abs(s) * size)


def of_guided_step(noise: bool = True) -> float:
    worst = 0.0
    for choice in choices(sqrt=noise):
        z, *terms = hard_normals(choice.sqrt or 1)
        for i, size in enumerate((1e-3, 1.0)):
            pos, neg, x, previous, earlier, scale = numbers(i, z.shape, size, size, size, size, size, 1)
            k2, k3, k4, k5, w, k7 = numbers(10 + i, z.shape, 1, 1, 1, 1, 3, 1)
            p, exact_p = guided(pos, neg, w, scale)
            out = fma(k7, earlier, fma(k4, previous, two_products(choice, k2, x, k3, p)))
            expected = [(k2, x), (k3, *exact_p), (k4, previous), (k7, earlier)]
            if noise:
                out, expected = fma(k5, z, out), [*expected, (k5, *terms)]
            worst = max(worst, error(out, linear(*expected)))
    return worst


def of_tdft_step() -> float:
    """x_s by Eq. 15, which is the longest chain of an op: guidance, x0, and its noise."""
    worst = 0.0
    for choice in choices(sqrt=True):
        z, *terms = hard_normals(choice.sqrt)
        for i, size in enumerate((1e-3, 1.0)):
            pos, neg, x, k0, k1, r0, r1 = numbers(20 + i, z.shape, size, size, size, 1, 1, 1, 1)
            p, exact_p = guided(pos, neg, F(2.5), F(1))
            x0, exact_x0 = two_products(choice, k0, x, k1, p), linear((k0, x), (k1, *exact_p))
            worst = max(worst, error(x0, exact_x0))
            noised = two_products(choice, r0, x0, r1, z)
            worst = max(worst, error(noised, linear((r0, *exact_x0), (r1, *terms))))
    return worst


def of_tdft_run() -> float:
    """The states of five steps from drawn noise, each noised again, as in test_whole_runs."""
    worst = 0.0
    for choice in choices(sqrt=True):
        z, *terms = hard_normals(choice.sqrt)
        x, exact_x = z, tuple(terms)
        rng = np.random.default_rng(3)
        for step in range(5):
            k2, k3, r0, r1 = F(0.4 + 0.5 * rng.random((4, 1)))
            # The network sees the state as it is, so that its outputs are exact; without guidance
            # they are smallest.
            p = F(np.tanh(x + F(0.1) * F(step)))
            x, exact_x = two_products(choice, k2, x, k3, p), linear((k2, *exact_x), (k3, p))
            drawn = rng.permutation(len(z))
            noised = two_products(choice, r0, x, r1, z[drawn])
            worst = max(worst, error(noised, linear((r0, *exact_x), (r1, *(t[drawn] for t in terms)))))
    return worst


UPSTREAM = F(-0.37)


def factors(k1: np.ndarray, weight: np.ndarray, elements: int) -> np.ndarray:
    """What the slopes of a sample are multiplied by, as x0_loss_backward computes it."""
    return k1 * weight * UPSTREAM / F(elements)


def loss_inputs(seed: int, shape: tuple[int, int], network: torch.dtype, state: torch.dtype) -> tuple:
    """(pred, x_s, target, weight, k): differences of all sizes, many of which cancel.

    They stay above 1e-5 of what cancels: below it the square of a rounding shows in the loss, which
    no unit of the table holds. Of 16 weights each sample has the one whose factor rounds worst.
    """
    rng = np.random.default_rng(seed)
    pred, x_s, far = cases.draw(seed, shape, shape, shape)
    (k,) = cases.draw(seed + 1, (shape[0], 2))
    pred, x_s = pred.to(network), x_s.to(state)
    terms = k[:, :1] * x_s.float(), k[:, 1:] * pred.float()
    size = torch.from_numpy(F(10.0 ** rng.uniform(-5, 2, (shape[0], 1)) * rng.choice([-1, 1], (shape[0], 1))))
    close = sum(terms) + size * (terms[0].abs() + terms[1].abs())
    target = torch.where(torch.arange(shape[0])[:, None] % 2 == 0, far, close if state == F32 else far).to(state)
    weights, k1 = F(0.1 + rng.random((shape[0], 16))), k[:, 1:].numpy()
    relative = factors(k1, weights, pred.numel()) / (
        np.float64(k1) * np.float64(weights) * np.float64(UPSTREAM) / pred.numel()
    )
    outward = np.where(np.arange(shape[0])[:, None] % 4 < 2, relative, -relative)
    weight = np.take_along_axis(weights, outward.argmax(1)[:, None], axis=1)[:, 0]
    return pred, x_s, target, torch.from_numpy(weight), k


def emulated_loss(choice: Choice, pred, x_s, target, weight, k, c: float, kind: str):
    """(loss, samples, slope in pred's dtype, gradient) as the kernels compute them."""
    state, output, goal, weights = (t.float().numpy() for t in (x_s, pred, target, weight))
    k0, k1 = k.numpy().T[..., None]
    d = two_products(choice, k0, state, k1, output) - goal
    if kind == "huber":
        root = emulated.sqrt_approx(fma(d, d, F(c) * F(c)), choice.sqrt)
        losses = emulated.div_full(d * d, root + F(c), choice.div)
        slope = emulated.div_full(d, root, choice.other_div)
    else:
        losses, slope = d * d, F(2) * d
    samples = emulated.total(losses) / F(d.shape[1])
    loss = emulated.total(samples * weights) / F(len(d))
    slope = torch.from_numpy(slope).to(pred.dtype)
    factor = factors(k1[:, 0], weights, d.size)
    gradient = torch.from_numpy(factor[:, None] * slope.float().numpy()).to(pred.dtype)
    return torch.tensor(loss), torch.from_numpy(samples), slope, gradient


@functools.cache
def of_x0_loss() -> tuple[float, float]:
    """The largest errors of the loss and of the gradient."""
    worst = [0.0, 0.0]
    runs = [(F32, F32, (40_000, 1)), (BF16, F32, (5000, 1)), (F16, F16, (5000, 1)), (F32, F32, (2000, 3)),
            (F32, F32, (4, 2085))]  # fmt: skip
    for i, (network, state, shape) in enumerate(runs):
        inputs = loss_inputs(3 * i, shape, network, state)
        each = cases.wide(inputs[4])
        for kind, c in (("huber", 1e-3), ("huber", 0.1), ("l2", 1e-3)):
            by_hand = test_x0_loss.by_hand(*inputs[:4], each, kind, c)
            gradient = test_x0_loss.gradient_by_hand(
                by_hand, inputs[0], inputs[3], cases.wide(inputs[4]), float(UPSTREAM)
            )
            for choice in choices(sqrt=kind == "huber", divisions=2 * (kind == "huber")):
                if choice.div != choice.other_div:
                    continue  # they reach different results
                loss, samples, slope, found = emulated_loss(choice, *inputs, c, kind)
                values = worst_error(loss, *by_hand["loss"]), worst_error(samples, *by_hand["samples"])
                worst[0] = max(worst[0], *values)
                slopes = worst_error(slope, *by_hand["slope"]), worst_error(found, *gradient, roundings=2)
                worst[1] = max(worst[1], *slopes)
    return worst[0], worst[1]


def of_ema_update() -> float:
    worst = 0.0
    for decay in (0.0, 0.3, 0.5, 0.9, 0.999, 0.9999, 1.0):
        old, new = numbers(30, 10**5, 1, 1)
        d = new - old
        out = fma(F(1 - decay), d, old) if F(1 - decay) < 0.5 else fma(F(-decay), d, new)
        value, _ = linear((decay, old), (1 - decay, new))
        terms = np.abs(value) + (1 - decay) * (np.abs(np.float64(old)) + np.abs(np.float64(new)))
        worst = max(worst, error(out, (value, terms)))
    return worst


def of_guidance_rescale() -> float:
    """Of one block, with means up to a thousand times the deviation, except of two elements."""
    worst = 0.0
    for i, (samples, count) in enumerate(((5000, 2), (3000, 3), (2000, 60), (100, 2048))):
        for offset in (0.0, 10.0, 1000.0) if count > 2 else (0.0,):
            pos, neg = (F(offset) + a for a in numbers(40 + i, (samples, count), 1, 1))
            (w,) = numbers(50, (samples, 1), 4)
            p, (value, size) = guided(pos, neg, w, F(1))
            squares = []
            for values in (pos, p):
                deviation = values - (emulated.total(values) / F(count))[:, None]
                squares.append(emulated.total(deviation * deviation))
            deviations = np.float64(pos).std(1, ddof=1), value.std(1, ddof=1)
            ratio = deviations[0] / deviations[1]
            noise = np.sqrt((size**2).mean(1) / count) / deviations[1]
            for phi in (0.3, 1.0):
                out = fma(F(phi), np.sqrt(squares[0] / squares[1]), F(1 - phi))
                worst = max(worst, error(out, (phi * ratio + 1 - phi, 1 + ratio * (1 + noise))))
    return worst


DERIVED = {
    "normal": of_normal,
    "affine_noise": of_affine_noise,
    "guided_step": of_guided_step,
    "tdft_step": of_tdft_step,
    "tdft_step run": of_tdft_run,
    "x0_loss": lambda: of_x0_loss()[0],
    "x0_loss gradient": lambda: of_x0_loss()[1],
}


@pytest.mark.parametrize("op", DERIVED)
def test_the_column_is_what_the_instructions_allow(op):
    """No smaller than the largest error of the emulation, and at most 15% larger."""
    worst, column = DERIVED[op](), tolerance(op, "triton", "fp32", "cuda")
    assert worst <= column <= 1.15 * worst, f"{op}: {worst:.3f} emulated, {column} in the table"


@pytest.mark.parametrize(
    ("op", "derived"),
    [
        ("guidance_rescale", of_guidance_rescale),
        ("ema_update", of_ema_update),
        ("guided_step", lambda: of_guided_step(noise=False)),
    ],
    ids=("guidance_rescale", "ema_update", "guided_step without noise"),
)
def test_fused_products_alone_need_no_column(op, derived):
    """Correct roundings that are fused elsewhere than on CPUs stay within the CPUs' tolerance."""
    assert 0 < derived() <= tolerance(op, "triton", "fp32")


def test_the_column_is_for_compiled_kernels_only():
    for op in DERIVED:
        assert tolerance(op, "triton", "fp32", "cuda") > tolerance(op, "triton", "fp32", "cpu")
        assert tolerance(op, "reference", "fp32", "cuda") == tolerance(op, "reference", "fp32")

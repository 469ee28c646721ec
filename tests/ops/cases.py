"""Backends, dtype mixtures, shapes and tensors for the tests of the ops, and the error measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import exact
import numpy as np
import pytest
import torch
from tolerances import tolerance

from selfnpo_kernels import NoiseKey

BACKENDS = ("reference", "cpp", "triton")
# The same as parameters of tests. What is not part of a grid runs on a GPU first, too.
MARKED_BACKENDS = ("reference", "cpp", pytest.param("triton", marks=pytest.mark.gpu_core))
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
UNIT = {BF16: 2.0**-8, F16: 2.0**-11, F32: 2.0**-24, F64: 2.0**-53}
HALF_SUBNORMAL = {F16: 2.0**-25}  # half a step near zero, where it matters
# Both words of the key are in use, and SEED + 1 is below 2^63.
SEED = 2**63 - 3 * 2**33 + 12345


@dataclass(frozen=True)
class Mixture:
    """The dtypes of network outputs and of states."""

    name: str
    network: torch.dtype
    state: torch.dtype


FLOAT32 = Mixture("fp32", F32, F32)
MIXTURES = (
    FLOAT32,
    Mixture("bf16-outputs", BF16, F32),
    Mixture("fp16-outputs", F16, F32),
    Mixture("bf16", BF16, BF16),
    Mixture("fp16", F16, F16),
    Mixture("crossed", F32, BF16),
)
FLOAT64 = Mixture("fp64", F64, F64)  # served by the reference only
EVERY_MIXTURE = tuple(Mixture("any", network, state) for network in (F32, BF16, F16) for state in (F32, BF16, F16))
# B, C, H, W and B, F, C, H, W; no size is a multiple of a vector.
IMAGE, VIDEO = (3, 4, 5, 7), (2, 3, 4, 5, 3)
BLOCKS = (2, 2085)  # more than one block of every kernel, the last of them ragged
SHAPES = (IMAGE, VIDEO, (1, 1), (1, 2), (5, 63), (257, 4), BLOCKS, (2, 4, 64, 64), (3000, 3), (2, 67))
# Every mixture runs these in Triton's interpreter.
INTERPRETED = (IMAGE, (2, 67))
INTERPRETED_IN_FLOAT32 = (VIDEO, (1, 1), (1, 2), (5, 63), (40, 3), BLOCKS, (2, 4, 64, 64))


# Whether Triton's kernels are compiled, and run on the GPU; recorded_launches.py sets it, too.
COMPILED = torch.cuda.is_available()


def device(backend: str) -> str:
    """The device of the tensors in a backend's tests."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def interpreted(backend: str) -> bool:
    """Whether a backend's tests run in Triton's interpreter, which takes about 10 ms a program."""
    return backend == "triton" and not COMPILED


# The shapes of `gpu_core`: no multiple of a vector, five dimensions, less than a vector, several
# blocks with the last one ragged, and whole blocks only.
CORE = {"odd": IMAGE, "five-dimensional": VIDEO, "few": (1, 2), "ragged": BLOCKS, "whole": (2, 4, 64, 64)}


def core_marks(backend: str, mixture: Mixture, shape: tuple[int, ...], variant: int = 0, variants: int = 1) -> list:
    """[the mark gpu_core] for Triton's tests of these parameters that belong to it, [] for others.

    Every shape of `CORE` does for every mixture, with one of the test's variants by turns.
    """
    if backend != "triton" or shape not in CORE.values():
        return []
    turn = MIXTURES.index(mixture) + list(CORE.values()).index(shape)
    return [pytest.mark.gpu_core] if turn % variants == variant else []


def grid(*, least: int = 1, variants: tuple = ()) -> list:
    """Parameters (backend, mixture, shape) and, if given, a variant; `least` elements a sample."""
    out = []
    for backend in BACKENDS:
        for mixture in MIXTURES:
            shapes = INTERPRETED if interpreted(backend) else SHAPES
            if interpreted(backend) and mixture is FLOAT32:
                shapes += INTERPRETED_IN_FLOAT32
            for shape in shapes:
                if np.prod(shape[1:]) < least:
                    continue
                slow = [pytest.mark.slow] if interpreted(backend) and np.prod(shape) > 10_000 else []
                name = f"{backend}-{mixture.name}-{'x'.join(map(str, shape))}"
                for i, variant in enumerate(variants or (None,)):
                    marks = slow + core_marks(backend, mixture, shape, i, max(1, len(variants)))
                    more, suffix = ((variant,), f"-{variant}") if variants else ((), "")
                    out.append(pytest.param(backend, mixture, shape, *more, id=name + suffix, marks=marks))
    return out


def some_slow(values, quick: tuple) -> list:
    """Parameters (backend, value); under the interpreter all but those in `quick` are slow."""
    out = []
    for backend in BACKENDS:
        for value in values:
            marks = [pytest.mark.gpu_core] if backend == "triton" else []
            if interpreted(backend) and value not in quick:
                marks.append(pytest.mark.slow)
            out.append(pytest.param(backend, value, id=f"{backend}-{value}", marks=marks))
    return out


def over_grid(*, least: int = 1, **variants: tuple):
    """Run a test for every backend, mixture and shape, under that backend.

    variants: at most one more parameter of the test, with its values.
    """
    values = grid(least=least, variants=next(iter(variants.values()), ()))
    return pytest.mark.parametrize(("backend", "mixture", "shape", *variants), values, indirect=["backend"])


def draw(seed: int, *sizes: tuple[int, ...], dtype: torch.dtype = F32, on: str = "cpu") -> list[torch.Tensor]:
    """Standard normal tensors, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator, dtype=F64).to(dtype).to(on) for size in sizes]


def key(batch: int, on: str = "cpu", seed: int = SEED, per_sample: bool = True) -> NoiseKey:
    """A noise key with negative ids and ids beyond 2^32; draws beyond 2^31, or one draw for all."""
    ids = torch.arange(batch, dtype=torch.int64) * 0x1_2345_6789 - 5
    draws = (torch.arange(batch) % 7 * 0x2345_6789).to(on) if per_sample else 0x9ABC_DEF0
    return NoiseKey(seed, ids.to(on), draws)


def wide(tensor: torch.Tensor | None) -> np.ndarray | None:
    """A copy in float64."""
    return None if tensor is None else tensor.detach().cpu().to(F64, copy=True).numpy()


def rows(k: torch.Tensor, index: torch.Tensor | None, batch: int) -> np.ndarray:
    """Each sample's row of a coefficient table."""
    table = wide(k)
    return table[index.cpu().numpy()] if index is not None else np.broadcast_to(table, (batch, table.shape[1]))


def tables(seed: int, batch: int, columns: int, on: str = "cpu") -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """The three ways to give coefficients.

    They are a row for each sample, an index into another number of rows, and one row for all
    samples.
    """
    each, some, one = draw(seed, (batch, columns), (5, columns), (1, columns), on=on)
    yield each, None
    yield some, (torch.arange(batch, dtype=torch.int64) * 3 % 5).to(on)
    yield one, None


def large(backend: str) -> tuple[int, ...]:
    """A shape that several threads share; a smaller one for the interpreter."""
    return (3, 70) if interpreted(backend) else (3, 4, 96, 100)


def assert_repeatable(call: Callable[[], tuple[torch.Tensor, ...]]) -> None:
    """Bit-equal results of the same call, with one thread and with two."""
    threads, first = torch.get_num_threads(), call()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for a, b in zip(first, call(), strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)


def noise_terms(noise: torch.Tensor | NoiseKey, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(values, sizes), each (B, ...), of a noise tensor or of the normals of a key."""
    if not isinstance(noise, NoiseKey):
        return wide(noise), wide(noise)
    draws = noise.draws.cpu() if isinstance(noise.draws, torch.Tensor) else noise.draws
    return exact.sized_normals(noise.seed, noise.sample_ids.cpu(), draws, tuple(shape[1:]))


# (op, backend) -> the largest error seen, in the unit of `tolerances.py`.
OBSERVED: dict[tuple[str, str], float] = {}


def observe(op: str, backend: str, worst: float) -> None:
    """Keep an error for the summary, if it is the largest."""
    OBSERVED[op, backend] = max(OBSERVED.get((op, backend), 0.0), worst)


def worst_error(
    out: torch.Tensor, exact: np.ndarray, terms: np.ndarray, *, roundings: int = 1, arithmetic: torch.dtype = F32
) -> float:
    """The largest error of `out`, in the unit of `tolerances.py`.

    `out` is `exact`, rounded `roundings` times to its dtype. The arithmetic before it may have
    rounded terms of the sizes `terms`.
    """
    assert tuple(out.shape) == exact.shape
    if exact.size == 0:
        return 0.0
    bound = HALF_SUBNORMAL.get(out.dtype, 0.0)
    if out.dtype not in (F32, F64):
        bound = bound + roundings * UNIT[out.dtype] * np.abs(exact)
    excess = np.abs(wide(out) - exact) - bound
    unit = np.maximum(UNIT[arithmetic] * terms, 1e-300)
    ratio = np.where(excess > 0, excess, 0) / np.where(excess > 0, unit, 1)
    return float(ratio.max()) if np.isfinite(excess).all() else float("inf")


def assert_rounded(
    op: str, backend: str, mixture: Mixture, out: torch.Tensor, exact: np.ndarray, terms: np.ndarray, *, roundings=1
) -> None:
    """The error of `out` is at most the op's tolerance; see `worst_error`.

    The largest error is kept for the summary.
    """
    arithmetic = F64 if mixture is FLOAT64 else F32
    worst = worst_error(out, exact, terms, roundings=roundings, arithmetic=arithmetic)
    observe(op, backend, worst)
    allowed = tolerance(op, backend, mixture.name, out.device.type)
    assert worst <= allowed, f"{op}, {backend}, {mixture.name}: {worst:.3g} where {allowed} is allowed"

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
SHAPES = (IMAGE, VIDEO, (1, 1), (1, 2), (5, 63), (257, 4), BLOCKS, (2, 4, 64, 64), (3000, 3))
# Every mixture runs these in Triton's interpreter, which takes about 10 ms for a program.
INTERPRETED = (IMAGE, (2, 67))
INTERPRETED_IN_FLOAT32 = (VIDEO, (1, 1), (1, 2), (5, 63), (40, 3), BLOCKS, (2, 4, 64, 64))


def device(backend: str) -> str:
    """The device of the tensors in a backend's tests."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def grid(*, least: int = 1) -> list:
    """Parameters (backend, mixture, shape), `least` elements a sample."""
    out = []
    for backend in BACKENDS:
        interpreted = backend == "triton" and device(backend) == "cpu"
        for mixture in MIXTURES:
            shapes = INTERPRETED if interpreted else (*SHAPES, (2, 67))
            if interpreted and mixture is FLOAT32:
                shapes += INTERPRETED_IN_FLOAT32
            for shape in shapes:
                if np.prod(shape[1:]) < least:
                    continue
                marks = pytest.mark.slow if interpreted and np.prod(shape) > 10_000 else ()
                name = f"{backend}-{mixture.name}-{'x'.join(map(str, shape))}"
                out.append(pytest.param(backend, mixture, shape, id=name, marks=marks))
    return out


def some_slow(values, quick: tuple) -> list:
    """Parameters (backend, value); under the interpreter all but those in `quick` are slow."""

    def slow(backend: str, value) -> bool:
        return backend == "triton" and device(backend) == "cpu" and value not in quick

    return [
        pytest.param(backend, value, id=f"{backend}-{value}", marks=pytest.mark.slow if slow(backend, value) else ())
        for backend in BACKENDS
        for value in values
    ]


def over_grid(**options):
    """Run a test for every backend, mixture and shape, under that backend."""
    return pytest.mark.parametrize(("backend", "mixture", "shape"), grid(**options), indirect=["backend"])


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
    return (3, 70) if backend == "triton" and device(backend) == "cpu" else (3, 4, 96, 100)


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
    OBSERVED[op, backend] = max(OBSERVED.get((op, backend), 0.0), worst)
    allowed = tolerance(op, backend, mixture.name, out.device.type)
    assert worst <= allowed, f"{op}, {backend}, {mixture.name}: {worst:.3g} where {allowed} is allowed"

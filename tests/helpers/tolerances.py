"""How far an op may be from its float64 formula, in one table.

The unit is one float32 rounding (2^-24; 2^-53 in float64) of the sum of the absolute values of a
formula's terms. For results of lower precision it counts beyond the rounding to their dtype (two
for gradients: the slope is kept in that dtype). All backends and mixtures share that arithmetic, so
most ops have one row. `pytest tests/ops -v` prints what is seen, and so does every run on a GPU.
"""

from __future__ import annotations

ANY = None
_TABLE = [
    # op, backends, mixtures, tolerance    # largest observed, 1,500 hypothesis cases included: reference, cpp, triton
    ("normal", ANY, ANY, 3),  # 2.1, 1.6, 2.6
    ("affine_noise", ANY, ANY, 5),  # 3.0, 3.3, 3.0
    ("guidance_rescale", ANY, ANY, 4),  # 2.3, 2.5, 0.8
    ("guided_step", ANY, ANY, 5),  # 3.8, 3.2, 3.2
    ("tdft_step", ANY, ANY, 5),  # 3.2, 2.8, 3.2
    ("tdft_step run", ANY, ANY, 4),  # 2.1, 1.5, 2.1: some 15 steps one after another
    ("x0_loss", ANY, ANY, 4),  # 1.7, 2.2, 1.0
    ("x0_loss gradient", ("reference", "triton"), ANY, 6),  # 4.4, 3.3
    ("x0_loss gradient", ("cpp",), ANY, 7),  # 4.7
    ("ema_update", ANY, ANY, 3),  # 1.7, 1.7, 2.1
]

# Triton on CUDA tensors, where square roots and divisions are approximate instructions.
# tests/ops/test_cuda_arithmetic.py derives each number: the largest error of an emulation in which
# all of these instructions err by as much as the PTX ISA allows, and at most 15% more. The other
# ops hold nothing approximate, and have the rows above.
_CUDA = {
    # op: tolerance  # largest error of the emulation
    "normal": 4.3,  # 4.06
    "affine_noise": 6.2,  # 5.56
    "guided_step": 5.2,  # 4.73
    "tdft_step": 6.2,  # 5.59
    "tdft_step run": 5.6,  # 5.16
    "x0_loss": 4.5,  # 4.06
    "x0_loss gradient": 9.8,  # 8.74
}


def tolerance(op: str, backend: str, mixture: str, device: str = "cpu") -> float:
    """The tolerance of an op's result; KeyError where the table has none.

    device: of the result, cpu or cuda.
    """
    if device == "cuda" and backend == "triton" and op in _CUDA:
        return _CUDA[op]
    for name, backends, mixtures, value in _TABLE:
        if name == op and (backends is ANY or backend in backends) and (mixtures is ANY or mixture in mixtures):
            return value
    raise KeyError(f"no tolerance for {op}, {backend}, {mixture}")

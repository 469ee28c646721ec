"""The machine code of the Triton kernels, without a GPU; and whether a bad kernel is noticed.

Everything that compiles runs in another process: this one may have imported Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from selfnpo_kernels import aot, machine_code
from selfnpo_kernels.schemas import SCHEMAS

# (bytes an element, more for samples that restart), counted by hand from the contracts of ops.py.
BY_HAND = {
    ("affine_noise", "fp32"): (8, 0),
    ("guidance_rescale", "bf16/fp32"): (4, 0),
    ("guided_step", "bf16/fp32"): (16, 0),
    ("guided_step, x0_prev and noise", "bf16/fp32"): (20, 0),
    ("guided_step, everything", "bf16/fp32"): (24, 0),
    ("tdft_step, from noise", "bf16/fp32"): (20, 8),
    ("x0_loss, huber", "bf16/fp32"): (12, 0),
    ("x0_loss_backward", "bf16/fp32"): (4, 0),
    ("ema_update", "bf16/fp32"): (12, 0),
    ("guidance_rescale", "bf16"): (4, 0),
    ("x0_loss_backward", "bf16"): (4, 0),
    ("ema_update", "bf16"): (12, 0),
    ("guided_step", "fp32"): (20, 0),
    ("tdft_step, from noise", "bf16"): (12, 4),
}

# The most registers of a thread on sm_90 in a common case, in the units of 8 in which a GPU gives
# them out: what a call does not take, such as x0_prev2, costs it none.
REGISTERS = {
    "guided_step": 40,
    "guided_step, one branch": 40,
    "guided_step, x0_prev and noise": 48,
    "guided_step, everything": 56,
    "guidance_rescale": 56,
    "tdft_step, from noise": 80,
}


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], env=inherited | environment, capture_output=True, text=True)


def compiled(path: Path, *arguments: str, **environment: str) -> list[dict]:
    done = python("-m", "selfnpo_kernels.aot", "--json", str(path), *arguments, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text())


def check(rows: list[dict]) -> None:
    assert not any(row["failed"] or row["spills"] for row in rows)
    main = [row for row in rows if row["floor"]]
    assert {row["call"].split(",")[0] for row in main} == set(SCHEMAS)
    for row in main:
        by_hand = BY_HAND.get((row["call"], row["mixture"]))
        assert row["bytes"] == (list(by_hand) if by_hand else row["floor"]), row
        if row["shape"] != "awkward":
            assert set(row["loads"]) | set(row["stores"]) == {16}, row
            table_of_addresses = row["kernel"] == "ema_update_kernel"
            assert row["index_bits"] == (64 if row["shape"] == "64-bit" or table_of_addresses else 32), row
    common = [row for row in main if (row["arch"], row["shape"], row["mixture"]) == (90, "common", "bf16/fp32")]
    registers = {row["call"]: row["registers"] for row in common if row["call"] in REGISTERS}
    assert registers.keys() == REGISTERS.keys()
    assert all(0 < registers[call] <= most for call, most in REGISTERS.items()), registers
    assert {row["shape"] for row in main} >= {"common", "64-bit"}
    assert {row["call"] for row in main} == set(aot.FLOORS)


def test_every_kernel_compiles_to_its_floor(tmp_path):
    """One mixture on sm_90: 16-byte accesses, no spills. The interpreter's variable is ignored."""
    check(compiled(tmp_path / "rows.json", "--quick", "--arch", "90", TRITON_INTERPRET="1"))


@pytest.mark.slow
def test_every_kernel_mixture_and_architecture(tmp_path):
    rows = compiled(tmp_path / "rows.json", "--arch", "80", "90")
    check(rows)
    assert {row["mixture"] for row in rows} == set(aot.MIXTURES)
    assert {row["arch"] for row in rows} == {80, 90}
    assert {row["shape"] for row in rows} == set(aot.SHAPES)
    # Calls that know one dtype only are not compiled for mixtures of two.
    seen = {(row["call"], row["mixture"]) for row in rows}
    assert seen >= {(call, mixture) for call, mixture in BY_HAND if "/" not in mixture}


def test_triton_is_imported_on_demand_only():
    done = python("-c", "import sys, selfnpo_kernels.aot; print('triton' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


TOYS = """
import sys
import torch, triton
import triton.language as tl
from selfnpo_kernels import aot

@triton.jit
def copy(out, x, N: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + lane, tl.load(x + lane))

@triton.jit
def masked_copy(out, x, n, N: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + lane, tl.load(x + lane, mask=lane < n), mask=lane < n)

@triton.jit
def copy_read_twice(out, x, N: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + lane)
    tl.debug_barrier()
    tl.store(out + lane, a + tl.load(x + lane, volatile=True))

@triton.jit
def copy_at_64_bits(out, x, N: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.program_id(0).to(tl.int64) * N + tl.arange(0, BLOCK)
    tl.store(out + lane, tl.load(x + lane))

@triton.jit
def starved(out, x, N: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + lane)
    tl.store(out + lane, tl.sort(values))

x = torch.empty(1 << 20, device="meta")
for kernel, extra, block, options in (
    (copy, (), 1024, {}), (masked_copy, (1000,), 1024, {}), (copy_read_twice, (), 1024, {}),
    (copy_at_64_bits, (), 1024, {}), (starved, (), 1024, {"num_warps": 1, "maxnreg": 32}),
):
    row = aot.Row(kernel.__name__, kernel.__name__, "fp32", "common", 90, floor=(8.0, 0.0))
    options = {"N": 12288, "BLOCK": block} | options
    aot.examine(row, aot.compiled(kernel, (x, x, *extra), options, 90), options, main=True)
    print(kernel.__name__, "|", "; ".join(row.problems))
"""


def test_bad_kernels_are_caught(tmp_path):
    """Narrow accesses, spills, needless bytes and wide indices: one kernel has each flaw."""
    (tmp_path / "toys.py").write_text(TOYS)
    done = python(str(tmp_path / "toys.py"))
    assert done.returncode == 0, done.stderr
    problems = dict(line.split(" | ") if " | " in line else (line.strip(" |"), "") for line in done.stdout.splitlines())
    assert problems["copy"] == ""
    assert "tensor accesses below 16 bytes" in problems["masked_copy"]
    assert problems["copy_read_twice"] == "(12.0, 0.0) bytes an element, floor (8.0, 0.0)"
    assert problems["copy_at_64_bits"] == "64-bit indices instead of 32-bit ones"
    assert "bytes of stack or local memory" in problems["starved"]


IR = """
  tt.func public @kernel(%x: !tt.ptr<f32> {tt.divisibility = 16 : i32}) attributes {noinline = false} {
    %a = tt.load %p : !tt.ptr<i64> loc(#loc1)
    %b = tt.load %q, %mask, %zero : tensor<1024x!tt.ptr<bf16>, #blocked> loc(#loc2)
    scf.if %ended {
      tt.store %r, %b : tensor<8x128x!tt.ptr<f32>, #blocked1> loc(#loc3)
    } else {
      %c = tt.load %s : !tt.ptr<f32> loc(#loc4)
    } loc(#loc5)
    tt.store %t, %d : tensor<1024x!tt.ptr<f32>, #blocked1> loc(#loc6)
  }
"""
PTX = """
  ld.global.b64 { %rd1 }, [ %rd2 + 0 ];
  @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd3 + 0 ];
  @%p2 st.global.v4.b32 [ %rd4 + 0 ], { %r1, %r2, %r3, %r4 };
  @%p2 st.global.v4.b32 [ %rd4 + 16 ], { %r1, %r2, %r3, %r4 };
  ld.global.L1::evict_first.b32 { %r9 }, [ %rd5 + 0 ];
  st.global.v4.b32 [ %rd6 + 0 ], { %r1, %r2, %r3, %r4 };
  st.global.v2.b32 [ %rd6 + 16 ], { %r1, %r2 };
  st.global.v2.b32 [ %rd6 + 24 ], { %r1, %r2 };
"""


def test_instructions_are_matched_with_their_accesses():
    accesses = machine_code.ir_accesses(IR)
    assert [(a.kind, a.elements, a.size, a.conditional) for a in accesses] == [
        ("ld", 0, 8, False),
        ("ld", 1024, 2, False),
        ("st", 1024, 4, True),
        ("ld", 0, 4, True),
        ("st", 1024, 4, False),
    ]
    widths = machine_code.ptx_widths(PTX)
    found = machine_code.matched(accesses, widths, threads=128)
    assert [instructions for _, instructions in found] == [[8], [16], [16, 16], [4], [16, 8, 8]]
    with pytest.raises(ValueError, match="has no instruction left"):
        machine_code.matched(accesses, widths[:-1], threads=128)
    with pytest.raises(ValueError, match="without an access"):
        machine_code.matched(accesses, [*widths, ("st", 4)], threads=128)
    with pytest.raises(ValueError, match="moves 16 bytes a thread where 8"):
        machine_code.matched(accesses, [("ld", 16), *widths[1:]], threads=128)


def test_resource_usage_and_machine_code():
    usage = " Function k:\n  REG:29 STACK:24 SHARED:1024 LOCAL:8 CONSTANT[0]:576 TEXTURE:0"
    assert machine_code.resources(usage) == {"REG": 29, "STACK": 24, "SHARED": 1024, "LOCAL": 8}
    sass = "LDG.E.128 R4, [R2]\nLDG.E R1\nSTG.E.128 [R2]\nSTG.E.64 [R2]\nLDS.128 R4\nLDG.E.EF.128 R1"
    assert machine_code.sass_wide(sass) == 3


@pytest.mark.parametrize(
    ("address", "bits"),
    [
        ("mad.wide.s32 %rd1, %r1, 4, %rd9;", 32),
        ("cvt.s64.s32 %rd3, %r1;\nshl.b64 %rd2, %rd3, 2;\nadd.s64 %rd1, %rd9, %rd2;", 32),
        ("mul.wide.u32 %rd3, %r1, 12288;\nshl.b64 %rd2, %rd3, 2;\nadd.s64 %rd1, %rd9, %rd2;", 64),
        ("mad.lo.s64 %rd3, %rd4, %rd5, %rd6;\nshl.b64 %rd2, %rd3, 2;\nadd.s64 %rd1, %rd9, %rd2;", 64),
        ("shl.b64 %rd3, %rd4, 14;\nadd.s64 %rd1, %rd9, %rd3;", 64),
    ],
)
def test_index_width_is_read_from_the_address(address, bits):
    other = "mul.wide.u32 %rd7, %r5, 12288;"  # feeds no 16-byte access
    for access in ("ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", "st.global.v4.b32 [ %rd1 + 0 ], { %r1 };"):
        assert machine_code.index_bits("\n".join([address, other, access])) == bits

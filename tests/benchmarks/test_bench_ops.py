"""The benchmark of the fused ops: gate, comparators, bytes and floor."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from broken_kernels import a_little, break_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import bench_ops
from benchmarks.arms import ops as op_arms
from benchmarks.arms.ema import EmaUpdate
from benchmarks.arms.floor import TRAFFIC, floor_arm
from benchmarks.arms.ops import DTYPES, GRID_STEPS, AffineNoise, X0Loss
from benchmarks.arms.tdft import ROLLOUT_W, TOP, TdftStep
from benchmarks.bench_ops import LATENTS, OPS, Case, Gate, Sizes, cases, run_case
from benchmarks.nets import digits

CPU = torch.device("cpu")
GATE_ALONE = Sizes(arms=(), rounds=1, least=0)
TINY = (30, 2, 3, 4)  # slots at every grid index


def case(op: str, dtype: str = "fp32", dims: tuple[int, ...] = TINY) -> Case:
    return Case(op, "sd15", dtype, "digits" if op == "ema_update" else dims)


@pytest.fixture(autouse=True)
def no_grad():
    """`bench_ops.main` runs without gradients, too."""
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_gate_passes(op, dtype):
    """Ours, with any backend, agrees with eager and the reference, on images and video."""
    chosen = cases([op], ["sd15", "cogvideox"], [dtype], ["digits"], quick=True)
    for record in [run_case(one, GATE_ALONE, CPU) for one in chosen]:
        assert record["failures"] == []
        assert "float32" in record["largest_error"] or dtype == "bf16"
        assert ("bfloat16" in record["largest_error"]) == (dtype == "bf16" and op != "tdft_step")


def given(which: int, change=lambda tensor: tensor.mul_(1.0001)):
    """Damage to an argument that the op writes to."""
    return lambda arguments, out: change(arguments[which])


WRONG = {
    "normal": ("normal", a_little(0), "normals (reference) differs"),
    "affine_noise": ("affine_noise", a_little(0), "noise given differs"),
    "guided_step": ("guided_step", a_little(0), "x_next differs"),
    "single": ("guided_step_single", a_little(1), "x0 differs"),
    "unipc": ("guided_step_unipc", a_little(0), "x_next differs"),
    "rescale": ("guidance_rescale", a_little(0), "x_next differs"),
    "target": ("tdft_step", a_little(0), "target of step 0 differs"),
    "x_s": ("tdft_step", a_little(1), "x_s of step 0 differs"),
    "facts": ("tdft_step", lambda _, out: out[2][2, -1:].add_(1), "other facts of step 0"),
    "weight": ("tdft_step", a_little(3), "weight of step 0 differs"),
    "x": ("tdft_step", given(2), "x of step 0 differs"),
    "final": ("tdft_step", given(3), "final of step 0 differs"),
    "slots": ("tdft_step", given(5, lambda slots: slots[1, -1:].add_(1)), "other ids of step 0"),
    "rows": ("tdft_step", given(5, lambda slots: slots[3].add_(1)), "other slots of step 0 (reference)"),
    "loss": ("x0_loss", a_little(0), "loss differs"),
    "slope": ("x0_loss", a_little(2), "gradient differs"),
    "ema": ("ema_update", lambda arguments, _: arguments[0][-1].mul_(1.0001), "masters differs"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_gate_stops_a_wrong_kernel(monkeypatch, wrong):
    op, damage, message = WRONG[wrong]
    break_kernel(monkeypatch, re.sub("_(single|unipc)$", "", op), damage)
    gate = Gate()
    gate.compare(op, "fp32", case(op).build(CPU).check())
    assert any(message in failure for failure in gate.failures), gate.failures


class NoShadow(EmaUpdate):
    def eager(self, masters, live, shadows):
        super().eager(masters, live, [])


def test_gate_stops_a_shadow_that_was_not_written(monkeypatch):
    break_kernel(monkeypatch, "ema_update", lambda arguments, _: arguments[2][0].zero_())
    gate = Gate()
    gate.compare("op", "bf16", EmaUpdate("digits", "bf16", CPU).check())
    gate.compare("op", "bf16", NoShadow("digits", "bf16", CPU).check())
    reported = [failure.partition(" differs")[0] for failure in gate.failures]
    assert reported == ["op: shadows", "op: shadows", "op: eager shadows"]


class NoNoise(AffineNoise):
    def eager(self, x, noise=None):
        return super().eager(x, torch.zeros_like(x) if noise is None else noise)


class NoUpdate(TdftStep):
    """Forgets where finished samples ended."""

    def chain(self, pos, neg, x, final, *slots, **options):
        pair, (moved, _, *slots) = super().chain(pos, neg, x, final.clone(), *slots, **options)
        return pair, (moved, final, *slots)


@pytest.mark.parametrize(
    ("op", "message"), [(NoNoise, "eager: variance of the noise differs"), (NoUpdate, "final of step 0 differs")]
)
def test_gate_stops_a_comparator_that_does_less(op, message):
    gate = Gate()
    gate.compare("op", "fp32", op(TINY, "fp32", CPU).check())
    assert any(message in failure for failure in gate.failures), gate.failures


@pytest.mark.parametrize("dims", [TINY, (1, 2, 3, 4, 5)])
@pytest.mark.parametrize("op", OPS)
def test_gate_stops_a_wrong_compiled_function(monkeypatch, op, dims):
    """Without compiling: the plain function passes as compiled, and a wrong function fails."""

    def lazy(run):
        def wrong(*args):
            if op == "ema_update":
                return None
            out = run(*args)
            if op == "tdft_step":
                (target, x_s, facts, weight), (x, *state) = out
                return (target, 3 * x_s, facts, weight), (3 * x, *state)
            return (*out[:-1], 1.1 * out[-1]) if isinstance(out, tuple) else out + 3

        return wrong

    for stand_in, passes in ((lambda run, device: run, True), (lambda run, device: lazy(run), False)):
        monkeypatch.setattr(op_arms, "compile_plain", stand_in)
        gate, bench = Gate(), case(op, dims=dims).build(CPU)
        gate.compare(op, "fp32", bench.check_compiled(bench.compiled()))
        assert (gate.failures == []) == passes, gate.failures
        assert all("compiled" in failure for failure in gate.failures)
        if op == "tdft_step" and not passes:
            assert sum("variance" in failure for failure in gate.failures) == 2  # of Eq. 16 and of new samples


def test_gate_takes_nan_and_other_shapes_for_failures():
    gate, one = Gate(), torch.ones(2)
    gate.compare("op", "fp32", [bench_ops.Comparison("nan", one * float("nan"), one)])
    gate.compare("op", "fp32", [bench_ops.Comparison("half", one[:1], one)])
    gate.compare("op", "fp32", [bench_ops.Comparison("number", one.long(), 2 * one.long())])
    assert [failure.split()[1] for failure in gate.failures] == ["nan", "half", "other"]


def test_eager_tdft_chain_is_diffusers_step_and_equation_16():
    """Slot by slot against DDIMScheduler.step at the slot's timestep, and Eq. 16 in float64."""
    bench = TdftStep(TINY, "fp32", CPU)
    x, final = bench.begin
    index, ids, left, _ = bench.slots()
    assert set(index.tolist()) == set(range(GRID_STEPS))
    noise, first = torch.randn(TINY), torch.randn(TINY)
    pair_t = torch.where(index == TOP, 0, 40 * index + 39)
    s = pair_t + 1 + torch.arange(len(ids)) % 7
    draws = noise, first, s.clamp(max=999), torch.zeros(len(ids), dtype=torch.bool)
    state = (t.clone() for t in (x, final, index, ids, left))
    (target, x_s, facts, _), (x_next, after, *_) = bench.chain(bench.pos, bench.neg, *state, draws=draws)
    pred = bench.pos + ROLLOUT_W * (bench.pos - bench.neg)
    a = bench.alphas_cumprod.double()
    for i, at in enumerate(index.tolist()):
        moved, x0 = bench.scheduler.step(pred[i], 40 * at + 39, x[i], return_dict=False)
        begins, ends = at == TOP, at == 0
        close = {"rtol": 1e-5, "atol": 1e-5}  # 2e-6 seen
        torch.testing.assert_close(target[i], final[i] if begins else x0, **close)
        torch.testing.assert_close(x_next[i], first[i] if ends else moved, **close)
        torch.testing.assert_close(after[i], moved if ends else final[i], **close)
        t, level = int(pair_t[i]), int(draws[2][i])
        assert facts[:3, i].tolist() == [t, level, int(ids[i]) - (len(ids) if begins else 0)]
        alpha, sigma2 = a[[t, level]].sqrt(), 1 - a[[t, level]]
        ratio, state = alpha[1] / alpha[0], (final if begins else x)[i].double()
        exact = ratio * state + (sigma2[1] - sigma2[0] * ratio**2).sqrt() * noise[i].double()
        torch.testing.assert_close(x_s[i].double(), exact, **close)


@pytest.mark.parametrize("by_rows", [False, True])
def test_eager_slots_go_through_whole_lives_as_ours_do(by_rows):
    """Two lives of every slot: t, sample ids, grid index and states left."""
    bench = TdftStep((3, 1, 2, 2), "fp32", CPU)
    ours, eager = bench.our_step(), bench.stepper(bench.chain, by_rows=by_rows)
    for _ in range(2 * GRID_STEPS):
        (pair, (_, _, slots)), (known, (_, _, index, ids, left)) = ours(), eager()
        assert torch.equal(pair[2][[0, 2]], known[2][[0, 2]])
        assert torch.equal(slots[:3], torch.stack([index, ids, left]))
        assert ((known[2][0] < known[2][1]) & (known[2][1] < 1000)).all()


def test_losses_of_the_benchmark_are_the_authors(monkeypatch):
    """mean(sqrt(d^2 + c^2) - c) on x0 in float64, weighted; the gradient is that of autograd."""
    bench = X0Loss(TINY, "fp32", CPU)
    pred, x_s, target = (t.double() for t in bench.inputs)
    a = bench.alphas_cumprod.double()[bench.s].view(-1, 1, 1, 1)
    pred.requires_grad_(True)
    with torch.enable_grad():
        d = (x_s - (1 - a).sqrt() * pred) / a.sqrt() - target
        per_sample = ((d**2 + 1e-6).sqrt() - 1e-3).mean((1, 2, 3))
        loss = (per_sample * bench.weight).mean()
        loss.backward()
    value, each, gradient = bench.eager(*bench.inputs)
    torch.testing.assert_close(value.double(), loss.detach(), rtol=1e-6, atol=0)  # 6e-8 seen
    torch.testing.assert_close(each.double(), per_sample.detach(), rtol=2e-6, atol=0)  # 2e-7 seen
    torch.testing.assert_close(gradient.double(), pred.grad, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("op", "dtype", "shape", "total"),
    [
        ("normal", "fp32", "sd15", 5_242_880),  # 80 x 4 x 64 x 64 = 1,310,720 elements, 4 bytes each
        ("affine_noise", "bf16", "cogvideox", 4_492_800),  # 13 x 16 x 60 x 90 = 1,123,200 elements, 2 + 2 bytes
        ("guided_step", "fp32", "uncached", 419_430_400),  # 20,971,520 elements: pos, neg, x, x_next, x0
        ("guided_step_single", "fp32", "sdxl", 10_485_760),  # 655,360 elements: neg, x, x_next, x0
        ("guided_step_unipc", "fp32", "sdxl", 18_350_080),  # pos, neg, x, x0_prev, x0_prev2, x_next, x0
        ("guided_step_unipc", "bf16", "cogvideox", 15_724_800),  # 2 bytes each
        ("guidance_rescale", "bf16", "sd15", 18_350_080),  # 2 bytes: pos and neg twice, x, x_next, x0
        ("tdft_step", "fp32", "sd15", 31_457_280),  # pos, neg, x, target, x_s, x
        ("tdft_step", "bf16", "sd15", 26_214_400),  # 2 + 2 + 4 x 4 bytes
        ("x0_loss", "fp32", "sd15", 31_457_280),  # pred, x_s, target, slope; slope, gradient
        ("x0_loss", "bf16", "sd15", 20_971_520),  # 2 + 4 + 4 + 2; 2 + 2
    ],
)
def test_bytes_counted_by_hand(op, dtype, shape, total):
    elements = int(np.prod(LATENTS[shape]))
    assert TRAFFIC[op][dtype].total * elements == total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_bytes_are_those_of_the_tensors(op, dtype):
    """Compares the table with the sizes of the tensors that the arms read and return."""

    def size(tensors) -> int:
        return sum(t.nbytes for t in tensors if t.numel() and t.dim() > 1)  # without values per sample

    bench, traffic = case(op, dtype).build(CPU), TRAFFIC[op][dtype]
    read, fresh, in_place, again = size(bench.inputs) if op != "ema_update" else 0, 0, 0, 0
    if op == "ema_update":
        masters, live, shadows = (sum(t.nbytes for t in tensors) for tensors in bench.inputs)
        read, in_place = masters + live, masters + shadows
    elif op == "tdft_step":
        pair, (x, *_) = bench.our_step()()
        read, fresh, in_place = size([bench.pos, bench.neg, x]), size(pair[:2]), x.nbytes
    elif op == "x0_loss":
        gradient = bench.ours(*bench.inputs)[2]
        fresh, again = 2 * gradient.nbytes, gradient.nbytes  # the slope is of the gradient's kind
    else:
        out = bench.ours(*bench.inputs)
        fresh = size(out if isinstance(out, tuple) else [out])
        again = size(bench.inputs[:2]) if op == "guidance_rescale" else 0
    assert [n / bench.elements for n in (read, fresh, in_place, again)] == [
        traffic.read,
        sum(traffic.fresh),
        traffic.in_place,
        traffic.again,
    ]


class Counter(TorchDispatchMode):
    """Counts the bytes that copies and fills read and write."""

    moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("clone", "copy_", "fill_"):
            self.moved += out.nbytes * (1 if name == "fill_" else 2)
        else:
            assert name in ("empty", "slice"), name
        return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_floor_moves_the_bytes_of_the_op(op, dtype):
    traffic, elements = TRAFFIC[op][dtype], 240
    run = floor_arm(traffic, elements, CPU)
    with Counter() as counter:
        fresh = run()
    assert counter.moved == traffic.total * elements
    assert [t.nbytes for t in fresh] == [n * elements for n in traffic.fresh]
    assert len({t.data_ptr() for t in fresh}) == len(fresh)


def test_ema_update_has_the_sizes_of_the_network_s_parameters():
    parameters = list(digits().network().parameters())
    op = EmaUpdate("digits", "bf16", CPU)
    masters, live, shadows = op.inputs
    assert [p.shape for p in parameters] == [m.shape for m in masters]
    assert (len(masters), op.elements) == (286, 1_077_572)
    assert {t.dtype for t in live + shadows} == {torch.bfloat16} != {t.dtype for t in masters}

"""What the ops refuse: a clear ValueError for each fault, in every backend and in tracing."""

from __future__ import annotations

from dataclasses import replace

import cases
import lives
import pytest
import torch
from cases import BF16, F16, F32, draw

from selfnpo_kernels import (
    NoiseKey,
    affine_noise,
    backends,
    ema_update,
    guidance_rescale,
    guided_step,
    normal,
    tdft_step,
    x0_loss,
)

SHAPE = (3, 4, 6)


def tensors(*names: str) -> dict[str, torch.Tensor]:
    return dict(zip(names, draw(1, *[SHAPE] * len(names)), strict=True))


def tdft_arguments(start: str, steps: int = 4) -> dict:
    world = lives.make_world(1, SHAPE, steps=steps, w=1.0, start=start)
    slots = torch.tensor([[0, 1, 2], [9, 10, 11], [1, 1, 1], [1, 1, 1]])
    final = tensors("final")["final"] if start == "noise" else None
    return {
        **tensors("pos", "neg", "x"),
        "final": final,
        "slots": slots,
        "next_slots": slots.clone(),
        "tables": world.tables,
        "rules": world.rules,
        "latents": world.latents,
    }


def arguments(op: str) -> tuple:
    """(function, arguments that it takes)."""
    (k2, k8), ids = draw(2, (3, 2), (3, 8)), torch.arange(3)
    return {
        "normal": (normal, {"key": NoiseKey(1, ids, 0), "shape": SHAPE[1:]}),
        "affine_noise": (affine_noise, {**tensors("x", "noise"), "k": k2}),
        "guidance_rescale": (guidance_rescale, {**tensors("pos", "neg"), "k": k8, "phi": 0.7}),
        "guided_step": (guided_step, {**tensors("pos", "neg", "x"), "k": k8}),
        "guided_step with all": (
            guided_step,
            {**tensors("pos", "neg", "x", "x0_prev", "x0_prev2", "noise"), "k": k8, "scale": torch.ones(3)},
        ),
        "tdft_step": (tdft_step, tdft_arguments("noise")),
        "tdft_step from data": (tdft_step, tdft_arguments("data")),
        "x0_loss": (
            x0_loss,
            {**tensors("pred", "x_s", "target"), "k": k2, "kind": "huber", "weight": torch.ones(3)},
        ),
        "ema_update": (
            ema_update,
            {"masters": [torch.ones(3, 4)], "live": [torch.ones(3, 4)], "shadows": [torch.ones(3, 4)], "decay": 0.9},
        ),
    }[op]


STATES = {
    "affine_noise": ("x", "noise"),
    "guidance_rescale": ("pos", "neg"),
    "guided_step": ("pos", "neg", "x"),
    "guided_step with all": ("x0_prev", "x0_prev2", "noise"),
    "tdft_step": ("pos", "neg", "x", "final"),
    "tdft_step from data": ("pos", "neg", "x"),
    "x0_loss": ("pred", "x_s", "target"),
}
SPOILED = {  # what is wrong with it -> (how it got so, what the error says)
    "order": (lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), "not row-major"),
    "dtype": (lambda t: t.to(torch.int32), "torch.int32"),
    "shape": (lambda t: t[:, :3].contiguous(), "shape"),
    "rank": (lambda t: t.flatten().contiguous(), "shape"),
    "device": (lambda t: t.to("meta"), "meta"),
}


@pytest.mark.parametrize("fault", SPOILED)
@pytest.mark.parametrize(("op", "name"), [(op, name) for op, names in STATES.items() for name in names])
def test_states(op, name, fault):
    """The first state sets the shape and the device; the error names a tensor that differs."""
    spoil, says = SPOILED[fault]
    function, good = arguments(op)
    good[name] = spoil(good[name])
    with pytest.raises(ValueError, match=rf"^{op.split()[0]}: \w+ .*{says}") as caught:
        function(**good)
    assert "\n" not in str(caught.value)


DIFFERENTIABLE = [(op, n) for op, names in STATES.items() for n in names if n != "pred"]
DIFFERENTIABLE += [("guided_step with all", "scale"), ("tdft_step from data", "latents"), ("x0_loss", "k")]
DIFFERENTIABLE += [("x0_loss", "weight")]


@pytest.mark.parametrize(("op", "name"), DIFFERENTIABLE)
def test_no_gradient(op, name):
    function, good = arguments(op)
    good[name] = good[name].clone().requires_grad_()
    with pytest.raises(ValueError, match=rf"^{op.split()[0]}: {name} requires a gradient"):
        function(**good)
    with torch.no_grad():
        function(**good)


def spoil_table(table: str, value) -> dict:
    return {"tables": lambda tables: replace(tables, **{table: value(getattr(tables, table))})}


def spoil_rule(**values) -> dict:
    return {"rules": lambda rules: replace(rules, **values)}


REFUSED = {  # op -> [(what is wrong, what the error says)]
    "normal": [
        ({"key": NoiseKey(1, torch.arange(3.0), 0)}, "sample_ids is torch.float32"),
        ({"key": NoiseKey(1, torch.arange(6).view(2, 3), 0)}, "sample_ids"),
        ({"key": NoiseKey(1, torch.arange(6)[::2], 0)}, "sample_ids is not contiguous"),
        ({"key": NoiseKey(1, torch.arange(3), torch.arange(2))}, "draws"),
        ({"key": NoiseKey(1, torch.arange(3), torch.arange(3).int())}, "draws"),
        ({"dtype": torch.int64}, "dtype is torch.int64"),
    ],
    "affine_noise": [
        ({"noise": None}, "noise is missing"),
        ({"noise": NoiseKey(1, torch.arange(4), 0)}, "sample_ids"),
        ({"noise": NoiseKey(1, torch.arange(3), torch.arange(4))}, "draws"),
        ({"k": torch.ones(2, 2)}, "k has 2 rows for 3 samples"),
        ({"k": torch.ones(3, 7)}, "k is .* of shape"),
        ({"k": torch.ones(3, 2, dtype=BF16)}, "k is torch.bfloat16"),
        ({"k": torch.ones(3, 4)[:, ::2]}, "k is not contiguous"),
        ({"k": torch.ones(3, 2, device="meta")}, "k is on meta"),
        ({"index": torch.arange(2)}, "index"),
        ({"index": torch.arange(3).int()}, "index is torch.int32"),
    ],
    "guidance_rescale": [
        ({"phi": 2.0}, "phi is 2.0; expected 0 to 1"),
        ({"phi": -0.1}, "phi"),
        ({"phi": float("nan")}, "phi is nan"),
        ({"k": torch.ones(3, 2)}, "k is"),
        ({"pos": torch.ones(3, 1), "neg": torch.ones(3, 1)}, "one element"),
    ],
    "guided_step": [
        ({"pos": None, "neg": None}, "both missing"),
        ({"neg": lambda t: t.to(BF16)}, "neg is torch.bfloat16 and pos is torch.float32"),
        ({"k": torch.ones(3, 7)}, r"k is .* expected torch.float32 of shape \(\*, 8\)"),
        ({"scale": torch.ones(3, 1)}, "scale"),
        ({"scale": torch.ones(3, dtype=F16)}, "scale is torch.float16"),
        ({"x0_prev": torch.ones(SHAPE, dtype=BF16)}, "x0_prev is torch.bfloat16; expected torch.float32"),
        ({"x0_prev": torch.ones(3, 4, 5)}, "x0_prev has shape"),
        ({"x0_prev2": torch.ones(SHAPE, dtype=BF16)}, "x0_prev2 is torch.bfloat16; expected torch.float32"),
        ({"noise": torch.ones(3, 4, 5)}, "noise has shape"),
        ({"noise": NoiseKey(1, torch.arange(4), 0)}, "sample_ids"),
    ],
    "tdft_step": [
        ({"pos": None, "neg": None}, "both missing"),
        ({"final": None}, "expected final alone"),
        ({"latents": torch.ones(3, 4, 6)}, "expected final alone"),
        ({"final": lambda t: t.to(BF16)}, "final is torch.bfloat16"),
        ({"neg": lambda t: t.to(F16)}, "neg is torch.float16 and pos is torch.float32"),
        ({"slots": lambda t: t[:3]}, "slots"),
        ({"slots": lambda t: t.int()}, "slots is torch.int32"),
        ({"next_slots": lambda t: t[:, :2].contiguous()}, "next_slots"),
        ({"next_slots": lambda t: t.t().contiguous().t()}, "next_slots is not contiguous"),
        (spoil_table("step", lambda t: t[:4]), "step has 4 rows; expected at least 5"),
        (spoil_table("step", lambda t: t[:, :7].contiguous()), "step is"),
        (spoil_table("start", lambda t: t[:4]), "start is"),
        (spoil_table("renoise", lambda t: t[:4]), "renoise is"),
        (spoil_table("renoise", lambda t: t.half()), "renoise is torch.float16"),
        (spoil_table("timesteps", lambda t: t.int()), "timesteps is torch.int32"),
        (spoil_table("timesteps", lambda t: t[:1]), "timesteps has 1 rows"),
        (spoil_table("weight", lambda t: t[:4]), "weight is"),
        (spoil_rule(num_prompts=0), "num_prompts is 0"),
        (spoil_rule(num_prompts=2**31), "num_prompts"),
        (spoil_rule(stride=0), "stride is 0"),
        (spoil_rule(max_steps=0), "max_steps is 0"),
        (spoil_rule(dropout=2.0), "dropout is 2.0; expected 0 to 1"),
        (spoil_rule(dropout=-0.5), "dropout"),
    ],
    "tdft_step from data": [
        ({"latents": lambda t: t[:2]}, "latents has shape"),
        ({"latents": lambda t: t.long()}, "latents is torch.int64"),
        ({"latents": lambda t: t.to("meta")}, "latents is on meta"),
        ({"final": torch.ones(SHAPE)}, "expected final alone"),
    ],
    "x0_loss": [
        ({"kind": "l1"}, "kind is 'l1'; expected l2 or huber"),
        ({"c": 0.0}, "c is 0.0; expected 1e-12 or more"),
        ({"c": float("inf")}, "c is inf"),
        ({"c": float("nan")}, "c is nan"),
        ({"target": lambda t: t.to(BF16)}, "target is torch.bfloat16 and x_s is torch.float32"),
        ({"k": torch.ones(3, 7)}, "k is"),
        ({"weight": torch.ones(2)}, "weight is"),
        ({"weight": torch.ones(3, dtype=F16)}, "weight is torch.float16"),
        ({"weight": torch.ones(3, requires_grad=True)}, "weight requires a gradient"),
    ],
    "ema_update": [
        ({"live": []}, "masters are 1, live 0, shadows 1"),
        ({"shadows": [torch.ones(3, 4)] * 2}, "shadows 2"),
        ({"masters": [torch.ones(3, 4, dtype=BF16)]}, r"masters\[0\] is torch.bfloat16; expected float32"),
        ({"live": [torch.ones(3, 4).long()]}, r"live\[0\] is torch.int64"),
        ({"live": [torch.ones(4, 3)]}, r"live\[0\] has shape"),
        ({"live": [torch.ones(4, 3).t()]}, r"live\[0\] has shape .* and strides"),
        ({"shadows": [torch.ones(3, 4, device="meta")]}, r"shadows\[0\] is on meta"),
        ({name: [torch.ones(3, 8)[:, ::2]] for name in ("masters", "live", "shadows")}, r"masters\[0\] has gaps"),
        ({"decay": 1.5}, "decay is 1.5; expected 0 to 1"),
        ({"decay": float("nan")}, "decay is nan"),
    ],
}
FAULTS = [pytest.param(op, *fault, id=f"{op}-{i}") for op, faults in REFUSED.items() for i, fault in enumerate(faults)]


def spoiled(good: dict, fault: dict) -> dict:
    """The good arguments, replaced by the values of `fault` or changed by its functions."""
    return good | {n: value(good[n]) if callable(value) else value for n, value in fault.items()}


@pytest.mark.parametrize(("op", "fault", "says"), FAULTS)
def test_refused(op, fault, says):
    function, good = arguments(op)
    function(**good)
    with pytest.raises(ValueError, match=rf"^{op.split()[0]}: .*{says}") as caught:
        function(**spoiled(good, fault))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("op", ["affine_noise", "guidance_rescale", "guided_step", "x0_loss"])
@pytest.mark.parametrize(
    ("k", "says"),
    [
        (lambda k: k.double(), "k is torch.float64 of shape .*; expected torch.float32"),
        (lambda k: k.requires_grad_(), "k requires a gradient"),
    ],
    ids=["float64", "gradient"],
)
def test_tables(op, k, says):
    """float64 belongs to calls whose state is float64, and no coefficient is trained."""
    function, good = arguments(op)
    with pytest.raises(ValueError, match=rf"^{op}: {says}"):
        function(**good | {"k": k(good["k"])})


@pytest.mark.parametrize("name", ["reference", "cpp"])
@pytest.mark.parametrize("row", [-1, 3, 2**40])
def test_rows_that_are_in_no_table(name, row):
    index = torch.tensor([0, row, 1])
    for op in ("affine_noise", "guidance_rescale", "guided_step", "x0_loss"):
        function, good = arguments(op)
        with backends.use(name), pytest.raises(ValueError, match="index holds"):
            function(**good, index=index)


@pytest.mark.parametrize("index", [-2, 4, 2**40])
def test_slots_beyond_the_grid(index):
    good = tdft_arguments("noise")
    good["slots"][0, 1] = index
    with backends.use("cpp"), pytest.raises(ValueError, match=f"grid index holds {index}; expected -1 to 3"):
        tdft_step(**good)


@pytest.mark.parametrize("one", ["final", "pos", "neg"])
def test_states_that_share_memory(one):
    """A block of a launch would read what another block has overwritten."""
    good = tdft_arguments("noise")
    good[one] = good["x"]
    with pytest.raises(ValueError, match=f"tdft_step: {one} shares memory with x"):
        tdft_step(**good)


def test_slot_tables_are_two():
    good = tdft_arguments("noise")
    both = torch.cat([good["slots"], good["slots"]])
    tdft_step(**good | {"slots": both[:4], "next_slots": both[4:]})
    with pytest.raises(ValueError, match="next_slots shares memory with slots"):
        tdft_step(**good | {"slots": both[:4], "next_slots": both[3:7]})


def test_samples_without_elements():
    empty = torch.ones(3, 0)
    with pytest.raises(ValueError, match=r"x has shape \(3, 0\); expected one element per sample"):
        affine_noise(empty, torch.ones(1, 2), empty)
    with pytest.raises(ValueError, match=r"shape is \(0,\)"):
        normal(NoiseKey(1, torch.arange(3), 0), (0,))


def test_a_grid_of_one_step_has_no_start_from_data():
    """Its only index is the last timestep, which has no s above it."""
    with pytest.raises(ValueError, match="timesteps has 2 rows"):
        tdft_step(**tdft_arguments("data", steps=1))


def test_tracing_refuses_the_same():
    function, good = arguments("guided_step")
    with pytest.raises(Exception, match="guided_step: k is"):
        torch.compile(function, backend="eager", fullgraph=True)(**good | {"k": torch.ones(3, 6)})


def test_arguments_stay_as_they_are_when_a_call_is_refused():
    good = tdft_arguments("noise")
    before = {name: good[name].clone() for name in ("x", "final", "next_slots")}
    with pytest.raises(ValueError, match="dropout"):
        tdft_step(**spoiled(good, spoil_rule(dropout=2.0)))
    for name, tensor in before.items():
        assert torch.equal(good[name], tensor)


def test_every_mixture_is_taken(backend):
    """Noise and x may each be float32, bfloat16 or float16."""
    on = cases.device(backend)
    for mixture in cases.EVERY_MIXTURE:
        (x,), (noise,) = draw(3, SHAPE, dtype=mixture.state, on=on), draw(4, SHAPE, dtype=mixture.network, on=on)
        out = affine_noise(x, torch.ones(1, 2, device=on, dtype=F32), noise)
        assert out.dtype == mixture.state
        assert torch.isfinite(out).all()

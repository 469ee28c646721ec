"""The captured rollout step: on a CPU that keeps the rules of CUDA graphs, and on a GPU."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import fields, replace

import gaussian_mixture as gm
import pytest
import tiny
import torch
from recording import ALLOCATES, ASKS, Recording
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from selfnpo_fast.config import LossConfig, OptimizerConfig
from selfnpo_fast.models import StableDiffusionAdapter
from selfnpo_fast.models.conditioning import ConditioningTable
from selfnpo_fast.rollout import ContinuousRollout, GuidedPredictor, OverlappedProducer, Pairs, Producer
from selfnpo_fast.runtime.capture import CudaGraphs
from selfnpo_fast.runtime.compiling import compiled
from selfnpo_fast.training.engine import clip, make_optimizer
from selfnpo_fast.training.moving_reference import MovingReference
from selfnpo_fast.training.objective import Objective

BATCH, GROUPS = 6, 2


def rollout(start: str = "noise", w: float = -1.0, **options) -> ContinuousRollout:
    maker = gm.make_maker(gm.config(start=start, omega=w))
    maker.predictor.branches.batched = True
    return ContinuousRollout(maker, batch=BATCH, groups=GROUPS, rank=0, world_size=1, **options)


def copies(update) -> list[torch.Tensor]:
    return [getattr(pairs, field.name).clone() for pairs in update.micro_batches for field in fields(Pairs)]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("start", "w"), [("noise", -1.0), ("noise", -3.0), ("data", 0.0)])
def test_replays_use_the_same_memory_and_ask_nothing(start, w, overlap):
    """The pairs are those of a plain rollout, though each replay overwrites the pairs before."""
    recording = Recording()
    plain, captured = rollout(start, w), rollout(start, w, capture=recording)
    first = Producer(plain, plain.maker.predictor, 2, lambda: 0)
    arguments = captured, captured.maker.predictor, 2, lambda: 0
    second = OverlappedProducer(*arguments, device=gm.CPU) if overlap else Producer(*arguments)
    for _ in range(12):
        expected, found = copies(first.take()), second.take()
        second.settle()
        assert all(torch.equal(a, b) for a, b in zip(expected, copies(found), strict=True))
    assert recording.replays >= 10 * 2
    second.close()


def test_nothing_is_allocated_between_replays():
    captured = rollout(capture=Recording())
    producer = OverlappedProducer(captured, captured.maker.predictor, 2, lambda: 0, device=gm.CPU)
    for _ in range(4):
        producer.take()
        producer.settle()
    producer.close()
    recording = captured._capture

    class Between(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            assert recording.depth or name not in ALLOCATES | ASKS, name
            return func(*args, **(kwargs or {}))

    with Between():  # in this thread: the dispatch mode belongs to it
        for _ in range(3):
            producer._make()


def test_the_stand_in_notices():
    """A step that moves its memory, reads a value back, or runs other operations than before."""
    state = {"x": torch.zeros(3)}

    def moving():
        state["x"] = state["x"] + 1
        return (state["x"] * 2,)

    def asking():
        return (torch.zeros(2) * torch.ones(1).sum().item(),)

    def changing(seen=[]):  # noqa: B006
        seen.append(1)
        return (torch.zeros(3).sin() if len(seen) > 2 else torch.zeros(3).cos(),)

    for step, words in (
        (moving, "an address has changed"),
        (asking, "asks the device"),
        (changing, "other operations"),
    ):
        replayed = Recording()(step)
        with pytest.raises(AssertionError, match=words):
            for _ in range(4):
                replayed()


# The whole step as one graph, on a device that is not there


def fake_cuda(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")


def fake_network(mode: FakeTensorMode, dtype: torch.dtype) -> torch.nn.Module:
    network = tiny.unet().to(dtype)
    for module in network.modules():
        for table in (module._parameters, module._buffers):
            for name, value in table.items():
                if value is not None:
                    fake = fake_cuda(mode, value)
                    table[name] = torch.nn.Parameter(fake) if table is module._parameters else fake
    return network


class NoDevice(TorchFunctionMode):
    """Replaces x[...], contiguous, float and copy_, whose C++ entries need a device that exists."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__getitem__:
            return self.item(*args)
        if func is torch.Tensor.contiguous:
            return args[0] if args[0].is_contiguous() else args[0].clone(memory_format=torch.contiguous_format)
        if func is torch.Tensor.copy_:
            return torch.ops.aten.copy_(*args)
        if func is torch.Tensor.float:
            return torch.ops.aten._to_copy(args[0], dtype=torch.float32)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def item(x: torch.Tensor, keys) -> torch.Tensor:
        keys = keys if isinstance(keys, tuple) else (keys,)
        if Ellipsis in [key for key in keys if not isinstance(key, torch.Tensor)]:
            at, named = keys.index(Ellipsis), sum(key is not None for key in keys) - 1
            keys = (*keys[:at], *[slice(None)] * (x.ndim - named), *keys[at + 1 :])
        dim = 0
        for key in keys:
            if key is None:
                x = x.unsqueeze(dim)
            elif isinstance(key, slice):
                x = torch.ops.aten.slice(x, dim, key.start, key.stop, key.step or 1)
            elif isinstance(key, torch.Tensor):
                x = x.index_select(dim, key)
            else:
                x = x.select(dim, key)
                continue
            dim += 1
        return x


def whole_update(w: float, to_device, student, reference, table: torch.Tensor):
    """(rollout and loss, EMA, what they overwrite); the first two are functions of nothing."""
    adapter, cond = StableDiffusionAdapter("none"), ConditioningTable({"encoder_hidden_states": to_device(table)})
    maker = gm.make_maker(gm.config(omega=w))
    rollout = ContinuousRollout(maker, batch=BATCH, groups=1, rank=0, world_size=1)
    maker.predictor = GuidedPredictor(lambda *a: adapter.predict(reference, *a), cond, w, "batched")
    maker.grid = replace(maker.grid, timesteps=to_device(maker.grid.timesteps))
    rollout.tables = replace(rollout.tables, **{name: to_device(value) for name, value in vars(rollout.tables).items()})
    x, final = (to_device(torch.randn(BATCH, 4, 8, 8)) for _ in range(2))
    slots, rollout._next_slots = to_device(rollout.slots[0]), to_device(rollout._next_slots)
    objective = Objective.build(LossConfig(kind="huber"), maker.grid.schedule, gm.CPU)
    objective = replace(objective, k=to_device(objective.k))
    moving = MovingReference(reference, student.named_parameters(), 0.9)

    def pair_loss():
        with torch.no_grad():
            target, x_s, pairs, weight = rollout._advance(x, final, slots)
        pred = adapter.predict(student, x_s, pairs[1], cond.gather(pairs[3]))
        return objective(pred, x_s, pairs[1], target, weight)

    return pair_loss, moving.update, (x, final, slots)


TEXT = torch.zeros(5, 7, tiny.WIDTH)


@pytest.mark.parametrize(
    ("w", "dtype"),
    [(-1.0, torch.bfloat16), (-3.0, torch.float32), pytest.param(0.0, torch.float32, marks=pytest.mark.slow)],
)
def test_a_whole_update_on_fake_cuda_is_one_graph_and_asks_nothing_of_the_host(w, dtype):
    """Tiny networks of the real class, traced into one graph on a device that does not exist.

    Any `.item()` and any branch on a value raises.

    Rollout, loss, clipping, optimiser and average; without autograd, which would ask for the
    device: the next test has it. (So would dynamo, whose fullgraph=True make_fx stands in for.)
    """
    mode = FakeTensorMode()
    student, reference = fake_network(mode, dtype), fake_network(mode, dtype)

    def to_device(tensor: torch.Tensor) -> torch.Tensor:
        return fake_cuda(mode, tensor)

    pair_loss, move, _ = whole_update(w, to_device, student, reference, TEXT.to(dtype))
    optimizer = make_optimizer(OptimizerConfig(name="adamw"))(student.parameters())

    def update() -> tuple[torch.Tensor, ...]:
        loss, per_pair = pair_loss()
        for parameter in student.parameters():
            parameter.grad = torch.empty_like(parameter)
        norm, finite = clip(optimizer, 1.0)
        optimizer.step()
        move()
        return loss, per_pair, norm, finite

    with mode, NoDevice(), torch.no_grad():
        with pytest.raises(DataDependentOutputException):
            to_device(TEXT).sum().item()
        graph = make_fx(update)().graph
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    counts = Counter(str(node.target) for node in nodes)
    ours = {name: n for name, n in counts.items() if name.startswith("selfnpo.")}
    once = ("tdft_step", "x0_loss", "ema_update")
    assert ours == {f"selfnpo.{name}.default": 1 for name in once}
    assert counts["aten._fused_adamw_.default"] == 1
    assert not ASKS & {name.split(".")[1] for name in counts if "." in name}
    values = [node.meta["val"] for node in nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert sum(value.device.type == "cuda" for value in values) > 500


@pytest.mark.slow
@pytest.mark.parametrize("w", [-1.0, -3.0])
def test_a_whole_update_is_one_graph(w):
    """With fullgraph=True over rollout, loss and backward: the results of the plain functions."""
    torch.compiler.reset()
    results = []
    graph = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    for wrap in (lambda function: function, graph):
        torch.manual_seed(0)
        student, reference = (tiny.unet(**tiny.SHALLOW) for _ in range(2))
        reference.requires_grad_(False)
        pair_loss, move, states = whole_update(w, torch.clone, student, reference, torch.randn_like(TEXT))
        loss, per_pair = wrap(pair_loss)()
        loss.backward()
        wrap(move)()
        results.append([loss, per_pair, *states, *reference.parameters(), *(p.grad for p in student.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_rollout_makes_the_same_pairs():
    """By inductor, as `engine.compile: default` has it."""
    plain, fast = rollout(w=-3.0), rollout(w=-3.0, compile="default")
    for _ in range(6):
        expected, found = plain.next_pairs(), fast.next_pairs()
        for field in fields(Pairs):
            a, b = getattr(expected, field.name), getattr(found, field.name)
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert compiled(len, "off") is len


@pytest.mark.gpu
@pytest.mark.parametrize(("branches", "overlap"), [("batched", False), ("auto", False), ("batched", True)])
def test_cuda_graphs_make_the_same_pairs(branches, overlap, monkeypatch):
    """With timed branches the groups are not captured in the order in which they are replayed."""
    device = torch.device("cuda")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)

    def on_gpu(**options) -> ContinuousRollout:
        adapter = StableDiffusionAdapter("none")
        torch.manual_seed(0)
        network = tiny.unet().to(device).requires_grad_(False)
        cond = ConditioningTable({"encoder_hidden_states": torch.randn(5, 7, tiny.WIDTH, device=device)})
        maker = gm.make_maker(gm.config(omega=-3.0))
        maker.predictor = GuidedPredictor(lambda *a: adapter.predict(network, *a), cond, -3.0, branches)
        maker.device, maker.latent_shape = device, (4, 8, 8)
        tables = {k: v.to(device) for k, v in vars(maker.grid).items() if isinstance(v, torch.Tensor)}
        maker.grid = replace(maker.grid, **tables)
        return ContinuousRollout(maker, batch=BATCH, groups=4, rank=0, world_size=1, **options)

    graphs = CudaGraphs(device)
    plain, captured = on_gpu(), on_gpu(capture=graphs)
    first = Producer(plain, plain.maker.predictor, 4, lambda: 0)
    arguments = captured, captured.maker.predictor, 4, lambda: 0
    second = OverlappedProducer(*arguments, device=device) if overlap else Producer(*arguments)
    for _ in range(10):
        for a, b in zip(copies(first.take()), copies(second.take()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        second.settle()
    assert graphs.on

"""Lists of `ema_update` that were checked before: never stale, bounded by bytes, safe on streams."""

from __future__ import annotations

import contextlib
import gc
import importlib
import weakref

import cases
import pytest
import torch
from cases import BF16, F16, F32, draw, wide
from hypothesis import given, settings
from hypothesis import strategies as st

from selfnpo_kernels import backends, checks, ema_update, known_lists
from selfnpo_kernels.known_lists import ENTRY_BYTES, TENSOR_BYTES, ListCache


@pytest.fixture
def looked(monkeypatch) -> list[int]:
    """The number of masters of each check; nothing is known at the start."""
    seen, check = [], checks.ema_lists

    def counting(masters, live, shadows):
        seen.append(len(masters))
        check(masters, live, shadows)

    monkeypatch.setattr(checks, "ema_lists", counting)
    monkeypatch.setattr(known_lists, "CACHE", ListCache())
    return seen


def lists(on: str = "cpu") -> tuple[list, list, list]:
    shapes = (3, 4), (5,), (2, 3, 2, 2)
    live = draw(1, *shapes, dtype=BF16, on=on)
    return draw(2, *shapes, on=on), live, [torch.empty_like(p) for p in live]


def test_a_second_call_checks_no_tensor(backend, looked):
    parameters = lists(cases.device(backend))
    before = [wide(m) for m in parameters[0]]
    for _ in range(4):
        ema_update(*parameters, 0.5)
    assert looked == [3]
    for master, new, shadow, old in zip(*parameters, before, strict=True):
        torch.testing.assert_close(
            torch.as_tensor(wide(master)), torch.as_tensor(old / 16 + wide(new) * 15 / 16), rtol=1e-6, atol=1e-6
        )
        assert torch.equal(shadow, master.to(BF16))
    with pytest.raises(ValueError, match="decay is 2"):
        ema_update(*parameters, 2)


def as_other_memory(parameters) -> None:
    parameters[1][1] = parameters[1][1].clone()


def by_data(parameters) -> None:
    parameters[0][0].data = parameters[0][0].clone()


def as_other_dtype(parameters) -> None:
    parameters[2][2] = parameters[2][2].view(F16)


def as_smaller(parameters) -> None:
    for group in parameters:
        group[1].resize_(3)


def in_other_order(parameters) -> None:
    for group in parameters:
        group[0] = group[0].as_strided((3, 4), (1, 3))


def as_a_shorter_list(parameters) -> None:
    for group in parameters:
        del group[0]


def without_shadows(parameters) -> None:
    parameters[2].clear()


CHANGES = [
    as_other_memory, by_data, as_other_dtype, as_smaller, in_other_order, as_a_shorter_list, without_shadows
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_checked_again_and_seen(backend, looked, change):
    parameters = lists(cases.device(backend))
    ema_update(*parameters, 0.5)
    change(parameters)
    masters, live, shadows = parameters
    expected = [old.lerp(new.float(), 0.25) for old, new in zip(masters, live, strict=True)]
    ema_update(*parameters, 0.75)
    assert looked == [3, len(masters)]
    torch.testing.assert_close(masters, expected)
    for shadow, master in zip(shadows, masters, strict=False):
        assert torch.equal(shadow, master.to(shadow.dtype))


def lose_memory(parameters) -> None:
    parameters[1][0].untyped_storage().resize_(0)


def with_gaps_at_the_same_address(parameters) -> None:
    for group in parameters:
        group[0] = group[0].as_strided((2, 2), (4, 2))


def in_another_shape_at_the_same_address(parameters) -> None:
    parameters[1][0] = parameters[1][0].view(4, 3)


def as_another_device(parameters) -> None:
    parameters[2][1] = parameters[2][1].to("meta")


def as_integers_at_the_same_address(parameters) -> None:
    parameters[1][2] = parameters[1][2].view(torch.int16)


REFUSED = {
    lose_memory: r"live\[0\] has a storage of 0 bytes; needs 24",
    with_gaps_at_the_same_address: r"masters\[0\] has gaps",
    in_another_shape_at_the_same_address: r"live\[0\] has shape",
    as_another_device: r"shadows\[1\] is on meta",
    as_integers_at_the_same_address: r"live\[2\] is torch.int16",
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_is_refused_is_refused_after_a_good_call_and_every_time(backend, looked, change):
    parameters = lists(cases.device(backend))
    ema_update(*parameters, 0.5)
    change(parameters)
    before = parameters[0][2].clone()
    for _ in range(2):
        with pytest.raises(ValueError, match=REFUSED[change]):
            ema_update(*parameters, 0.5)
    assert looked == [3, 3, 3]
    assert torch.equal(parameters[0][2], before)


@pytest.mark.parametrize("name", ["reference", "cpp"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_calls_with_memory_that_is_freed_and_given_out_again(name, data):
    """A pool of parameters of few sizes, so that addresses come again with other tensors."""
    shapes = st.sampled_from([(4,), (2, 2), (8,), (2, 4), (1, 4), (16,)])
    dtypes = st.sampled_from([F32, BF16, F16])
    numbers = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))

    def parameter() -> list[torch.Tensor]:
        shape, dtype = data.draw(shapes), data.draw(dtypes)
        master, live = torch.randn(shape, generator=numbers), torch.randn(shape, generator=numbers).to(dtype)
        return [master, live, torch.empty(shape, dtype=data.draw(dtypes))]

    pool = [parameter() for _ in range(4)]
    with backends.use(name):
        for _ in range(8):
            for at in data.draw(st.sets(st.integers(0, 3), max_size=2)):
                pool[at] = None  # freed before the new one is made
                pool[at] = parameter()
            chosen = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True))
            masters, live, shadows = (list(group) for group in zip(*(pool[at] for at in chosen), strict=True))
            expected = [old.lerp(new.float(), 0.5) for old, new in zip(masters, live, strict=True)]
            ema_update(masters, live, shadows if data.draw(st.booleans()) else [], 0.5)
            torch.testing.assert_close(masters, expected, rtol=1e-6, atol=1e-6)


def test_autograd_sees_every_call_that_overwrites(backend):
    master, weight = torch.ones(5, device=cases.device(backend)), torch.ones(5, device=cases.device(backend))
    weight.requires_grad_()
    for _ in range(3):
        out = (weight * master).sum()
        ema_update([master], [torch.zeros_like(master)], [], 0.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()


# The bound


def test_entries_are_bounded_by_bytes_and_dropped_at_once():
    """The least recently used go first, whatever their number; their tables are freed without a
    collection of garbage."""
    one = ENTRY_BYTES + TENSOR_BYTES
    cache, tensors = ListCache(max_bytes=5 * one + 1000), [[torch.ones(n + 1)] for n in range(7)]
    freed: list[int] = []
    gc.disable()
    try:
        for at in (0, 1, 2):
            known = cache.find([tensors[at]], lambda: None)
            table = torch.ones(125)
            weakref.finalize(table, freed.append, at)
            cache.prepare(known, [table], table.nbytes)
            del known, table
        assert (len(cache), cache.nbytes) == (3, 3 * one + 1500)
        cache.find([tensors[0]], lambda: pytest.fail("it is known"))
        for at in (3, 4):
            cache.find([tensors[at]], lambda: None)
        assert freed == [1]
        assert (len(cache), cache.nbytes) == (4, 4 * one + 1000)
        large = cache.find([tensors[5]], lambda: None)
        for _ in range(2):  # of two threads
            cache.prepare(large, "tables", 10**9)
        assert sorted(freed) == [0, 1, 2]
        assert (len(cache), cache.nbytes) == (1, one + 10**9), "the newest is kept whatever it takes"
        cache.find([tensors[6]], lambda: None)
        assert (len(cache), cache.nbytes) == (1, one)
    finally:
        gc.enable()


def test_what_a_check_refuses_is_no_entry():
    cache = ListCache()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            cache.find([[torch.ones(1)]], lambda: 1 / 0)
    assert (len(cache), cache.nbytes) == (0, 0)


# On CUDA


class FakeStream:
    """A stream of a device that has not begun: records what waits for what."""

    def __init__(self, handle: int, log: list) -> None:
        self.cuda_stream, self.log = handle, log

    def record_event(self) -> str:
        self.log.append(f"event on {self.cuda_stream}")
        return f"event of {self.cuda_stream}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.cuda_stream} waits for {event}")


@pytest.fixture
def cuda(monkeypatch):
    """`ema_update` of the Triton backend on CPU tensors that say they are on a GPU.

    A namespace with `log`, what was done on streams, `stream`, the present one, and `capturing`.
    """
    module = importlib.import_module("selfnpo_kernels.triton.ema_update")

    class State:
        log: list = []  # noqa: RUF012
        capturing = False

        def call(self, tensors, known) -> None:
            module.ema_update(tensors, tensors, [], 0.5, known)

        def known(self, tensors):
            known = module.CACHE.find((tensors, tensors, []), lambda: None)
            known.device = torch.device("cuda", 1)
            return known

    state = State()
    state.log = []
    state.stream = FakeStream(0, state.log)
    monkeypatch.setattr(module, "CACHE", ListCache())
    monkeypatch.setattr(module, "launch", lambda *_, **__: state.log.append(f"launch on {state.stream.cuda_stream}"))
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: state.stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    to = torch.Tensor.to

    def moved(tensor, device, non_blocking):
        state.log.append(f"upload on {state.stream.cuda_stream}, {device}, {non_blocking}")
        return to(tensor, "cpu")

    def recorded(tensor, stream):
        state.log.append(f"in use by {stream.cuda_stream}")

    monkeypatch.setattr(torch.Tensor, "to", moved)
    monkeypatch.setattr(torch.Tensor, "record_stream", recorded)
    return state


def test_every_stream_waits_once_for_the_tables_and_keeps_their_memory(cuda):
    tensors = [torch.ones(3)]
    known = cuda.known(tensors)
    for handle in (0, 0, 7, 7, 0):
        cuda.stream = FakeStream(handle, cuda.log)
        cuda.call(tensors, known)
    uploads = ["upload on 0, cuda:1, True"] * 2 + ["event on 0"]
    first, later = (
        [f"{handle} waits for event of 0", *[f"in use by {handle}"] * 2, f"launch on {handle}"] for handle in (0, 7)
    )
    assert cuda.log == [*uploads, *first, "launch on 0", *later, "launch on 7", "launch on 0"]


def test_a_captured_launch_needs_tables_and_keeps_them(cuda):
    module = importlib.import_module("selfnpo_kernels.triton.ema_update")
    tensors = [torch.ones(3)]
    known = cuda.known(tensors)
    cuda.capturing = True
    with pytest.raises(RuntimeError, match="call it once with this list of tensors before"):
        cuda.call(tensors, known)
    assert cuda.log == []
    cuda.capturing = False
    cuda.call(tensors, known)
    cuda.capturing, cuda.stream = True, FakeStream(9, cuda.log)
    cuda.log.clear()
    cuda.call(tensors, known)
    assert cuda.log == ["launch on 9"], "a capture cannot wait for what was not captured"
    table, freed = known.prepared.launches[0][0], []
    weakref.finalize(table, freed.append, 1)
    del table, known
    module.CACHE.max_bytes = 1
    module.CACHE.find(([torch.ones(4)],), lambda: None)
    gc.collect()
    assert len(module.CACHE) == 1
    assert not freed, "the graph reads the table"

"""A negative that is detached while calls are under way: in other threads, and in this one.

Threads stop at events inside of a layer or between two steps, so that every order is certain.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import stock
import tiny
import torch
from attached import KINDS, SD, Setting, assert_clean, assert_same
from diffusers import StableDiffusionPipeline
from torch import nn

from selfnpo_fast.runtime.errors import UserError


@pytest.fixture(params=KINDS)
def setting(request) -> Setting:
    return Setting(request.param)


class Stop:
    """A point that the first thread to come there `at`-th stops at, until `release`."""

    def __init__(self, at: int = 1) -> None:
        self._left, self._reached, self._go = at, threading.Event(), threading.Event()

    def __call__(self, *_args) -> None:
        self._left -= 1
        if self._left == 0:
            self._reached.set()
            self._go.wait()

    def inside(self, module: nn.Module) -> Stop:
        module.register_forward_pre_hook(self)
        return self

    def between_steps(self, pipe, step, t, kwargs: dict) -> dict:
        """As callback_on_step_end."""
        self()
        return kwargs


class Running:
    """A call in a thread of its own, which has come to its stop."""

    def __init__(self, stop: Stop, call: Callable[[], torch.Tensor]) -> None:
        self._stop, self._call, self._result = stop, call, None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self._result = self._call()
        except Exception as error:  # given to the test
            self._result = error
        finally:
            self._stop._reached.set()  # whatever happens, no test waits for ever

    def __enter__(self) -> Running:
        self._thread.start()
        self._stop._reached.wait()
        return self

    def __exit__(self, *_) -> None:
        self._stop._go.set()
        self._thread.join()

    def result(self) -> torch.Tensor:
        self.__exit__()
        if isinstance(self._result, Exception):
            raise self._result
        return self._result


def sibling(pipe) -> StableDiffusionPipeline:
    """Another pipeline on the same denoiser. Neither a scheduler nor a tokenizer is thread-safe."""
    separate = {"scheduler": tiny.scheduler(), "tokenizer": tiny.tokenizer()}
    other = StableDiffusionPipeline(**(pipe.components | separate), requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


STOPS = ["first step", "last step", "second network", "between steps"]


@pytest.mark.parametrize("where", STOPS)
def test_a_call_of_another_thread_finishes_with_its_negative(setting, where):
    unet, changes = setting.pipe.unet, {}
    if where == "between steps":
        stop = Stop()
        changes["callback_on_step_end"] = stop.between_steps
    elif where == "second network" and setting.kind == "full":
        stop = Stop().inside(setting.network.mid_block)
    else:
        stop = Stop(stock.STEPS if where == "last step" else 1).inside(unet.mid_block)
    other = sibling(setting.pipe)
    handle = setting.attach(other)
    with Running(stop, lambda: stock.draw(other, **changes)) as running:
        handle.detach()
        assert not handle.attached
        # What begins now is plain, while the other is still under way.
        assert_same(stock.draw(setting.pipe), setting.plain)
        with pytest.raises(UserError, match=r"has a negative already.* let calls that are under way finish") as caught:
            setting.attach()
        assert "\n" not in str(caught.value)
        assert_same(running.result(), setting.guided)
    assert_clean(unet)  # by the end of the call
    assert not {"check_inputs", "maybe_free_model_hooks"} & (vars(other).keys() | vars(setting.pipe).keys())
    for pipe in (setting.pipe, other):
        assert_same(stock.draw(pipe), setting.plain)
    with setting.attach():
        assert_same(stock.draw(other), setting.guided)
    assert_clean(unet)


def test_a_call_without_guidance_is_not_disturbed(setting):
    call = {"guidance_scale": 1.0, "prompts": 2}
    expected = stock.draw(setting.pipe, **call)
    stop = Stop().inside(setting.pipe.unet.mid_block)
    handle = setting.attach()
    with Running(stop, lambda: stock.draw(setting.pipe, **call)) as running:
        handle.detach()
        assert torch.equal(running.result(), expected)
    assert_same(stock.draw(setting.pipe), setting.plain)
    assert_clean(setting.pipe.unet)


def test_a_forward_outside_of_a_pipeline_is_not_disturbed(setting):
    generator = torch.Generator().manual_seed(4)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 12, tiny.WIDTH, generator=generator)

    @torch.no_grad()
    def call() -> torch.Tensor:
        return setting.pipe.unet(x, 100, text).sample

    plain, stop = call(), Stop().inside(setting.pipe.unet.mid_block)
    handle = setting.attach()
    with Running(stop, call) as running:
        handle.detach()
        assert torch.equal(running.result(), plain)
    assert_clean(setting.pipe.unet)


def test_a_call_that_fails_lets_the_negative_go(setting):
    def fail(module, args) -> None:
        raise RuntimeError("on purpose")

    stop = Stop().inside(setting.pipe.unet.mid_block)
    handle = setting.attach()
    with Running(stop, lambda: stock.draw(setting.pipe)) as running:
        handle.detach()
        hook = setting.pipe.unet.up_blocks[0].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            running.result()
    hook.remove()
    assert_same(stock.draw(setting.pipe), setting.plain)
    assert_clean(setting.pipe.unet)


def test_detached_by_its_own_callback_the_rest_of_the_call_is_plain(setting):
    """As somebody writes who wants the negative in the first steps alone."""
    expected = stock.build(SD)
    expected.unet = stock.TwoBranches(setting.network, expected.unet)

    def exchange(pipe, step, t, kwargs: dict) -> dict:
        pipe.unet.negative = pipe.unet.positive
        return kwargs

    def detach(pipe, step, t, kwargs: dict) -> dict:
        handle.detach()
        return kwargs

    handle = setting.attach()
    ours = stock.draw(setting.pipe, callback_on_step_end=detach)
    assert_clean(setting.pipe.unet)
    assert_same(ours, stock.draw(expected, callback_on_step_end=exchange))
    assert (ours - setting.guided).abs().max() > 1e-2
    assert (ours - setting.plain).abs().max() > 1e-2


def test_detached_in_a_layer_of_its_own_forward(setting):
    """The forward finishes with the negative: in a call of one step, it is the whole call."""
    guided, plain = stock.reference(SD, setting.network, setting.pipe.unet, num_inference_steps=1), stock.build(SD)
    handle = setting.attach()
    hook = setting.pipe.unet.mid_block.register_forward_pre_hook(lambda module, args: handle.detach())
    assert_same(stock.draw(setting.pipe, num_inference_steps=1), guided)
    hook.remove()
    assert_clean(setting.pipe.unet)
    assert torch.equal(stock.draw(setting.pipe), stock.draw(plain))


@pytest.mark.parametrize("where", ["in a layer", "between steps"])
def test_a_call_of_another_thread_finishes_without_a_negative_that_comes(setting, where):
    stop, changes = Stop(), {}
    if where == "in a layer":
        stop.inside(setting.pipe.unet.mid_block)
    else:
        changes["callback_on_step_end"] = stop.between_steps
    other = sibling(setting.pipe)
    with Running(stop, lambda: stock.draw(other, **changes)) as running:
        handle = setting.attach()
        assert_same(stock.draw(setting.pipe), setting.guided)
        assert_same(running.result(), setting.plain)
    assert_same(stock.draw(other), setting.guided)
    handle.detach()
    assert_same(stock.draw(other), setting.plain)
    assert_clean(setting.pipe.unet)


def test_a_negative_that_comes_and_goes_during_a_call(setting):
    stop = Stop()
    other = sibling(setting.pipe)
    with Running(stop, lambda: stock.draw(other, callback_on_step_end=stop.between_steps)) as running:
        with setting.attach():
            assert_same(stock.draw(setting.pipe), setting.guided)
        assert_same(running.result(), setting.plain)
    assert_same(stock.draw(setting.pipe), setting.plain)
    assert_clean(setting.pipe.unet)


def test_attached_by_its_own_callback_the_rest_of_the_call_is_guided(setting):
    expected = stock.build(SD)
    expected.unet = stock.TwoBranches(expected.unet, expected.unet)

    def exchange(pipe, step, t, kwargs: dict) -> dict:
        pipe.unet.negative = setting.network
        return kwargs

    def attach(pipe, step, t, kwargs: dict) -> dict:
        if step == 0:
            setting.attach()
        return kwargs

    ours = stock.draw(setting.pipe, callback_on_step_end=attach)
    assert_same(ours, stock.draw(expected, callback_on_step_end=exchange))
    assert (ours - setting.plain).abs().max() > 1e-2


def test_of_two_threads_that_attach_one_succeeds(setting, monkeypatch):
    """Both have found the denoiser free before the first one has attached."""
    import selfnpo_fast.guidance.attach as attach

    both, load, outcomes = threading.Barrier(2), attach.load_negative, []

    def loading(*args, **options):
        both.wait()
        return load(*args, **options)

    def run() -> None:
        try:
            outcomes.append(setting.attach())
        except UserError as error:
            outcomes.append(error)

    monkeypatch.setattr(attach, "load_negative", loading)
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (error,) = [outcome for outcome in outcomes if isinstance(outcome, UserError)]
    assert "has a negative already" in str(error)
    assert_same(stock.draw(setting.pipe), setting.guided)


def test_a_denoiser_that_changes_while_it_is_read_has_a_negative_by_then(setting, monkeypatch):
    import selfnpo_fast.guidance.attach as attach

    error, load = RuntimeError("dictionary changed size during iteration"), attach.load_negative

    def fails(*_, **__) -> None:
        raise error

    def other_first(*_, **__) -> None:
        monkeypatch.setattr(attach, "load_negative", load)
        setting.attach()
        raise error

    monkeypatch.setattr(attach, "load_negative", fails)
    with pytest.raises(RuntimeError, match="dictionary changed size"):
        setting.attach()
    monkeypatch.setattr(attach, "load_negative", other_first)
    with pytest.raises(UserError, match="has a negative already"):
        setting.attach()
    assert_same(stock.draw(setting.pipe), setting.guided)

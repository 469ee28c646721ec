"""Lockstep rollouts decide on the host which forwards run, and never wait for the device."""

from __future__ import annotations

import pytest
import torch
from recording import ASKS
from test_rollout import Run, config
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from selfnpo_fast.rollout import lockstep, pairs
from selfnpo_fast.runtime.upload import upload


class OnDevice(TorchDispatchMode):
    """Follows what depends on uploaded tensors; `asked` are the ops that read a value of those."""

    def __init__(self) -> None:
        super().__init__()
        self.storages, self.alive, self.asked = set(), [], []

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """Take a tensor, which is returned, for one on the device."""
        self.storages.add(tensor.untyped_storage()._cdata)
        self.alive.append(tensor)
        return tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        depends = any(tensor.untyped_storage()._cdata in self.storages for tensor in given)
        if depends and func.overloadpacket.__name__ in ASKS:
            self.asked.append(func.overloadpacket.__name__)
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out) if depends else ():
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return out


class Moves(TorchFunctionMode):
    """Counts plain copies to a device that may be another one."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.to and any(isinstance(argument, torch.device) for argument in args):
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("start", "stop"), [("noise", "uniform"), ("noise", "fixed"), ("data", "uniform")])
def test_the_host_waits_for_nothing(start, stop, monkeypatch):
    rollout = Run(config(mode="lockstep", start=start, stop=stop, k=4, omega=-3.0), dropout=0.5).make()
    rollout.maker.predictor.branches.batched = True
    rollout.next_pairs()
    device, moves, uploads = OnDevice(), Moves(), []

    def uploaded(tensor, to):
        uploads.append(to)
        return device.add(tensor.clone())

    for module in (lockstep, pairs):
        monkeypatch.setattr(module, "upload", uploaded)
    with moves, device:
        rollout.next_pairs()
    assert device.asked == []
    assert moves.count == (start == "data"), "indices of latents, which are on the host"
    assert len(uploads) >= 7


def test_an_upload_is_one_more_piece_of_the_stream_s_work(monkeypatch):
    x, log = torch.arange(3), []
    assert upload(x, torch.device("cpu")) is x
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: log.append("pinned") or tensor)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda tensor, device, non_blocking=False: log.append((device, non_blocking))
    )
    upload(x, torch.device("cuda", 1))
    assert log == ["pinned", (torch.device("cuda", 1), True)]

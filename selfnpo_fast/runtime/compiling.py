"""torch.compile where it pays: whole steps of the reference, repeated blocks of the student."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable

import torch
from torch import nn

from selfnpo_fast.runtime.console import logger, say_once

MODES = {"default": None, "max": "max-autotune-no-cudagraphs"}
"""The mode of torch.compile for each `engine.compile`. CUDA graphs are made by capture.py."""
RECOMPILES = 64
"""Shapes that blocks of one kind may have; torch stops at 8."""


def compiled(function: Callable, choice: str, *, dynamic: bool = False) -> Callable:
    """`function` compiled as one graph, or `function` itself where `choice` is off."""
    if choice == "off":
        return function
    return torch.compile(function, fullgraph=True, dynamic=dynamic, mode=MODES[choice])


def compile_blocks(module: nn.Module, names: Iterable[str], choice: str, *, training: bool = False) -> int:
    """Compile the blocks of which a denoiser has many; returns how many there are.

    `names` are the blocks' classes, to which diffusers' own list is added (`block_kinds`).

    Blocks of one kind and shape share their code, so this takes a fraction of the time that the
    whole network takes. The module keeps its parameters, names and hooks. With `training`, calls
    without gradients stay uncompiled: those of sample grids, and of a reference that is the same
    network, have too many shapes to compile each.
    """
    if choice == "off":
        return 0
    kinds = block_kinds(module, names)
    blocks = repeated_blocks(module, kinds)
    if not getattr(module, "_repeated_blocks", None) and kinds - {*names}:
        listed = ", ".join(f"{sum(type(b).__name__ == kind for b in blocks)} {kind}" for kind in sorted(kinds))
        name = type(module).__name__
        say_once(f"engine.compile: diffusers lists no repeated blocks of {name}; what is compiled: {listed}")
    limit = _recompile_limit() if blocks else {}
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False, mode=MODES[choice], **limit)
        if training:
            block._compiled_call_impl = _with_gradients(block._compiled_call_impl, block._call_impl)
    logger.info("engine.compile: %d blocks of the student; the first updates take longer", len(blocks))
    return len(blocks)


def block_kinds(module: nn.Module, names: Iterable[str]) -> set[str]:
    """The classes of the blocks that a denoiser has many of: `names` and diffusers'
    `_repeated_blocks`.

    Where diffusers leaves that list empty, as for CogVideoX and SD3, its `_no_split_modules` are
    taken, those of them that stand in a list of modules: a patch embedding does not.
    """
    listed = getattr(module, "_repeated_blocks", None)
    if not listed:
        unsplit, lists = getattr(module, "_no_split_modules", None) or (), _lists_of(module)
        listed = {type(block).__name__ for blocks in lists for block in blocks.modules()} & {*unsplit}
    return {*names, *listed}


def repeated_blocks(module: nn.Module, kinds: set[str]) -> list[nn.Module]:
    """The modules in `module` whose classes have one of the names `kinds`, in its order."""
    return [block for block in module.modules() if type(block).__name__ in kinds]


def _lists_of(module: nn.Module) -> list[nn.ModuleList]:
    return [part for part in module.modules() if isinstance(part, nn.ModuleList)]


def _recompile_limit() -> dict[str, int]:
    """The argument of torch.compile that sets RECOMPILES. Where torch has none, as before 2.13, its
    setting for the whole process is raised instead."""
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return {"recompile_limit": RECOMPILES}
    from torch._dynamo import config as settings  # late: runs that compile nothing do not need it

    if settings.recompile_limit < RECOMPILES:
        settings.recompile_limit = RECOMPILES
        say_once(
            f"engine.compile: torch {torch.__version__} has no limit of its own for the student's blocks; "
            f"all compiled code of this process may be compiled for {RECOMPILES} shapes"
        )
    return {}


def _with_gradients(compiled: Callable, plain: Callable) -> Callable:
    """A function that is `compiled` while gradients are recorded, and `plain` otherwise."""

    def call(*args, **kwargs):
        return (compiled if torch.is_grad_enabled() else plain)(*args, **kwargs)

    return call

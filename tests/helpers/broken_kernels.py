"""Kernels whose results are wrong, for tests of gates that have to see it."""

from __future__ import annotations

from selfnpo_kernels import backends


def break_kernel(monkeypatch, op: str, damage) -> None:
    """Calls `damage(arguments, results)` after each call of the op, except on the reference."""
    right = backends.implementation

    def implementation(name, arguments):
        run = right(name, arguments)
        if name != op or backends._forced == "reference":
            return run

        def wrong(*given):
            out = run(*given)
            damage(given, out)
            return out

        return wrong

    monkeypatch.setattr(backends, "implementation", implementation)


def a_little(which: int):
    """Damage: result number `which` is off by 1e-4, a hundred times the rounding error."""
    return lambda given, out: (out[which] if isinstance(out, tuple) else out).mul_(1.0001)

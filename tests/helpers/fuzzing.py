"""What the fuzz tests share: repeatable settings, and what a refusal has to look like."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings

SLOW_STARTERS = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]


def fuzz(examples: int) -> settings:
    """The same examples on every machine and in every run.

    They are not shrunk, since an example may be a whole training run.
    """
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=SLOW_STARTERS,
    )


def call(main: Callable[[list[str]], int], words: Iterable[str]) -> tuple[int, str]:
    """Exit code and standard error of a command run in this process; lets its exceptions pass."""
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        code = main(list(words))
    return code, error.getvalue()


def assert_refused(code: int, error: str, *words: str) -> None:
    """Exit code 2, and one line of readable length that starts with `error: ` and holds `words`."""
    assert code == 2, error
    assert_one_line(error.removesuffix("\n"), *words)
    assert error.startswith("error: ")


def assert_one_line(message: str, *words: str) -> None:
    """One line of readable length that holds `words`, and no traceback."""
    assert message == message.strip() != ""
    assert len(message.splitlines()) == 1, message
    assert "Traceback" not in message
    assert len(re.sub(r"/\S+", "", message)) < 600, message
    for word in words:
        assert word in message


class Marked:
    """An object whose unpickling makes the folder `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def hostile_pickle(marker: Path) -> bytes:
    return pickle.dumps({"conv_in.weight": Marked(marker)})

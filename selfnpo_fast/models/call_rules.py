"""How a forward call of a pipeline's denoiser is told to belong to the positive or the negative
branch.

The rules rely on the source of diffusers' pipelines: on locals of their `__call__`, and on the
order in which they stack rows. `tests/guidance/test_attach_reading.py` holds the source to that.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from selfnpo_fast.runtime.errors import UserError

READ_RELEASES = ("0.42.1",)
"""The releases of diffusers whose pipelines were read for the rules."""


class Branch(enum.Enum):
    """Which rows of a denoiser's call belong to the negative branch."""

    UNGUIDED = enum.auto()
    """None: guidance is off in this step."""
    POSITIVE = enum.auto()
    """None: all rows are those of the prompts, and guidance is on."""
    NEGATIVE = enum.auto()
    """All rows."""
    FIRST_HALF = enum.auto()
    LAST_HALF = enum.auto()

    @property
    def has_negative(self) -> bool:
        """Whether any row is one of the negative branch."""
        return self not in (Branch.UNGUIDED, Branch.POSITIVE)

    @property
    def is_half(self) -> bool:
        """Whether the call holds the rows of both branches."""
        return self in (Branch.FIRST_HALF, Branch.LAST_HALF)


@dataclass(frozen=True)
class DenoiserCall:
    """A forward call of a denoiser, as a rule sees it."""

    pipe: Any
    """The pipeline that is calling."""
    locals: Mapping[str, Any]
    """The locals of that pipeline's `__call__`."""
    arguments: Mapping[str, Any]
    """The denoiser's arguments by name."""
    context: Callable[[], str | None] = lambda: None
    """The name of the pipeline's `cache_context` around the call; None without one."""


@dataclass(frozen=True, kw_only=True)
class CallRule:
    """What all pipelines of a family have in common in calling their denoisers."""

    guided_local: str | None = None
    """The local of `__call__` that says whether guidance is on in the step that is being computed;
    None where the property `do_classifier_free_guidance` does."""

    @property
    def shares_calls(self) -> bool:
        """Whether one call holds the rows of both branches."""
        return False

    def is_guided(self, pipe: Any, local: Mapping[str, Any]) -> bool:
        """Whether guidance is on for the step that a pipeline is computing, by it and its locals."""
        if self.guided_local is None:
            return bool(pipe.do_classifier_free_guidance)
        return bool(local.get(self.guided_local))

    def branch(self, call: DenoiserCall) -> Branch:
        """Which rows of a call are negative. Raises UserError where that cannot be told."""
        raise NotImplementedError

    def why_off(self, local: Mapping[str, Any]) -> str | None:
        """Why guidance is off in a pipeline's call though its user may think otherwise, with the
        mend; None where there is no such reason."""
        return None


@dataclass(frozen=True, kw_only=True)
class OneCall(CallRule):
    """One call in each step, on the rows of both branches."""

    half: Branch = Branch.FIRST_HALF
    """Which half is negative: FIRST_HALF or LAST_HALF."""
    positive_argument: str | None = None
    """An argument that is given in a further call of a step, on positive rows only."""

    @property
    def shares_calls(self) -> bool:
        """See the base."""
        return True

    def branch(self, call: DenoiserCall) -> Branch:
        """See the base."""
        if not self.is_guided(call.pipe, call.locals):
            return Branch.UNGUIDED
        if self.positive_argument is not None and call.arguments.get(self.positive_argument) is not None:
            return Branch.POSITIVE
        return self.half


@dataclass(frozen=True, kw_only=True)
class TwoCalls(CallRule):
    """One call for each branch, which are told apart by the very tensor that is their text.

    Two equal texts are two tensors. Only where a user gives one tensor as both prompts, the name of
    the `cache_context` decides.
    """

    text_argument: str = "encoder_hidden_states"
    prompt_local: str = "prompt_embeds"
    negative_local: str = "negative_prompt_embeds"
    scale_local: str | None = None
    """The argument of `__call__` that has to be above 1; None where that is `guidance_scale`, whose
    default is."""
    given_local: str | None = None
    """The local that says whether a negative prompt was given; None where none is needed."""

    def branch(self, call: DenoiserCall) -> Branch:
        """See the base."""
        if not self.is_guided(call.pipe, call.locals):
            return Branch.UNGUIDED
        text = call.arguments.get(self.text_argument)
        negative = text is not None and text is call.locals.get(self.negative_local)
        positive = text is not None and text is call.locals.get(self.prompt_local)
        if negative != positive:
            return Branch.NEGATIVE if negative else Branch.POSITIVE
        by_context = {"cond": Branch.POSITIVE, "uncond": Branch.NEGATIVE}.get(call.context() or "")
        if by_context is not None:
            return by_context
        if negative:
            raise UserError(
                f"{self.negative_local}: it is the same tensor as {self.prompt_local}, so the calls of the two "
                f"branches cannot be told apart; give {self.negative_local}.clone()"
            )
        raise UserError(
            f"pipe: {self.text_argument} was replaced on its way to the denoiser, so the calls of the two branches "
            "cannot be told apart; leave it as the pipeline gives it, and change the prompts' embeddings instead"
        )

    def why_off(self, local: Mapping[str, Any]) -> str | None:
        """See the base."""
        if self.given_local is None or self.scale_local is None:
            return None
        mends = []
        scale = local.get(self.scale_local)
        if isinstance(scale, int | float) and scale <= 1:
            mends.append(f"{self.scale_local} above 1")
        if not local.get(self.given_local):
            mends.append("negative_prompt=' '")
        if not mends:
            return None
        return f"guidance is off in this call, and the negative is not used: give {' and '.join(mends)}"

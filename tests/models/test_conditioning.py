"""Rows of conditioning: which prompts are encoded, and which row is whose."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from selfnpo_fast.models.conditioning import unique_rows


@given(st.lists(st.sampled_from(["", "a cat", "a dog", "a fish"])))
def test_each_distinct_prompt_is_encoded_once(prompts):
    distinct, indices = unique_rows(prompts)
    assert distinct == list(dict.fromkeys(prompts))
    assert [distinct[i] for i in indices] == prompts

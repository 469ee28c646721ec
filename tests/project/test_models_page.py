"""docs/models.md says what ran and what is refused, and no page claims more."""

from __future__ import annotations

import re
from pathlib import Path

import models_page

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_what_the_tables_say():
    expected = models_page.page()
    assert models_page.PAGE.read_text(encoding="utf-8") == expected, "run python tests/helpers/models_page.py"


def test_no_page_says_that_a_model_is_supported():
    """All that has run, besides the digits, is tiny and random."""
    pages = [ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "configs").glob("*.yaml"))]
    claims = [
        f"{path.name}: {line.strip()}"
        for path in pages
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"\bsupport(s|ed|ing)?\b", line, re.IGNORECASE)
    ]
    assert claims == []

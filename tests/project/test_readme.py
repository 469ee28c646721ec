"""What the pages tell people: links lead somewhere, commands and configs exist, and the README is
short.

No torch is imported: the commands' names are read out of `cli.py`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
CONFIGS = ROOT / "configs"
README_LINES = 150

FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"`[^`\n]+(?:\n[^`\n]+)*`")
LINK = re.compile(r"\]\(([^()\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)
COMMAND = re.compile(r"(?<![\w.-])selfnpo +([\w-]+)")
CONFIG = re.compile(r"configs/([a-z][\w.-]*\.yaml)")  # not configs/FAMILY.yaml


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page.

    They are the headings in lower case without punctuation, with hyphens for spaces and numbers for
    repeats.
    """
    found: list[str] = []
    for title in HEADING.findall(FENCE.sub("", text)):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
        slug = re.sub(r"[^\w\- ]", "", shown).replace(" ", "-")
        repeats = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other) is not None for other in found)
        found.append(f"{slug}-{repeats}" if slug in found else slug)
    return set(found)


def links(text: str) -> list[str]:
    """The targets of all links and images outside of code."""
    return LINK.findall(INLINE_CODE.sub("", FENCE.sub("", text)))


def broken_links(path: Path, root: Path = ROOT) -> list[str]:
    """The links and images of a page that lead to no file below `root`, or to no heading; web
    addresses are skipped."""
    text = path.read_text(encoding="utf-8")
    broken = []
    for link in links(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.is_relative_to(root) or not target.exists():
            broken.append(link)
        elif anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
            broken.append(link)
    return broken


def code_of(text: str) -> Iterator[str]:
    """The blocks of code, then the code within sentences, with spaces for its line breaks."""
    yield from FENCE.findall(text)
    for span in INLINE_CODE.findall(FENCE.sub("", text)):
        yield " ".join(span.strip("`").split())


def documented_commands(text: str) -> set[str]:
    """The word after `selfnpo` wherever it stands in code; COMMAND stands for any."""
    return {word for code in code_of(text) for word in COMMAND.findall(code)} - {"COMMAND"}


def known_commands() -> set[str]:
    """The commands that the usage in cli.py lists."""
    for statement in ast.parse((ROOT / "selfnpo_fast" / "cli.py").read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "USAGE":
            return set(re.findall(r"^  (\w+) {2,}\w", ast.literal_eval(statement.value), re.MULTILINE))
    raise AssertionError("cli.py has no USAGE")


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= README_LINES


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


@pytest.mark.parametrize("page", [README, ROOT / "CONTRIBUTING.md", *DOCS], ids=page_id)
def test_commands_and_configs_exist(page):
    """The changelog is left out: it names what has gone."""
    text = page.read_text(encoding="utf-8")
    assert documented_commands(text) <= known_commands()
    assert [name for name in CONFIG.findall(text) if not (CONFIGS / name).is_file()] == []


def test_pages_show_every_command():
    shown = set().union(*(documented_commands(page.read_text(encoding="utf-8")) for page in [README, *DOCS]))
    assert shown == known_commands() >= {"train", "doctor", "sample", "evaluate", "correlate", "merge"}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_config_says_what_it_is(path):
    """MODEL.yaml is the recipe, MODEL_paper.yaml the authors', and MODEL_lora.yaml names its card."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    kind = next((kind for kind in ("_paper", "_lora") if path.stem.endswith(kind)), "")
    says = {"": "^# The (recommended )?recipe for ", "_paper": "authors'", "_lora": r"^# For one card of \d+ GB: "}
    assert re.search(says[kind], first)


README_PAGE = """# Top

[a](docs/other.md) [b](docs/other.md#one-of-them-a_b) [c](#top) [d](docs/other.md#twice-1)
[e](https://example.org/x) `[f](no/link)`
![g](docs/none.png) [h](#none) [i](docs/other.md#gone) [j](../outside.md) [k](docs/other.md#twice-2)

```
# no heading
[l](no/link)
```

[m](#no-heading)
"""
OTHER_PAGE = """# Other

## One, of `them`: a_b!

## Twice

## Twice

[up](../README.md#top) [n](gone.md)
"""


def test_reader_of_links(tmp_path):
    root = tmp_path / "root"
    (root / "docs").mkdir(parents=True)
    page, other = root / "README.md", root / "docs" / "other.md"
    page.write_text(README_PAGE)
    other.write_text(OTHER_PAGE)
    (tmp_path / "outside.md").write_text("")
    wrong = ["docs/none.png", "#none", "docs/other.md#gone", "../outside.md", "docs/other.md#twice-2", "#no-heading"]
    assert broken_links(page, root) == wrong
    assert broken_links(other, root) == ["gone.md"]


def test_reader_of_commands():
    text = "selfnpo prose, `selfnpo\ndoctor --x`, `selfnpo COMMAND`\n\n```sh\nselfnpo-x a\nbin/selfnpo dance\n```\n"
    assert documented_commands(text) == {"doctor", "dance"}


TEST_FILE = re.compile(r"(?<![\w/])(?:tests/)?(\w+/test_[a-z_0-9]+\.py)")


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_the_tests_that_a_page_names_are_there(path):
    named = TEST_FILE.findall(path.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / "tests" / name).is_file()] == []


def test_troubleshooting_names_the_tests_that_hold_what_it_says():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    paragraphs = re.split(r"^(?=- )", page, flags=re.MULTILINE)[1:]
    assert paragraphs
    assert [text.splitlines()[0] for text in paragraphs if not TEST_FILE.search(text)] == []

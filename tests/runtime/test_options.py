"""The one parser of all commands: words and YAML into dataclasses, docstrings into help."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import os
import re
import textwrap
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, get_type_hints

import pytest
import yaml

from selfnpo_fast.cli import COMMANDS, main
from selfnpo_fast.config import TrainConfig
from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.errors import UserError
from selfnpo_fast.runtime.options import Parsed, parse_options, parse_with_config, section_names


@dataclass(kw_only=True)
class Options:
    """Boil eggs."""

    pot: str = "small"
    """What the eggs
    boil in."""
    minutes: float = 4.5
    """How long."""
    eggs: int | None = None
    """How many; all by default."""
    size: Literal["M", "L"] = "M"
    """Of the eggs."""
    with_salt: bool = False
    """Salt the water."""
    marks: list[int] = field(default_factory=lambda: [1, 2])
    """Numbers to write on the shells."""
    shades: list[Literal["red", "blue"]] = field(default_factory=list)
    """Dyes, one or more."""

    def __post_init__(self) -> None:
        if self.minutes < 0:
            raise UserError(f"minutes: {self.minutes:g} is not possible; expected 0 or more")


@dataclass(kw_only=True)
class Heat:
    """How the water is heated."""

    watts: int = 900
    """Power."""
    levels: tuple[float, float] = (0.5, 1.0)
    """At the start and at the end."""
    lid: bool = True
    """Cover the pot."""


@dataclass(kw_only=True)
class Config:
    """A stove."""

    heat: Heat = field(default_factory=Heat)
    name: str = "stove"
    """What to call it."""
    shelves: list[str] = field(default_factory=lambda: ["top"])
    """Where the pots stand."""


def options(*words: str) -> Options:
    return parse_options(Options, words, "selfnpo boil")


def refusal(*words: str) -> str:
    """The one line that refuses the words."""
    with pytest.raises(UserError) as caught:
        options(*words)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_no_words_give_the_defaults():
    assert options() == Options()
    assert options().marks is not options().marks


def test_values_take_the_type_of_their_field():
    given = options("--pot", "7", "--minutes", "3", "--eggs=12", "--size", "L")
    assert given == Options(pot="7", minutes=3.0, eggs=12, size="L")
    assert isinstance(given.minutes, float)
    assert options("--eggs", "null").eggs is None
    assert options("--pot", "a: b").pot == "a: b"
    assert options("--eggs", "-1").eggs == -1
    assert options("--eggs", "1", "--eggs", "2").eggs == 2


def test_lists_take_several_words():
    assert options("--marks", "3", "4", "5", "--eggs", "2") == Options(marks=[3, 4, 5], eggs=2)
    assert options("--marks=7").marks == [7]
    assert options("--shades", "blue", "red").shades == ["blue", "red"]


def test_flags_take_no_value():
    assert options("--with_salt", "--eggs", "2") == Options(with_salt=True, eggs=2)
    assert "true" in refusal("--with_salt", "true")
    assert "with_salt" in refusal("--with_salt=true")


def test_hyphens_spell_underscores_in_names_only():
    assert options("--with-salt").with_salt
    assert options("--pot=--with-salt").pot == "--with-salt"
    assert options("--pot", "with-salt").pot == "with-salt"
    assert "--not-an-option" in refusal("--not-an-option", "1")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--colour", "red"], "--colour"),
        (["--po", "large"], "--po"),  # no abbreviations
        (["large"], "large"),
        (["--minutes", "long"], '"minutes"'),
        (["--minutes"], "--minutes"),
        (["--eggs", "1.5"], '"eggs"'),
        (["--eggs", "x\ny"], '"eggs"'),
        (["--pot", "--eggs", "2"], "--pot"),
        (["--size", "S"], '"size"'),
        (["--marks"], "--marks"),
        (["--marks", "1", "x"], '"marks"'),
        (["--shades", "green"], '"shades"'),
        (["--minutes", "-1"], "minutes: -1 is not possible; expected 0 or more"),
        (["--config", "x.yaml"], "--config"),
    ],
)
def test_bad_words_are_refused_in_one_line(words, part):
    assert part in refusal(*words)


def help_of(parse, capsys) -> str:
    """What `--help` prints, as one line."""
    with pytest.raises(SystemExit) as caught:
        parse()
    assert caught.value.code == 0
    return squeezed(capsys.readouterr().out)


def squeezed(text: str) -> str:
    """`text` without white space, since argparse breaks lines, also within words."""
    return re.sub(r"\s", "", text)


def test_help_is_the_docstrings(capsys):
    text = help_of(lambda: options("--help"), capsys)
    assert text.startswith(squeezed("usage: selfnpo boil"))
    described = {
        "pot": "What the eggs boil in.",
        "minutes": "How long.",
        "with_salt": "Salt the water.",
        "marks": "Numbers to write on the shells.",
        "shades": "Dyes, one or more.",
    }
    listing = text[text.index("options:") :]
    positions = [listing.index(f"--{name}") for name in ("pot", "minutes", "eggs", "size", "with_salt", "marks")]
    assert positions == sorted(positions)
    for name, words in described.items():
        assert squeezed(words) in listing[listing.index(f"--{name}") :]
    assert "default:4.5" in text
    assert "Boileggs." in text


# With a config


@pytest.fixture
def default(tmp_path) -> Path:
    path = tmp_path / "default.yaml"
    path.write_text("heat:\n  watts: 800\nname: the default\n")
    return path


@pytest.fixture
def logged(monkeypatch) -> list[str]:
    """The lines of the log."""
    lines: list[str] = []
    monkeypatch.setattr(logger, "info", lambda text, *values: lines.append(text % values))
    return lines


def parsed(default: Path, *words: str) -> Parsed[Options, Config]:
    return parse_with_config(Options, Config, words, "selfnpo boil", default)


def test_the_default_config_is_named_once(default, logged):
    found = parsed(default)
    assert found.config == Config(heat=Heat(watts=800), name="the default")
    assert found.options == Options()
    assert not found.config_named
    assert logged == [f"no --config given: running {default}"]


@pytest.mark.parametrize("words", [["--config", "{}"], ["--config={}"]])
def test_a_config_that_is_named_takes_the_place_of_the_default(default, logged, tmp_path, words):
    file = tmp_path / "file.yaml"
    file.write_text("heat: {lid: false}\nshelves: [left, right]\n")
    found = parsed(default, *(word.format(file) for word in words))
    assert found.config == Config(heat=Heat(lid=False), shelves=["left", "right"])
    assert found.config_named
    assert logged == []


def test_the_later_word_wins(default, tmp_path):
    file = tmp_path / "file.yaml"
    file.write_text("heat: {watts: 1, levels: [0.1, 0.2]}\n")
    found = parsed(default, "--heat.watts", "3", "--config", str(file), "--name", "mine", "--heat.lid=false")
    assert found.config == Config(heat=Heat(watts=1, levels=(0.1, 0.2), lid=False), name="mine")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], False),
        (["--with-salt"], False),
        (["--eggs", "-1", "--pot=--name", "--marks", "1", "2"], False),
        (["--name", "x"], True),
        (["--eggs", "2", "--heat.watts=900"], True),
    ],
)
def test_config_named_is_about_the_words_of_the_config(default, words, named):
    assert parsed(default, *words).config_named is named


def test_text_is_the_config_with_its_defaults(default):
    found = parsed(default, "--heat.levels", "[0.25, 0.75]", "--eggs", "3")
    assert yaml.safe_load(found.text) == {
        "heat": {"watts": 800, "levels": [0.25, 0.75], "lid": True},
        "name": "the default",
        "shelves": ["top"],
    }
    default.write_text(found.text)
    assert parsed(default).config == found.config


def test_options_may_stand_in_the_file_but_flags_are_flags(default):
    default.write_text("with_salt: true\neggs: 4\n")
    assert parsed(default).options == Options(with_salt=True, eggs=4)
    default.write_text("with_salt: maybe\n")
    with pytest.raises(UserError, match=r"^--with_salt: it takes no value, not 'maybe'$"):
        parsed(default)


@pytest.mark.parametrize("words", [["--heat", "pathlib.Path"], ["--heat={watts: 3}"], ["--heat"]])
def test_a_section_has_no_value_on_the_command_line(default, words):
    with pytest.raises(UserError, match=r"^--heat: it has no value of its own; give its fields, as --heat"):
        parsed(default, *words)


@pytest.mark.parametrize("value", ["3", "pathlib.Path", "null", "[]", "''"])
def test_a_section_has_no_value_in_a_file(default, value):
    default.write_text(f"name: x\nheat: {value}\n")
    with pytest.raises(UserError, match="heat: it has no value of its own; write its fields, indented, below it"):
        parsed(default)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--heat.colour", "red"], "--heat.colour"),
        (["--heat.watts", "many"], '"heat.watts"'),
        (["--heat.levels", "[0.1]"], '"heat.levels"'),
        (["--heat.lid"], "--heat.lid"),
        (["--heat.class_path=pathlib.Path"], "--heat.class_path"),
        (["--config"], "--config"),
        (["--config", "/no/such/file.yaml"], "/no/such/file.yaml"),
        (["--eggs", "x"], '"eggs"'),
        (["--minutes", "-1"], "minutes: -1 is not possible"),
    ],
)
def test_bad_words_with_a_config_are_refused_in_one_line(default, words, part):
    with pytest.raises(UserError) as caught:
        parsed(default, *words)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_help_with_a_config(default, logged, capsys):
    text = help_of(lambda: parsed(default, "--help"), capsys)
    for words in ("--eggs", "How many; all by default.", "--name", "What to call it.", "--heat.watts", "Power."):
        assert squeezed(words) in text
    for words in ("How the water is heated.", "At the start and at the end.", "(type: int, default: 900)"):
        assert squeezed(words) in text
    assert not re.search(r"--heat\b(?!\.)", text), "a section is no option"
    assert logged == []


def test_section_names():
    assert section_names(Config) == {"heat"}
    assert section_names(Heat) == set()


# The help of the commands


def documented(cls: type, section: str = "") -> dict[str, str]:
    """The docstring below each field of a dataclass and its sections, by the option's name."""
    found, kinds = {}, get_type_hints(cls)
    (body,) = (node.body for node in ast.parse(textwrap.dedent(inspect.getsource(cls))).body)
    for node, below in itertools.pairwise(body):
        if isinstance(node, ast.AnnAssign):
            name = node.target.id
            if hasattr(kinds[name], "__dataclass_fields__"):
                found |= documented(kinds[name], f"{name}.")
            else:
                found[f"--{section}{name}"] = below.value.value
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_every_command_has_its_help(command, capsys):
    module = importlib.import_module(COMMANDS[command])
    (cls,) = (
        kind for name, kind in vars(module).items() if name.endswith("Options") and kind.__module__ == module.__name__
    )
    helps = documented(cls) | (documented(TrainConfig) if command in ("train", "doctor") else {})
    assert {f"--{field.name}" for field in fields(cls)} <= helps.keys()
    text = help_of(lambda: main([command, "--help"]), capsys)
    listing = text[text.index("options:") :]
    for name, help in helps.items():
        at = listing.index(name)
        assert squeezed(help) in listing[at : at + 1000], name


# Text in YAML.


@pytest.mark.parametrize(
    "word", ["off", "on", "no", "yes", "True", "1e3", "0123", "12", "1_0", ".5", "0x1f", "12:30", "it's"]
)
def test_text_in_yaml_stays_what_is_written(word, tmp_path):
    """YAML reads a truth value or a number where nobody has put quotes."""
    file = tmp_path / "config.yaml"
    # A comment in two alphabets: positions are counted in characters.
    file.write_text(f"# für 猫 👩\nname: {word}  # a name\nshelves: [{word}, 'top']\nheat: {{lid: off, watts: 1_0}}\n")
    config = parse_with_config(Options, Config, ["--config", str(file)], "selfnpo boil", Path("none")).config
    assert (config.name, config.shelves) == (word, [word, "top"])
    assert (config.heat.lid, config.heat.watts) == (False, 10), "what is no text is read as ever"


@pytest.mark.parametrize("word", ["off", "'off'", '"off"'])
def test_a_choice_may_be_called_off(word, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(f"engine:\n  compile: {word}\n  channels_last: off\noutput: 1e3\nmodel:\n  variant: null\n")
    config = parse_with_config(Options, TrainConfig, ["--config", str(file)], "selfnpo train", Path("none")).config
    assert (config.engine.compile, config.engine.channels_last) == ("off", False)
    assert (config.output, config.model.variant) == ("1e3", None)


def test_a_config_is_a_regular_file(tmp_path):
    """A pipe would be waited for, and a device read for ever."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    expected = {
        str(tmp_path / "pipe"): "is no regular file",
        "/dev/zero": "is no regular file",
        str(tmp_path): "is no regular file",
        str(tmp_path / "latin.yaml"): "is not UTF-8 text",
        "a\0b": "is not possible; expected text without NUL",
        "a\udcffb": "is not possible; expected text without NUL",
    }
    for path, reason in expected.items():
        for words in (["--config", path], [f"--config={path}"]):
            with pytest.raises(UserError, match=f"^--config: .*{reason}"):
                parse_with_config(Options, Config, words, "selfnpo boil", Path("none"))

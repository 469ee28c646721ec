"""The one parser of all commands: words, and for some commands a YAML config, fill dataclasses.

Each field of such a dataclass is an option. The docstring below the field is the option's help.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Generic, TypeVar, get_args, get_origin, get_type_hints

from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.errors import UserError, one_line, shortened
from selfnpo_fast.runtime.files import read_text
from selfnpo_fast.runtime.plain_yaml import MAX_YAML_CHARACTERS, load_yaml

OptionsT = TypeVar("OptionsT")
ConfigT = TypeVar("ConfigT")
_UNWRITABLE = re.compile("[\x00\ud800-\udfff]")
"""NUL, which no file name holds, and surrogates, for which UTF-8 has no bytes."""


@dataclass(frozen=True)
class Parsed(Generic[OptionsT, ConfigT]):
    """A parsed command line of a command that takes a config."""

    options: OptionsT
    """The command's options."""
    config: ConfigT
    """The config."""
    text: str
    """The config as YAML, with the values that nobody gave."""
    config_named: bool
    """Whether the command line names a config file or a field of the config."""


def parse_options(cls: type[OptionsT], argv: Sequence[str], prog: str) -> OptionsT:
    """An instance of the options dataclass `cls` from `--name value` words.

    All fields of `cls` have defaults. `--several-words` and `--several_words` name the same field.
    A bool is a flag without a value, and a list takes several words: `--brief`,
    `--negative runs/a runs/b`. `prog` is the command's name in the help. `--help` prints the help
    and raises SystemExit. Raises UserError, of one line, for unknown options and values that do
    not fit.
    """
    parser = _parser(prog, cls)
    _add_options(parser, cls)
    with _user_errors():
        values = vars(parser.parse_args(_underscored(argv, cls)))
        _check_text(values)
        return cls(**values)


def parse_with_config(
    cls: type[OptionsT], config_cls: type[ConfigT], argv: Sequence[str], prog: str, default: Path
) -> Parsed[OptionsT, ConfigT]:
    """The options `cls` as in `parse_options`, and a `config_cls` from YAML and dotted words.

    `--config FILE` reads a file, and `--section.field value` sets one field; the later word wins.
    Without `--config` the file `default` is read, and the log names it. A field of `config_cls`
    that holds a dataclass is a section: only the section's fields have values. Raises like
    `parse_options`.
    """
    import yaml
    from jsonargparse import set_loader

    # What the words name: sections are refused, and without a config the default one is taken.
    sections = section_names(config_cls)
    words = _underscored(argv, cls)
    names = [word.partition("=")[0] for word in words if word.startswith("--")]
    for name in names:
        if name[2:] in sections:
            raise UserError(f"{name}: it has no value of its own; give its fields, as {name}.field VALUE")
    if "--config" not in names and not {"-h", "--help"} & set(words):
        logger.info("no --config given: running %s", default)
        words = ["--config", str(default), *words]

    _check_config_files(words)
    # The parser, with a loader of YAML that imports nothing.
    texts = text_names(config_cls)
    set_loader("plain_yaml", lambda text: load_yaml(text, sections, texts), exceptions=(yaml.YAMLError, UserError))
    parser = _parser(prog, cls, parser_mode="plain_yaml")
    parser.add_argument("--config", action="config", help="YAML file; later options override it")
    _add_config(parser, config_cls)
    _add_options(parser, cls)
    # The values: those of the command's options, and what remains is the config.
    with _user_errors():
        values = parser.parse_args(words)
        values.pop("config")
        options = {field.name: values.pop(field.name) for field in fields(cls)}
        _check_text(options)
        for name, kind in get_type_hints(cls).items():
            # A config file may hold the key, too, and jsonargparse takes any value of a flag there.
            if kind is bool and not isinstance(options[name], bool):
                raise UserError(f"--{name}: it takes no value, not {one_line(options[name], 80)!r}")
        return Parsed(
            options=cls(**options),
            config=_instance(config_cls, values),
            text=parser.dump(values, skip_validation=True),
            config_named=any(name[2:] not in options for name in names),
        )


def _check_config_files(words: Sequence[str]) -> None:
    """Raise UserError for a config file that is no regular file, too large or no UTF-8.

    jsonargparse would wait for a pipe, and read a device for ever.
    """
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        path = value if equals else following
        if name == "--config":
            _check_text({name: path})
            if os.path.exists(path):  # what is not there is refused by jsonargparse
                read_text(path, name, 4 * MAX_YAML_CHARACTERS)


def section_names(config_cls: type) -> frozenset[str]:
    """The fields of a config dataclass that hold dataclasses."""
    return frozenset(name for name, kind in get_type_hints(config_cls).items() if is_dataclass(kind))


def text_names(config_cls: type, prefix: str = "") -> frozenset[str]:
    """The dotted names of all fields of a config dataclass whose values are text, or lists of it."""
    names = set()
    for name, kind in get_type_hints(config_cls).items():
        if is_dataclass(kind):
            names |= text_names(kind, f"{prefix}{name}.")
        elif _is_text(kind):
            names.add(prefix + name)
    return frozenset(names)


def _is_text(kind: object) -> bool:
    """Whether a field's type is str, a Literal of str, a list of these, or one of these or None."""
    parts = [part for part in get_args(kind) if part is not NoneType]
    return kind is str or (bool(parts) and all(isinstance(part, str) or _is_text(part) for part in parts))


def _check_text(values: dict[str, object]) -> None:
    """Raise UserError for text that no file or file name can hold."""
    for name, value in values.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and _UNWRITABLE.search(text):
                raise UserError(
                    f"{name}: {shortened(text)} is not possible; expected text without NUL, and of UTF-8's characters"
                )


def _underscored(argv: Sequence[str], cls: type) -> list[str]:
    """The words of `argv`; `--several-words` becomes `--several_words` if `cls` has that field."""
    option_names = {f"--{field.name}" for field in fields(cls)}
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        underscored = "--" + name[2:].replace("-", "_")
        is_option = word.startswith("--") and underscored in option_names
        words.append(underscored + equals + value if is_option else word)
    return words


def _parser(prog: str, cls: type, **settings):
    """A jsonargparse.ArgumentParser without options, described by the docstring of `cls`."""
    from jsonargparse import ArgumentParser

    return ArgumentParser(prog=prog, description=cls.__doc__, exit_on_error=False, allow_abbrev=False, **settings)


def _add_options(parser, cls: type) -> None:
    """Add an option for each field of the options dataclass `cls`, in order."""
    kinds, helps, defaults = get_type_hints(cls), _field_docs(cls), cls()
    for field in fields(cls):
        kind, default = kinds[field.name], getattr(defaults, field.name)
        if kind == str | None:
            kind = str  # else words such as `# one` or `&c`, which YAML reads as nothing, are lost
        if kind is bool:
            form = {"action": "store_true"}
        elif get_origin(kind) is list:
            form = {"nargs": "+", "type": get_args(kind)[0], "default": default}
        else:
            form = {"type": kind, "default": default}
        parser.add_argument(f"--{field.name}", help=helps[field.name], **form)


def _add_config(parser, cls: type, section: str = "") -> None:
    """Add an option for each field of the config dataclass `cls` or of its sections, in order.

    jsonargparse is not told the classes of the sections: it would import any class that a value
    names instead.
    """
    kinds, helps, defaults = get_type_hints(cls), _field_docs(cls), cls()
    group = parser.add_argument_group(section, cls.__doc__) if section else parser
    for field in fields(cls):
        name = f"{section}.{field.name}" if section else field.name
        kind = kinds[field.name]
        if is_dataclass(kind):
            _add_config(parser, kind, name)
        else:
            group.add_argument(f"--{name}", type=kind, default=getattr(defaults, field.name), help=helps[field.name])


@functools.cache  # it reads the source of the class
def _field_docs(cls: type) -> dict[str, str]:
    """The docstring below each field of a dataclass, by the field's name."""
    from docstring_parser import parse_from_object

    return {param.arg_name: param.description for param in parse_from_object(cls).params}


def _instance(cls: type[ConfigT], values) -> ConfigT:
    """A config dataclass from a jsonargparse.Namespace that holds a Namespace per section."""
    kinds = get_type_hints(cls)
    return cls(**{k: _instance(kinds[k], v) if is_dataclass(kinds[k]) else v for k, v in vars(values).items()})


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    """Turns what jsonargparse or a dataclass raises for bad words into a UserError of one line."""
    from jsonargparse import ArgumentError

    try:
        yield
    except (ArgumentError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(one_line(error, 500)) from error

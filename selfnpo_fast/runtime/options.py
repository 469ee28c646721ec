"""The one parser of all commands: `--name value` words, and for some a YAML config, fill dataclasses.

A field's docstring is its help. Flags (bool) need no value and lists take several words:
`--brief`, `--negative runs/a runs/b`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Generic, TypeVar, get_args, get_origin, get_type_hints

from selfnpo_fast.runtime.console import logger
from selfnpo_fast.runtime.errors import UserError, one_line
from selfnpo_fast.runtime.plain_yaml import load_yaml

OptionsT = TypeVar("OptionsT")
ConfigT = TypeVar("ConfigT")

_FAILURES = (TypeError, ValueError, AttributeError, OverflowError, RecursionError)
"""What jsonargparse raises, besides its own ArgumentError, for values that cannot be."""


@dataclass(frozen=True)
class Parsed(Generic[OptionsT, ConfigT]):
    """A parsed command line of a command that takes a config."""

    options: OptionsT
    """The command's own options."""
    config: ConfigT
    text: str
    """The whole config as YAML."""
    config_named: bool
    """Whether the command line says anything of the config; otherwise it is the default one."""


def parse_options(cls: type[OptionsT], argv: Sequence[str], prog: str) -> OptionsT:
    """An instance of the options dataclass `cls` from `--name value` words.

    Raises UserError, one line, for what cannot be.
    """
    parser = _parser(prog, cls.__doc__)
    _add_options(parser, cls)
    namespace = _parse(parser, _underscored(argv, cls))
    return _instance(cls, vars(_instantiate(parser, namespace)))


def parse_with_config(
    cls: type[OptionsT], config_cls: type[ConfigT], argv: Sequence[str], prog: str, default: Path
) -> Parsed[OptionsT, ConfigT]:
    """The options `cls`, and a `config_cls` from `--config FILE` and dotted `--section.field value` words.

    Without `--config` the file `default` is read, which is said. Sections of the config are its fields
    that are dataclasses. Raises UserError, one line, for what cannot be.
    """
    import yaml
    from jsonargparse import Namespace, set_loader

    sections = section_names(config_cls)
    for name in (word.partition("=")[0] for word in argv):
        if name.startswith("--") and name[2:] in sections:  # whose value jsonargparse would try to import
            raise UserError(f"{name}: it has no value of its own; give its fields, as {name}.field VALUE")
    set_loader("plain_yaml", lambda text: load_yaml(text, sections), exceptions=(yaml.YAMLError, UserError))
    parser = _parser(prog, cls.__doc__, parser_mode="plain_yaml")
    parser.add_argument("--config", action="config", help="YAML file; later options override it")
    parser.add_class_arguments(config_cls, fail_untyped=True)
    _add_options(parser, cls)
    words = _underscored(argv, cls)
    named = [name for word in words if (name := word.partition("=")[0]).startswith(("--", "-h"))]
    if not any(name in ("--config", "-h", "--help") for name in named):
        logger.info("no --config given: running %s", default)
        words = ["--config", str(default), *words]
    own = [field.name for field in fields(cls)]
    namespace = _parse(parser, words)
    values = {name: namespace.pop(name) for name in own}
    namespace.pop("config")
    for name, kind in get_type_hints(cls).items():
        if kind is bool and not isinstance(values[name], bool):  # a config file can hold the key
            raise UserError(f"--{name}: it takes no value, not {one_line(values[name], 80)!r}")
    text = _guarded(lambda: parser.dump(Namespace(**namespace), skip_validation=True))
    config = vars(_instantiate(parser, namespace))
    return Parsed(
        options=_instance(cls, values),
        config=_instance(config_cls, {key: value for key, value in config.items() if not key.startswith("__")}),
        text=text,
        config_named=any(name.lstrip("-") not in own for name in named),
    )


def section_names(config_cls: type) -> frozenset[str]:
    """The fields of a config dataclass that hold fields of their own."""
    return frozenset(name for name, kind in get_type_hints(config_cls).items() if is_dataclass(kind))


def _underscored(argv: Sequence[str], cls: type) -> list[str]:
    """The words with `--several-words` spelt as the option's own field, `--several_words`."""
    own = {f"--{field.name}" for field in fields(cls)}
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        spelt = "--" + name[2:].replace("-", "_")
        words.append(spelt + equals + value if word.startswith("--") and spelt in own else word)
    return words


def _parser(prog: str, description: str | None, **options):
    from jsonargparse import ArgumentParser

    return ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False, **options)


def _add_options(parser, cls: type) -> None:
    """One argument per field of `cls`; its help is the docstring below the field."""
    kinds, defaults = get_type_hints(cls), cls()
    flags = {name for name, kind in kinds.items() if kind is bool}
    lists = {name: get_args(kind)[0] for name, kind in kinds.items() if get_origin(kind) is list}
    texts = _field_docs(cls)
    parser.add_class_arguments(cls, skip=flags | lists.keys(), fail_untyped=True)
    for name, kind in lists.items():
        parser.add_argument(f"--{name}", nargs="+", type=kind, default=getattr(defaults, name), help=texts[name])
    for name in flags:
        parser.add_argument(f"--{name}", action="store_true", help=texts[name])


def _field_docs(cls: type) -> dict[str, str]:
    from docstring_parser import parse_from_object

    return {param.arg_name: param.description for param in parse_from_object(cls).params}


def _parse(parser, words: Sequence[str]):
    return _guarded(lambda: parser.parse_args(list(words)))


def _instantiate(parser, namespace):
    return _guarded(lambda: parser.instantiate(namespace))


def _instance(cls: type[OptionsT], values: dict) -> OptionsT:
    return _guarded(lambda: cls(**values))


def _guarded(action):
    """What `action` returns; UserError, one line, for what jsonargparse or a dataclass refuses."""
    from jsonargparse import ArgumentError

    try:
        return action()
    except (ArgumentError, *_FAILURES) as error:
        raise UserError(one_line(error, 500)) from error

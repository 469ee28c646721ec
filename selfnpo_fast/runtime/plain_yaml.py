"""YAML with plain values only: nothing in it can name or run code."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from selfnpo_fast.runtime.errors import UserError, shortened

MAX_YAML_CHARACTERS = 1 << 20
MAX_YAML_DEPTH = 20  # a config has 3 levels; the recursion of libyaml can overflow the stack
_CODE_KEYS = ("class_path", "init_args")  # jsonargparse imports the class that such keys name


def load_yaml(text: str, sections: Collection[str] = (), texts: Collection[str] = ()) -> object:
    """The value of a YAML text made of plain mappings, lists and scalars.

    `sections` are the keys of the outermost mapping whose values have to be mappings. `texts` are
    the dotted names whose values are text or lists of it: there `off`, `1e3` and `0123` stay what
    is written, where YAML reads a truth value or a number. Raises
    yaml.YAMLError for a text that is not YAML. Raises UserError for tags and anchors, for keys that
    are repeated or no plain words, for sections that are no mappings, and for a text that is too
    long or too deeply nested.
    """
    import yaml
    from jsonargparse import get_loader

    if len(text) > MAX_YAML_CHARACTERS:
        raise UserError(f"{len(text):,} characters are no config; at most {MAX_YAML_CHARACTERS:,} are read")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    depth = 0
    for event in yaml.parse(text, Loader=loader):
        line = f"line {event.start_mark.line + 1}"
        if getattr(event, "anchor", None) is not None or getattr(event, "tag", None) is not None:
            raise UserError(f"{line}: tags (!) and anchors (& and *) are not read; write the value itself")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_YAML_DEPTH:
            raise UserError(f"{line}: nested more than {MAX_YAML_DEPTH} levels deep")
    node = yaml.compose(text, Loader=loader)
    _check_keys(node)
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.value in sections and not isinstance(value, yaml.MappingNode):
            raise UserError(f"{key.value}: it has no value of its own; write its fields, indented, below it")
    # Text is quoted, from the end of the file to its beginning, so that positions stay right.
    for scalar in reversed(list(_unquoted(node, "", texts))):
        quoted = "'" + scalar.value.replace("'", "''") + "'"
        text = text[: scalar.start_mark.index] + quoted + text[scalar.end_mark.index :]
    return get_loader("yaml")(text)


def _unquoted(node, name: str, texts: Collection[str]) -> Iterator:
    """The scalars, in order, that are in a node, are named in `texts`, and have no quotes.

    `name` is the node's dotted name; the entries of a list have the list's. Null stays null.
    """
    if not isinstance(getattr(node, "value", None), list):
        plain = node is not None and not node.style and node.tag != "tag:yaml.org,2002:null"
        if plain and name in texts and "\n" not in node.value:
            yield node
        return
    for entry in node.value:
        key, value = entry if isinstance(entry, tuple) else (None, entry)
        yield from _unquoted(value, name if key is None else f"{name}.{key.value}".lstrip("."), texts)


def _check_keys(node) -> None:
    """Raise UserError for keys of a YAML node that are repeated, no plain words, or name code.

    `node` is None for an empty text.
    """
    if not isinstance(getattr(node, "value", None), list):
        return
    pairs = [entry if isinstance(entry, tuple) else (None, entry) for entry in node.value]
    seen = set()
    for key, value in pairs:
        if key is not None:
            name = key.value if key.tag == "tag:yaml.org,2002:str" else None
            where = f"line {key.start_mark.line + 1}: the key {shortened(name)}"
            if name is None or name.startswith("__") or name in _CODE_KEYS:
                raise UserError(f"{where} names no option")
            if name in seen:
                raise UserError(f"{where} is there twice; keep one")
            seen.add(name)
        _check_keys(value)

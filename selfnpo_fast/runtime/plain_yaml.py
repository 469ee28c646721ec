"""YAML as plain values: what a config file may hold, and nothing that names code."""

from __future__ import annotations

from collections.abc import Collection

from selfnpo_fast.runtime.errors import UserError, shortened

MAX_YAML_CHARACTERS, MAX_YAML_DEPTH = 1 << 20, 20  # this config needs 3 levels; libyaml's recursion overflows the stack
_CODE_KEYS = ("class_path", "init_args")  # with which jsonargparse names a class to import


def load_yaml(text: str, sections: Collection[str] = ()) -> object:
    """The value of a YAML text made of plain mappings, lists and scalars: it builds no objects and names no code.

    `sections` are the keys at the top that have to hold a mapping. Raises UserError for tags, anchors, keys that
    are repeated or no plain words, sections that are no mapping, deep nesting, and too long a text;
    yaml.YAMLError for what is no YAML.
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
        # jsonargparse imports the module that a string in the place of a section names.
        if key.value in sections and not isinstance(value, yaml.MappingNode):
            raise UserError(f"{key.value}: it has no value of its own; write its fields, indented, below it")
    return get_loader("yaml")(text)


def _check_keys(node) -> None:
    """Refuse keys that are repeated, no plain words, or would name code; `node` is a composed YAML node or None."""
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

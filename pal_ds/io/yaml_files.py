"""YAML mappings that people write: a key that stands twice is an error, where YAML would silently take the last one."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from pal_ds.errors import UserError
from pal_ds.io.boundary import reading

_MERGE = "<<"
"""YAML's own key, which takes over the keys of another mapping."""
_NAMES_BELOW = ("methods", "init_args")
"""Keys below which names of people's own stand, in which a dot is a letter."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        UserError: it is no YAML, no mapping, or names a key twice in one mapping; with file and line.
    """
    with reading(path, "recipe", "Save it as YAML, in UTF-8."):
        content = parse_yaml(path.read_text(encoding="utf-8-sig"), str(path))
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no keys; a recipe is a YAML mapping such as data: ...")
    return content


def parse_yaml(text: str, where: str) -> object:
    """The value of a YAML text. Raises UserError as `read_yaml` does."""
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        for first, second in () if tree is None else _repeated(tree):
            before, line = (node.start_mark.line + 1 for node in (first, second))
            written = "" if second.value == first.value else f", as '{first.value}'"
            raise UserError(
                f"{where}:{line}: the key '{second.value}' stands on line {before} already{written}; the second would "
                "replace what the first says. Write both as one."
            )
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{where}:{line}: not valid YAML ({error.problem}). Mend it.") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: not valid YAML ({reason}). Mend it.") from None


def _repeated(tree: yaml.Node) -> Iterator[tuple[Any, Any]]:
    """(first, later) nodes of each key that a mapping below `tree` has twice, in the order of the file."""
    pairs, met = [], set()
    todo = [(tree, True)]
    while todo:
        node, has_dotted_keys = todo.pop()
        if id(node) in met:
            continue  # an alias of what was looked at already
        met.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            todo += [(part, has_dotted_keys) for part in node.value]
        elif isinstance(node, yaml.MappingNode):
            seen: dict[tuple[str, object], Any] = {}
            for key, value in node.value:
                todo.append((value, has_dotted_keys and key.value not in _NAMES_BELOW))
                name = _meaning(key)
                if key.value != _MERGE and name in seen:
                    pairs.append((seen[name], key))
                seen.setdefault(name, key)
            pairs += _parts_twice(seen) if has_dotted_keys else ()
    yield from sorted(pairs, key=lambda pair: pair[1].start_mark.index)


def _meaning(key: yaml.Node) -> tuple[str, object]:
    """A key as YAML understands it: `true` and `True` are one, as `0x10` and `16` are."""
    if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":merge"):
        return key.tag, str(key.value)
    value = yaml.SafeLoader("").construct_object(key)
    # Python takes 1, 1.0 and true for one key of a dict: so they are here.
    return "", value


def _parts_twice(keys: Mapping[tuple[str, object], Any]) -> Iterator[tuple[Any, Any]]:
    """(first, later) keys of one mapping of which one is a part of the other: `optim` and `optim.learning_rate`."""
    nodes = {str(value): node for (_, value), node in keys.items()}
    for name, node in nodes.items():
        above = [".".join(name.split(".")[:n]) for n in range(1, name.count(".") + 1)]
        for other in (nodes[part] for part in above if part in nodes):
            first, later = sorted((node, other), key=lambda one: one.start_mark.index)
            yield first, later


def flattened(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of a nested mapping by dotted key; an empty mapping is a value.

    >>> flattened({"optim": {"learning_rate": 0.1}, "seed": 1})
    {'optim.learning_rate': 0.1, 'seed': 1}
    """
    if not isinstance(value, dict) or not value:
        return {prefix: value} if prefix else {}
    flat: dict[str, Any] = {}
    for key, part in value.items():
        flat |= flattened(part, f"{prefix}.{key}" if prefix else str(key))
    return flat

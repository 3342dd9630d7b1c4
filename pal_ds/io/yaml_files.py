"""YAML mappings that people write: a key that stands twice is an error, where YAML would silently take the last one.

So is a number in a spelling of which YAML 1.1 and 1.2 make different values, as 010 (8 or 10) and 1:30 (90 or a text).
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from pal_ds.errors import UserError
from pal_ds.io.boundary import reading

_MERGE = "<<"
"""YAML's own key, which takes over the keys of another mapping."""
_NUMBER = re.compile(
    r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?(?:e[-+]?[0-9]+)?|\.[0-9_]+|0b[01_]+|0x[0-9a-f_]+)"
    r"|[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?",
    re.IGNORECASE,
)
"""What a reader of YAML 1.1 may take for a number, jsonargparse's among them."""
_PLAIN_NUMBER = re.compile(
    r"[-+]?(?:(?:0|[1-9][0-9]*)|[0-9]*\.[0-9]*(?:e[-+]?[0-9]+)?|[0-9]+e[-+]?[0-9]+)|0x[0-9a-f]+",
    re.IGNORECASE,
)
"""Numbers of which YAML 1.1 and 1.2 make the same."""
_SIGN_OF_ODD_NUMBER = re.compile(r"[0-9][_:]|\._|0[0-9bx]", re.IGNORECASE)
"""What no text is without that holds a number in another spelling: a look that costs little."""
MOST_ALIASED = 10_000
"""Values that the aliases of one text may add to those that are written."""
_NAMES_BELOW = ("methods", "init_args")
"""Keys below which names of people's own stand, in which a dot is a letter."""


def read_yaml(path: Path, shown: str | None = None) -> dict[str, Any]:
    """The mapping that a YAML file holds; `shown` names one in messages that nobody but this program wrote.

    Raises:
        UserError: it is no YAML, no mapping, names a key twice in one mapping, or has a number that others read
            otherwise; with file and line.
    """
    with reading(path, "recipe", "Save it as YAML, in UTF-8."):
        content = parse_yaml(path.read_text(encoding="utf-8-sig"), shown or str(path))
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no keys; a recipe is a YAML mapping such as data: ...")
    return content


def parse_yaml(text: str, where: str) -> object:
    """The value of a YAML text. Raises UserError as `read_yaml` does."""
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        refuse_expansion(tree, where)
        for first, second in () if tree is None else _repeated(tree):
            before, line = (node.start_mark.line + 1 for node in (first, second))
            written = "" if second.value == first.value else f", as '{first.value}'"
            raise UserError(
                f"{where}:{line}: the key '{second.value}' stands on line {before} already{written}; the second would "
                "replace what the first says. Write both as one."
            )
        refuse_odd_numbers(text, where)
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{where}:{line}: not valid YAML ({error.problem}). Mend it.") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: not valid YAML ({reason}). Mend it.") from None


def refuse_expansion(tree: yaml.Node | None, where: str) -> None:
    """Raise UserError where aliases (`*NAME`) make far more of a YAML text than is written, or a value part of itself.

    Ten levels of nine aliases each are a kilobyte, and three thousand million values to whoever goes through them.
    """
    sizes: dict[int, int] = {}
    above: set[int] = set()
    todo = [] if tree is None else [(tree, False)]
    while todo:
        node, is_counted = todo.pop()
        parts = _parts(node)
        if is_counted:
            above.discard(id(node))
            sizes[id(node)] = 1 + sum(sizes[id(part)] for part in parts)
        elif id(node) not in sizes:
            above.add(id(node))
            todo.append((node, True))
            for part in parts:
                if id(part) in above:
                    line = part.start_mark.line + 1
                    raise UserError(
                        f"{where}:{line}: the value stands within itself, by an alias (*NAME). Write it out."
                    )
                todo.append((part, False))
    if tree is not None and sizes[id(tree)] - len(sizes) > MOST_ALIASED:
        raise UserError(
            f"{where}: aliases (*NAME) make {sizes[id(tree)]:,} values of the {len(sizes):,} that are written; at most "
            f"{MOST_ALIASED:,} more are read. Write out what is meant."
        )


def _parts(node: yaml.Node) -> list[yaml.Node]:
    """Return the nodes right below a node."""
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def refuse_odd_numbers(text: str, where: str) -> None:
    """Raise UserError for the first number that YAML 1.1 reads otherwise than YAML 1.2 does; errors of YAML pass.

    A text is in quotes and has any spelling.
    """
    if not _SIGN_OF_ODD_NUMBER.search(text):
        return
    tree = yaml.compose(text, Loader=yaml.SafeLoader)
    for key, node in () if tree is None else _plain_scalars(tree):
        word = node.value
        if not is_odd_number(word):
            continue
        line = node.start_mark.line + 1
        raise UserError(
            f"{where}:{line}: {key + ': ' if key else ''}{word} is another number, or a text, to some readers of YAML. "
            f'Write a number in plain digits, as 10 or 0.5, and a text in quotes, as "{word}".'
        )


def is_odd_number(word: str) -> bool:
    """Return whether YAML 1.1 takes a word for a number of which YAML 1.2 makes another, or a text.

    >>> [is_odd_number(word) for word in ("010", "1:30", "1_0", "0b11", "10", "1e-3", ".5", "0x10", "08", "a_1")]
    [True, True, True, True, False, False, False, False, False, False]
    """
    if re.fullmatch("0[0-9]*[89][0-9]*", word):
        return False  # a text to YAML 1.1, whose writers leave it without quotes
    return bool(_NUMBER.fullmatch(word)) and not _PLAIN_NUMBER.fullmatch(word)


def _plain_scalars(tree: yaml.Node) -> Iterator[tuple[str, yaml.ScalarNode]]:
    """(dotted key, node) of each scalar without quotes, in the order of the file."""
    met, todo = set(), [("", tree)]
    while todo:
        key, node = todo.pop()
        if id(node) in met:
            continue
        met.add(id(node))
        if isinstance(node, yaml.ScalarNode) and not node.style:
            yield key, node
        elif isinstance(node, yaml.SequenceNode):
            todo += [(key, part) for part in reversed(node.value)]
        elif isinstance(node, yaml.MappingNode):
            for name, value in reversed(node.value):
                below = f"{key}.{name.value}" if key else str(name.value)
                todo += [(below, value), (key, name)]


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

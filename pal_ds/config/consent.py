"""The leave that a person gives by starting a command: for classes beyond pal_ds, and code of a model or tokenizer.

A recipe in a file is data, whoever wrote it: of itself it names classes that pal_ds ships and nothing else. What the
person says (an option of this command line, an argument of this call of Python) is that person's own choice, and
`--trust_code` extends it to the files. What is then named must still be a class of the right kind, which is looked at
before anything is made of it.
"""

import contextlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from importlib import import_module
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import Namespace, set_parsing_settings

from pal_ds.config.own_code import make_importable
from pal_ds.config.run_config import RunConfig
from pal_ds.data.sources.base import Source
from pal_ds.errors import UserError
from pal_ds.heads.base import Head
from pal_ds.losses import MarginLoss

SHIPPED = ("pal_ds.heads", "pal_ds.data.sources", "pal_ds.losses")
"""Packages whose classes any recipe may name."""
KINDS: dict[str, type] = {
    "head": Head,
    "data.source": Source,
    "source": Source,
    "loss.shape": MarginLoss,
}
"""The keys of a recipe, and options, that name a class, and what it must be a subclass of."""
SECTIONS = {
    name: kind for name, kind in get_type_hints(RunConfig).items() if isinstance(kind, type)
}
"""The keys of a recipe below which its other keys stand."""
REMOTE_CODE = ("backbone.trust_remote_code", "data.trust_remote_code")
"""The keys that let code of a model's folder, or of a tokenizer's, run."""
FLAGS = ("trust_code", "trust_checkpoint", "quiet")
"""Options that are a person's word, so that no file may hold them."""
REMEDY = "If you trust whoever wrote it, say so: --trust_code on the command line, trust_code=True in Python."
_SAID_BEFORE, _SAID_AFTER = "said before", "said after"
"""Keys of what was said at once of a key, beside what was said of its parts; no key of a recipe has a space."""
_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")

# Everything else that a value names is refused by the parser itself, before it is imported.
set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=list(SHIPPED))


@dataclass(frozen=True)
class Consent:
    """The leave that one command line, or one call of Python, gives."""

    trust_code: bool = False
    """True: what the files name is allowed as well."""
    spoken: dict[str, Any] = field(default_factory=dict)
    """The recipe's keys that were said outside of any file, as a tree."""

    @staticmethod
    def of_words(words: Sequence[str]) -> "Consent":
        """Return what the words of a command line allow."""
        spoken: dict[str, Any] = {}
        for position, word in enumerate(words):
            name, equals, value = word.removeprefix("--").partition("=")
            if not word.startswith("--") or name == "config":
                continue
            following = words[position + 1] if position + 1 < len(words) else ""
            _lay_over(spoken, name, _read(value if equals else following))
        return Consent("--trust_code" in words, spoken)

    @staticmethod
    def of_call(trees: Iterable[Mapping[str, Any]], *, trust_code: bool) -> "Consent":
        """Return what the dicts of a call of Python allow; their keys may be dotted."""
        spoken: dict[str, Any] = {}
        for tree in trees:
            for name, value in tree.items():
                _lay_over(spoken, name, value)
        # In Python these are arguments of the call, and a dict is a recipe.
        return Consent(trust_code, {k: v for k, v in spoken.items() if k not in FLAGS})

    @contextlib.contextmanager
    def given(self, files: Iterable[Path] = (), *texts: str) -> Iterator[None]:
        """Let the classes that are allowed be imported within the block; `files` and `texts` are recipes, YAML.

        With any at all, modules are also looked for in the current directory and beside the files.
        """
        files = list(files)
        paths = import_paths(self.spoken)
        if self.trust_code:
            trees = [(_read(file.read_text(encoding="utf-8")), file.parent) for file in files]
            trees += [(_read(text), Path()) for text in texts] + [(self.spoken, Path())]
            for tree, folder in trees:
                whole, more = _with_files_of_groups(tree, folder)
                paths |= import_paths(whole)
                files += more
        packages = sorted({path.partition(".")[0] for path in paths} - _NEVER)
        if not packages:
            yield
            return
        make_importable([Path.cwd(), *(file.parent for file in files)])
        already = [name for name in packages if name in _open]
        _open.update(packages)
        set_parsing_settings(import_path_allowlist=packages)
        try:
            yield
        finally:
            closed = [name for name in packages if name not in already]
            _open.difference_update(closed)
            set_parsing_settings(import_path_denylist=closed)

    def check(self, options: Namespace) -> None:
        """Look at a parsed recipe before anything is made of it.

        Raises:
            UserError: it holds a flag, a value in place of keys, or null where a value is needed; it names something
                that is no class of the right kind, or lets code of a model's folder or of a tokenizer's run, which
                nobody but a file asked for.
        """
        for flag in FLAGS:
            if options.get(flag) and flag not in self.spoken:
                raise UserError(
                    f"{flag}: stands in a recipe, and only a person may say it: --{flag} on the command line, "
                    f"{flag}=True in Python."
                )
        # Another command may have an option of such a name.
        is_recipe = all(key in options for key in SECTIONS)
        for key, kind in SECTIONS.items() if is_recipe else ():
            _check_section(key, kind, options[key])
        for key, kind in KINDS.items():
            check_kind(key, options.get(key), kind)
        for key in REMOTE_CODE:
            if options.get(key) is True and not (self.trust_code or _at(self.spoken, key) is True):
                folder = (
                    "a model's folder" if key.startswith("backbone") else "a tokenizer's folder"
                )
                raise UserError(f"{key}: a recipe asks for code of {folder} to be run. {REMEDY}")


_open: set[str] = set()
"""Packages that a block of `given` has opened."""
_NEVER = {*sys.stdlib_module_names, "pal_ds", "jsonargparse"}
"""Packages that hold no head, source or loss of one's own."""


def import_paths(recipe: object) -> set[str]:
    """Return every import path of classes outside of pal_ds in a recipe, or in the methods of a suite.

    >>> sorted(import_paths({"head": {"class_path": "mine.My", "init_args": {"inner": {"class_path": "own.It"}}}}))
    ['mine.My', 'own.It']
    >>> import_paths({"data": {"source": {"class_path": "Jsonl", "init_args": {"path": "votes.jsonl"}}}})
    set()
    >>> import_paths({"head": "PalA", "data": {"path": "a.b", "source": {"class_path": "pal_ds.data.sources.Jsonl"}}})
    set()
    """
    places = [_at(recipe, key) for key in KINDS]
    methods = recipe.get("methods") if isinstance(recipe, Mapping) else None
    found = {path for place in places for path in _paths(place)}
    for method in methods.values() if isinstance(methods, Mapping) else ():
        found |= import_paths(method)
    return found


def _paths(value: object, *, names_class: bool = True) -> Iterator[str]:
    """A text names a class at the key itself and at `class_path`; elsewhere `data.jsonl` is a file's name."""
    if isinstance(value, str):
        is_foreign = value.partition(".")[0] != "pal_ds"
        if names_class and is_foreign and _IMPORT_PATH.fullmatch(value):
            yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            said_at_once = names_class and key in (_SAID_BEFORE, _SAID_AFTER)
            yield from _paths(part, names_class=said_at_once or key == "class_path")
    elif isinstance(value, list):
        for part in value:
            yield from _paths(part, names_class=False)


def _read(text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _with_files_of_groups(tree: object, folder: Path) -> tuple[object, list[Path]]:
    """(a recipe with the content of each file that it gives for a group of keys, as in loss: ./loss.yaml; these)."""
    if not isinstance(tree, Mapping):
        return tree, []
    named = {key: folder / value for key, value in tree.items() if _is_file_of_keys(value)}
    files = {key: file for key, file in named.items() if file.is_file()}
    content = {key: _read(file.read_text(encoding="utf-8")) for key, file in files.items()}
    return {**tree, **content}, list(files.values())


def _is_file_of_keys(value: object) -> bool:
    return isinstance(value, str) and value.endswith((".yaml", ".yml"))


def _at(tree: object, key: str) -> object:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def _lay_over(tree: dict[str, Any], key: str, value: object) -> None:
    """Put a value at a dotted key; what two of them say of one key is kept side by side, as both were said."""
    *above, last = key.split(".")
    for part in above:
        below = tree.setdefault(part, {})
        if not isinstance(below, dict):
            below = tree[part] = {_SAID_BEFORE: below}
        tree = below
    before = tree.get(last)
    if isinstance(before, dict) and isinstance(value, Mapping):
        for name, part in value.items():
            _lay_over(before, str(name), part)
    elif isinstance(before, dict):
        before[_SAID_AFTER] = value
    else:
        tree[last] = dict(value) if isinstance(value, Mapping) else value


def check_kind(key: str, value: object, kind: type) -> None:
    """Raise UserError where what a parsed recipe has at a key is no class over `kind`, or holds none further down."""
    if value is None:
        return
    if not isinstance(value, Namespace | dict) or "class_path" not in value:
        name = getattr(value, "__qualname__", type(value).__name__)
        raise UserError(f"{key}: {name} is no class over {kind.__name__}. {_rule(kind)}")
    path = value["class_path"]
    found = _object_at(path)
    if not (inspect.isclass(found) and issubclass(found, kind)):
        raise UserError(f"{key}: {path} is no class over {kind.__name__}. {_rule(kind)}")
    _refuse_nulls(key, found, value.get("init_args") or {})
    for part in ("init_args", "dict_kwargs"):
        _check_inside(key, value.get(part))


def _check_section(key: str, kind: type, value: object) -> None:
    """Raise UserError where a section of a recipe holds no keys, or null where one takes none."""
    if not isinstance(value, Namespace):
        raise UserError(
            f"{key}: is {value!r:.60}, and it has keys of its own. Write them below it, or leave it out."
        )
    _refuse_nulls(key, kind, value)


def _refuse_nulls(key: str, cls: type, values: Mapping[str, object] | Namespace) -> None:
    """Raise UserError for null where a class takes none: the parser lets it pass."""
    with contextlib.suppress(NameError):  # hints that a class of one's own has for readers alone
        for name, hint in get_type_hints(cls.__init__).items():
            value = values.get(name, ())
            if name in values and isinstance(hint, type) and is_dataclass(hint):
                _check_section(f"{key}.{name}", hint, value)
            takes_none = hint in (Any, object) or NoneType in get_args(hint)
            if value is None and not takes_none:
                raise UserError(
                    f"{key}.{name}: is null, and it needs a value. Give one, or leave it out."
                )


def _check_inside(key: str, value: object) -> None:
    """Refuse functions further down; the kind of a class that another takes is the parser's to check, by annotation."""
    if isinstance(value, Namespace | dict):
        path = value.get("class_path")
        if isinstance(path, str) and not inspect.isclass(_object_at(path)):
            raise UserError(f"{key}: {path} is no class, and a recipe calls no functions.")
        for part in value.values():
            _check_inside(key, part)
    elif isinstance(value, list | tuple):
        for part in value:
            _check_inside(key, part)


def _object_at(path: object) -> object:
    module, _, name = str(path).rpartition(".")
    try:
        return getattr(import_module(module), name, None) if module else None
    except ImportError:
        return None  # a class inside a class, which no head, source or loss is


def _rule(kind: type) -> str:
    return (
        f"A recipe names a subclass of {kind.__module__}.{kind.__name__} here; nothing was called."
    )

"""Damage of files: of their bytes, and of what is in their frame (JSON, YAML, ZIP, safetensors, numpy)."""

import io
import json
import zipfile
from collections.abc import Callable
from typing import Any

import yaml
from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy], Any]
Mutator = Callable[[Draw, bytes], bytes]

NESTED: list = []
for _ in range(400):
    NESTED = [NESTED]
ODD_VALUES = (
    *(None, True, False, 0, 1, -1, 7, 2**31, 2**63, -(2**64), 10**400, 0.5, 1e308, float("nan")),
    *("", "x", "0", "é", "\ud800", "../../x", "/etc/passwd", "a\0b", "tokens", "x" * 300),
    *(
        [],
        {},
        [[]],
        [0],
        ["x"],
        {"x": 0},
        [None],
        {"": []},
        NESTED,
        [1.5] * 5,
        {"class_path": "os.system"},
    ),
)
ODD_BYTES = (
    b"\0",
    b"\xff\xff\xff\xff",
    b"\x00\x00\x00\x80",
    b'"',
    b"{",
    b"[" * 300,
    b"\n",
    b"1" * 30,
)


def of_bytes(draw: Draw, content: bytes) -> bytes:
    """One to three times: a bit turned, bytes taken away, put in, or copied from elsewhere in the file."""
    for _ in range(draw(st.integers(1, 3))):
        size = len(content)
        place = draw(st.integers(0, size))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "delete", "splice", "odd"]))
        length = draw(st.integers(1, 64))
        if kind == "flip" and place < size:
            byte = content[place] ^ 1 << draw(st.integers(0, 7))
            content = content[:place] + bytes([byte]) + content[place + 1 :]
        elif kind == "cut":
            content = content[:place]
        elif kind == "insert":
            content = content[:place] + draw(st.binary(min_size=1, max_size=16)) + content[place:]
        elif kind == "delete":
            content = content[:place] + content[place + length :]
        elif kind == "splice":
            other = draw(st.integers(0, size))
            content = content[:place] + content[other : other + length] + content[place + length :]
        else:
            odd = draw(st.sampled_from(ODD_BYTES))
            content = content[:place] + odd + content[place + len(odd) :]
    return content


def _edited(draw: Draw, value: Any) -> Any:
    """A tree with one value exchanged, taken away, doubled or wrapped."""
    places: list[tuple[Any, Any]] = []
    todo = [value]
    while todo:
        node = todo.pop()
        for key, part in node.items() if isinstance(node, dict) else enumerate(node):
            places.append((node, key))
            if isinstance(part, dict | list):
                todo.append(part)
    if not places:
        return draw(st.sampled_from(ODD_VALUES))
    node, key = places[draw(st.integers(0, len(places) - 1))]
    kind = draw(st.sampled_from(["odd", "odd", "delete", "rename", "wrap", "other"]))
    if kind == "delete":
        del node[key]
    elif kind == "rename" and isinstance(node, dict):
        node[str(key) + "x"] = node.pop(key)
    elif kind == "wrap":
        node[key] = [node[key]]
    elif kind == "other":
        of, name = places[draw(st.integers(0, len(places) - 1))]
        # As text: a tree that holds itself is none.
        node[key] = json.loads(json.dumps(of[name])) if name in of or isinstance(of, list) else None
    else:
        node[key] = draw(st.sampled_from(ODD_VALUES))
    return value


def of_json(draw: Draw, content: bytes) -> bytes:
    """An edit of the value that a JSON file holds."""
    try:
        value = json.loads(content)
    except ValueError:
        return of_bytes(draw, content)
    if not isinstance(value, dict | list):
        return of_bytes(draw, content)
    return json.dumps(_edited(draw, value), indent=1).encode()


def of_lines(draw: Draw, content: bytes) -> bytes:
    """An edit of a few lines of JSON Lines, or of their order."""
    lines = content.split(b"\n")
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(lines) - 1))
        edit = draw(st.sampled_from([of_json, of_bytes]))
        lines[place] = edit(draw, lines[place]).replace(b"\n", b" ")
    return b"\n".join(lines)


def of_yaml(draw: Draw, content: bytes) -> bytes:
    """An edit of the value that a YAML file holds."""
    try:
        value = yaml.safe_load(content)
    except (yaml.YAMLError, ValueError):
        return of_bytes(draw, content)
    edited = _edited(draw, value) if isinstance(value, dict | list) else value
    # JSON is YAML, and can hold what PyYAML would not write.
    return json.dumps(edited).encode()


def of_zip(draw: Draw, content: bytes) -> bytes:
    """Damage of one record of an archive, whose checksums are right again."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    pickles = [n for n, (name, _) in enumerate(records) if name.endswith(".pkl")]
    chosen = draw(st.sampled_from([*pickles * 6, *range(len(records))]))
    name, record = records[chosen]
    records[chosen] = name, of_bytes(draw, record)
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, record in records:
            archive.writestr(name, record)
    return out.getvalue()


def of_safetensors(draw: Draw, content: bytes) -> bytes:
    """Damage of the header, whose length is right again, or of a byte of the tensors."""
    length = int.from_bytes(content[:8], "little")
    header, tensors = content[8 : 8 + length], content[8 + length :]
    edit = draw(st.sampled_from([of_json, of_json, of_bytes]))
    header = edit(draw, header)
    return len(header).to_bytes(8, "little") + header + tensors


def of_npy(draw: Draw, content: bytes) -> bytes:
    """Damage of the header of a numpy file, which is of Python's notation, or of its numbers."""
    length = 10 + int.from_bytes(content[8:10], "little")
    if draw(st.booleans()):
        return content[:length] + of_bytes(draw, content[length:])
    return of_bytes(draw, content[:length]) + content[length:]


BY_ENDING: dict[str, Mutator] = {
    ".json": of_json,
    ".jsonl": of_lines,
    ".yaml": of_yaml,
    ".pt": of_zip,
    ".safetensors": of_safetensors,
    ".npy": of_npy,
}
"""What else than bytes may be damaged, by the ending of a file's name."""

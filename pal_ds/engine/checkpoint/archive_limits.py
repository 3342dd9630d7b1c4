"""Limits of a torch archive, looked at before its pickle is run: nothing in it is larger than the file."""

import pickle
import pickletools
import zipfile

_BUILDING = (
    "PROTO MARK GLOBAL REDUCE BUILD NEWOBJ BINPERSID BINPUT LONG_BINPUT BINGET LONG_BINGET STOP"
)
_VALUES = "NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE"
_CONTAINERS = (
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS"
)
OPCODES = {name for line in (_BUILDING, _VALUES, _CONTAINERS) for name in line.split()}
"""The instructions that `torch.save` writes for tensors and plain values. Others take memory for a length that the
file only claims to hold, or name classes in ways of their own."""


def check_records(archive: zipfile.ZipFile, size: int) -> None:
    """Raise UnpicklingError where records are compressed, or hold more bytes together than the file's `size`."""
    records = archive.infolist()
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
            raise pickle.UnpicklingError(f"record {record.filename} is compressed")
    total = sum(record.file_size for record in records)
    if total > size:
        raise pickle.UnpicklingError(f"its records have {total} bytes, the file {size}")


def check_opcodes(program: bytes) -> None:
    """Raise UnpicklingError where a pickle is more than `torch.save` writes of tensors and plain values."""
    for number, (opcode, argument, _) in enumerate(pickletools.genops(program)):
        if opcode.name not in OPCODES:
            raise pickle.UnpicklingError(f"an instruction {opcode.name}")
        # The table of what is kept grows to the largest number at once.
        if opcode.name in ("BINPUT", "LONG_BINPUT") and int(argument or 0) > number:
            raise pickle.UnpicklingError(f"an object that is kept as number {argument}")

"""Precomputed vectors found by id, from files that hold numbers alone and never a pickle."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pal_ds.data.sources.base import check_files, describe_files
from pal_ds.errors import UserError


class Embeddings:
    """Vectors [N, H] in NAME.safetensors (one tensor) or NAME.npy, their ids in NAME.ids.json.

    The ids are a JSON list of N texts, one per row. Rows are read from the disk as they are asked
    for. Raises UserError for files that are missing, not of this form, or do not fit each other.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        if Path(path).suffix not in (".safetensors", ".npy"):
            raise UserError(
                f"{path}: embeddings come as NAME.safetensors or NAME.npy with NAME.ids.json "
                "beside it; pickles (.pt, .joblib, .pkl) run code when read and are refused. "
                "Convert the file where you trust it"
            )

    def __contains__(self, name: str) -> bool:
        return name in self._row_of

    def __getitem__(self, name: str) -> tuple[float, ...]:
        """The vector of an id that is in the file."""
        vector = np.asarray(self._matrix[self._row_of[name]], np.float32)
        if not np.isfinite(vector).all():
            raise UserError(
                f"{self.path}: the vector of '{name}' holds a number that is not finite"
            )
        return tuple(vector.tolist())

    @property
    def size(self) -> int:
        """H."""
        return self._shape[1]

    def describe(self) -> list[dict]:
        return describe_files(self._files)

    @property
    def _files(self) -> list[Path]:
        return check_files([self.path, Path(self.path).with_suffix(".ids.json")])

    @cached_property
    def _matrix(self) -> Any:
        """Something that gives row i, [H], when indexed."""
        path = self._files[0]
        try:
            if path.suffix == ".npy":
                return np.load(path, mmap_mode="r", allow_pickle=False)
            from safetensors import safe_open

            with safe_open(path, framework="np") as file:
                (name,) = file.keys()
                return file.get_slice(name)
        except Exception as error:
            # Each library has classes of its own for a file it cannot read.
            raise UserError(
                f"{path}: cannot be read as one matrix of float32 or float16 numbers ({error}); "
                "write it with numpy.save or safetensors.numpy.save_file"
            ) from error

    @cached_property
    def _shape(self) -> tuple[int, ...]:
        matrix = self._matrix
        shape = tuple(matrix.shape if isinstance(matrix, np.ndarray) else matrix.get_shape())
        if len(shape) != 2:
            raise UserError(f"{self.path}: its shape is {shape}; embeddings are a matrix [N, H]")
        return shape

    @cached_property
    def _row_of(self) -> dict[str, int]:
        path = self._files[1]
        try:
            ids = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error}); give a list of texts") from None
        if not isinstance(ids, list) or not all(isinstance(name, str) for name in ids):
            raise UserError(f"{path}: holds something else than a list of texts, one id per row")
        row_of = {name: row for row, name in enumerate(ids)}
        if len(row_of) != len(ids) or len(ids) != self._shape[0]:
            raise UserError(
                f"{path}: {len(ids)} ids, {len(row_of)} of them distinct, for {self._shape[0]} rows "
                f"of {self.path}; there must be one distinct id per row"
            )
        return row_of

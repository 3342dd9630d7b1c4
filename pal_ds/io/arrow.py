"""Columns of Arrow tables as numpy arrays, without pandas."""

import numpy as np
import pyarrow as pa


def values_of(column: pa.ChunkedArray) -> np.ndarray:
    """Return a copy of a column of numbers or booleans, in its own dtype.

    `ChunkedArray.to_numpy` imports pandas, a tenth of a second at the start of every command.

    Raises:
        pyarrow.ArrowTypeError: the column has nulls, or values of another kind.
    """
    is_bool = pa.types.is_boolean(column.type)
    values = np.from_dlpack((column.cast(pa.uint8()) if is_bool else column).combine_chunks())
    return values.astype(bool if is_bool else values.dtype)

"""Write numpy arrays so that a full disk is an error that says so."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np


def write_array(path: Path, dtype: np.dtype, shape: tuple[int, ...], parts: Iterable[np.ndarray]) -> None:
    """Write a `.npy` file part by part, and return when it would outlive a loss of power.

    A file that is written through a memory map ends the process without a word when the disk is full, and numpy's own
    writer does not say what happened.

    Args:
        path: the file; it is removed again if it cannot be written to its end.
        dtype, shape: of the whole array.
        parts: arrays that follow each other along the first dimension; one at a time is in memory.

    Raises:
        OSError: the disk is full, for example.
    """
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    try:
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                file.write(np.ascontiguousarray(part, dtype).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        error.filename = error.filename or str(path)
        raise

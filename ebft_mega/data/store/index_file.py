"""The index of a dataset: a `.npy` file whose header is read here, within bounds, and whose records are mapped.

numpy's own reader evaluates the header as a Python expression and would load pickled objects where it is told to.
"""

import os
import re
from pathlib import Path

import numpy as np

from ebft_mega.data.store.format import INDEX_DTYPE
from ebft_mega.io.input_errors import bad_input, file_obstacle
from ebft_mega.io.parse_boundary import reading

# numpy writes 192 bytes for these records; the room is for other versions of it.
MAX_HEADER_BYTES = 4096
_MAGIC = b"\x93NUMPY"
_LENGTH_BYTES = {b"\x01\x00": 2, b"\x02\x00": 4}  # by version
_FIELDS = re.escape(repr(INDEX_DTYPE.descr))
_HEADER = re.compile(
    rf"\{{'descr': {_FIELDS}, 'fortran_order': False, 'shape': \(([0-9]{{1,18}}),\), \}} *\n".encode("ascii")
)


def header_bytes(index_bytes: int, documents: int) -> int:
    """Bytes that the records leave for the header of an index file of this size; wrong below 1 and above the limit."""
    return index_bytes - documents * INDEX_DTYPE.itemsize


def load_index(path: Path) -> np.ndarray:
    """Map the index file into memory.

    Returns:
        INDEX_DTYPE [documents], read-only.

    Raises:
        InputError: it is no such file.
    """
    with reading(path, "index", f"records of {INDEX_DTYPE}"):
        if (obstacle := file_obstacle(path)) is not None:
            raise bad_input(path, "index", obstacle, f"records of {INDEX_DTYPE}")
        with path.open("rb") as file:
            start, num_bytes = file.read(MAX_HEADER_BYTES), os.fstat(file.fileno()).st_size
        count_bytes = _LENGTH_BYTES.get(start[len(_MAGIC) : len(_MAGIC) + 2], 0)
        first = len(_MAGIC) + 2 + count_bytes
        stop = first + int.from_bytes(start[first - count_bytes : first], "little")
        match = _HEADER.fullmatch(start[first:stop])
        if not start.startswith(_MAGIC) or not count_bytes or stop > len(start) or match is None:
            raise ValueError(f"a header that begins with {start[:64]!a}")
        documents = int(match[1])
        if header_bytes(num_bytes, documents) != stop:
            raise ValueError(f"{num_bytes} bytes, a header of {stop} and {documents} records")
        return np.memmap(path, INDEX_DTYPE, mode="r", offset=stop, shape=(documents,))

"""The index file is read within bounds, and nothing but an index is taken for one."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from ebft_mega.data.store.format import INDEX_DTYPE
from ebft_mega.data.store.index_file import MAX_HEADER_BYTES, header_bytes, load_index
from ebft_mega.errors import InputError
from tests.unit.planted import Bomb

RECORDS = np.arange(5 * 32, dtype=np.uint8).view(INDEX_DTYPE)


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_index(path)
    (problem,) = caught.value.problems
    assert problem.where == str(path)
    return problem.found


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize("documents", [1, 5])
def test_what_numpy_writes_is_read(tmp_path: Path, version: tuple[int, int], documents: int) -> None:
    path = tmp_path / "index.npy"
    with path.open("wb") as file:
        np.lib.format.write_array(file, RECORDS[:documents], version=version)
    index = load_index(path)
    assert (index.dtype, index.flags.writeable) == (INDEX_DTYPE, False)
    assert index.tobytes() == RECORDS[:documents].tobytes()
    assert 0 < header_bytes(path.stat().st_size, documents) <= MAX_HEADER_BYTES


def npy(header: bytes, body: bytes = RECORDS.tobytes(), length: int | None = None) -> bytes:
    count = len(header) if length is None else length
    return b"\x93NUMPY\x01\x00" + count.to_bytes(2, "little") + header + body


GOOD = f"{{'descr': {INDEX_DTYPE.descr}, 'fortran_order': False, 'shape': (5,), }}\n".encode()


def test_the_header_below_is_right(tmp_path: Path) -> None:
    (tmp_path / "index.npy").write_bytes(npy(GOOD))
    assert load_index(tmp_path / "index.npy").tobytes() == RECORDS.tobytes()


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00", npy(GOOD)[:40], npy(GOOD[:-10]), npy(GOOD, length=0xFFFF)),
        *(npy(GOOD, RECORDS.tobytes()[:-1]), npy(GOOD, RECORDS.tobytes() + b"x"), npy(GOOD, b"")),
        b"\x93NUMPY\x03\x00" + npy(GOOD)[8:],
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + GOOD + RECORDS.tobytes(),
        npy(GOOD.replace(b"(5,)", b"(" + b"9" * 5000 + b",)")),
        npy(GOOD.replace(b"(5,)", b"(-5,)")),
        npy(GOOD.replace(b"(5,)", b"(5, 1)")),
        npy(GOOD.replace(b"(5,)", b"(" * 3000 + b"5,)")),
        npy(GOOD.replace(b"<u4", b"<i4")),
        npy(GOOD.replace(b"<u4", b"|O")),
        npy(GOOD.replace(b"False", b"True")),
        npy(b" " * 3 * MAX_HEADER_BYTES + GOOD),
        npy(GOOD + b" " * 3 * MAX_HEADER_BYTES),
    ],
    ids=range(20),
)
def test_what_is_no_index_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "index.npy"
    path.write_bytes(content)
    assert len(refused(path)) < 300


def test_pickled_objects_are_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "index.npy"
    np.save(path, np.array([Bomb(tmp_path / "executed")], dtype=object), allow_pickle=True)
    refused(path)
    path.write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    refused(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.timeout(20)
def test_no_regular_file_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert refused(tmp_path / "fifo") == "a FIFO"
    assert refused(tmp_path) == "a directory"
    assert refused(tmp_path / "none") == "no such file"
    assert refused(Path("/dev/zero")) == "a device"

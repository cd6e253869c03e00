"""A store: data sets of a folder that machines mount at different places, copied to their own disks for a run."""

# In a configuration, with the environment variable MIRROR_FOLDER on every machine:
#     plugins: [mirror.py]  # a copy beside the configuration
#     data: {shards: "mirror://team/python"}  # of MIRROR_FOLDER/team/python, cached in data.cache as https:// is

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ebft_mega.errors import DamagedDataError, UnreachableDataError
from ebft_mega.extension.store import Store, StoreClient, Transfer

CHUNK_BYTES = 1 << 20
ADDRESS = re.compile(r"mirror://[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*/?")


class MirrorClient(StoreClient):
    """Reads files below MIRROR_FOLDER."""

    def size(self, url: str) -> int:
        """Size of a file in bytes."""
        try:
            return _file(url).stat().st_size
        except FileNotFoundError:
            raise DamagedDataError(url, None, "a file", "no such file") from None
        except OSError as error:  # such as that of a server that is gone
            raise UnreachableDataError(url, None, "a file that can be read", str(error.strerror)) from error

    def chunks(self, url: str, start: int, stop: int, total_bytes: int) -> Iterator[bytes]:
        """A byte range in order."""
        if (size := self.size(url)) != total_bytes:
            raise DamagedDataError(url, start, f"{total_bytes} bytes", f"{size} bytes")
        with _file(url).open("rb") as file:
            file.seek(start)
            while start < stop:
                chunk = file.read(min(CHUNK_BYTES, stop - start))
                if not chunk:
                    raise DamagedDataError(url, start, f"{total_bytes} bytes", f"an end after {start} bytes")
                start += len(chunk)
                yield chunk

    def small_file(self, url: str, limit_bytes: int, absent_if_forbidden: bool = False) -> bytes | None:
        """A whole file; None where there is none."""
        if not _file(url).exists():
            return None
        size = self.size(url)
        if size > limit_bytes:
            raise DamagedDataError(url, None, f"at most {limit_bytes} bytes", f"{size} bytes")
        return b"".join(self.chunks(url, 0, size, size))


class Mirror(Store):
    """The folder that the environment variable MIRROR_FOLDER names."""

    name = "mirror"

    @classmethod
    def address_problem(cls, address: str) -> str | None:
        """Names of folders alone: nothing leads out of the folder."""
        if not ADDRESS.fullmatch(address):
            return "something else than names of folders, of letters, digits, _, - and ."
        return None if os.environ.get("MIRROR_FOLDER") else "no MIRROR_FOLDER in the environment"

    def client(self, transfer: Transfer) -> MirrorClient:
        """Make a client; the time limits are those of the mount."""
        return MirrorClient()


def _file(url: str) -> Path:
    return Path(os.environ["MIRROR_FOLDER"], url.removeprefix("mirror://"))

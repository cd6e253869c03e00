"""Contract of a store: a place from which data sets and models are read by their address."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ebft_mega.extension.entry import Entry


@dataclass(frozen=True)
class Transfer:
    """Timeouts, retries and redirects of requests to a server."""

    timeout_seconds: float = 30.0  # from a request to the end of its answer's header, and for every further read
    attempts: int = 5  # for one file or byte range; the next one continues at the first missing byte
    first_wait_seconds: float = 0.5  # before the second attempt; doubled for each further one, times 0.5 to 1.5
    minimum_bytes_per_second: float = 10_000.0  # an attempt whose average stays below it is aborted
    redirect_hosts: tuple[str, ...] = ()  # followed to, besides the server itself; see `addresses.redirect_obstacle`


DEFAULT_TRANSFER = Transfer()


class StoreClient:
    """Reads files by their addresses. Threads share a client; a forked or unpickled copy opens its own connections.

    Errors name the address, never credentials, and so do logs and pickles. Nothing that a server says is believed
    before it is bounded: what is longer than asked for, or takes longer than `Transfer` allows, is an error.
    """

    def fixed(self, address: str) -> str:
        """The address of a folder as it is now, where `address` is a name that moves (a branch); else the same.

        Raises:
            DamagedDataError: there is none, or no usable answer.
        """
        return address

    def size(self, url: str) -> int:
        """Ask for a file's size in bytes.

        Raises:
            DamagedDataError: there is no such file, or no usable answer.
            UnreachableDataError: no answer to any attempt.
        """
        raise NotImplementedError

    def version(self, url: str) -> str:
        """What the server called the contents of a file when it was last asked (an ETag); empty where it says none."""
        return ""

    def chunks(self, url: str, start: int, stop: int, total_bytes: int) -> Iterator[bytes]:
        """Read a byte range in order; after a broken connection, continue at the first missing byte.

        Args:
            url: the file.
            start, stop: the range, 0 <= start <= stop <= total_bytes.
            total_bytes: size that the file must have.

        Yields:
            Chunks; together exactly the `stop - start` bytes.

        Raises:
            DamagedDataError: another size, contents that changed since `size` was asked for, a refusal.
            UnreachableDataError: too many failed attempts. Both name the offset of the first missing byte.
        """
        raise NotImplementedError

    def small_file(self, url: str, limit_bytes: int, absent_if_forbidden: bool = False) -> bytes | None:
        """Read a whole file of unknown size.

        Args:
            url: the file.
            limit_bytes: a longer file is refused.
            absent_if_forbidden: take "forbidden" for "no such file": so answer buckets whose listing is not allowed.

        Returns:
            Its contents; None where there is no such file.

        Raises:
            DamagedDataError: no usable answer.
            UnreachableDataError: no answer to any attempt.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Close idle connections; a later request opens new ones."""


class Store(Entry):
    """The servers of one scheme of addresses: `NAME://` and what `address_problem` lets pass.

    Credentials come from the environment and from the usual files of the user, never from an address or an option.
    """

    modules: ClassVar[tuple[str, ...]] = ()  # that must be installed, by their import names
    install: ClassVar[str] = ""  # command that installs them

    @classmethod
    def address_problem(cls, address: str) -> str | None:
        """Why an address with this scheme is not one that is read, in words without the address; None where it is.

        It must refuse whatever may hold a secret: users, passwords, queries.
        """
        raise NotImplementedError

    def client(self, transfer: Transfer) -> StoreClient:
        """Make a client with these limits; nothing is asked of a server yet."""
        raise NotImplementedError

"""Clients of the stores that addresses name. Imports no torch, and no store before it is used."""

import importlib.util
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ebft_mega.config.entries import read_options
from ebft_mega.errors import DamagedDataError, EbftError
from ebft_mega.extension.entry import place_of_entry
from ebft_mega.extension.entry_fault import line_within
from ebft_mega.extension.store import Store, StoreClient, Transfer
from ebft_mega.io.input_errors import bad_input
from ebft_mega.registry.kinds import STORES
from ebft_mega.registry.plugins import entry_again, plugin_of
from ebft_mega.registry.store_addresses import address_problem, schemes_in_words, store_of

logger = logging.getLogger(__name__)

Options = Mapping[str, Mapping[str, Any]]  # of stores, by their names: what `load_config` has checked


def store_client(address: str, what: str, transfer: Transfer, options: Options) -> StoreClient:
    """Make a client that reads below an address; nothing is asked of a server yet.

    Args:
        address: of a folder.
        what: is read there, for messages.
        transfer: timeouts, retries and redirects.
        options: of all stores.

    Raises:
        InputError: no store reads such an address, or what its store needs is not installed.
    """
    store = store_of(address)
    found = address_problem(address)
    if store is None or found is not None:
        # The address may hold a password, so it is not repeated.
        scheme = address.partition(":")[0]
        expected = f"a local {what}, or one at {schemes_in_words()}"
        raise bad_input(f"{scheme}:...", "address", f"a URL or a command with {found}", expected)
    if missing := [module for module in store.modules if not _is_installed(module)]:
        raise bad_input(address, "address", f"no {' and '.join(missing)}, which {store.name}:// needs", store.install)
    own = dict(options.get(store.name, {}))
    plugin = plugin_of(store)
    return new_client(store, own, transfer) if plugin is None else PluginClient(plugin, store.name, own, transfer)


def new_client(store: type[Store], options: Mapping[str, Any], transfer: Transfer) -> StoreClient:
    """Make a client of a store with options that were checked."""
    # An entry of another kind may have the name and the options.
    return store(read_options(store, options if store.Options.model_fields else {})).client(transfer)


class PluginClient(StoreClient):
    """The client of a plugin's store, which other processes make anew: they import the plugin for it.

    Args:
        plugin: as `registry.plugins.plugin_of` says.
        name, options: of the store.
        transfer: timeouts, retries and redirects.
    """

    def __init__(self, plugin: str, name: str, options: dict[str, Any], transfer: Transfer):
        self._arguments = plugin, name, options, transfer
        self._store = entry_again(plugin, STORES, name)
        self._client = new_client(self._store, options, transfer)

    def __reduce__(self) -> tuple[object, ...]:
        return PluginClient, self._arguments

    def fixed(self, address: str) -> str:
        """The address of a folder as it is now."""
        with self._faults_of(address):
            return self._client.fixed(address)

    def size(self, url: str) -> int:
        """Ask for a file's size in bytes."""
        with self._faults_of(url):
            return self._client.size(url)

    def version(self, url: str) -> str:
        """What the server called the contents of a file when it was last asked."""
        with self._faults_of(url):
            return self._client.version(url)

    def chunks(self, url: str, start: int, stop: int, total_bytes: int) -> Iterator[bytes]:
        """Read a byte range in order."""
        chunks = iter(self._client.chunks(url, start, stop, total_bytes))
        while True:
            with self._faults_of(url):
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk

    def small_file(self, url: str, limit_bytes: int, absent_if_forbidden: bool = False) -> bytes | None:
        """Read a whole file of unknown size."""
        with self._faults_of(url):
            return self._client.small_file(url, limit_bytes, absent_if_forbidden)

    def close(self) -> None:
        """Close idle connections."""
        self._client.close()

    @contextmanager
    def _faults_of(self, url: str) -> Iterator[None]:
        """Let what the plugin's code raises unforeseen be an error of the place, with the line that raised it."""
        try:
            yield
        except (EbftError, OSError):
            raise
        except Exception as error:
            logger.info("the store %s failed", self._store.name, exc_info=error)
            line = line_within(self._store, error)
            place = f"{place_of_entry(self._store)}{f', line {line}' if line else ''}"
            found = f"{type(error).__name__} of the store {self._store.name} ({place}): {error}"
            raise DamagedDataError(url, None, "an answer", found) from error


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of the package that it lies in
        return False

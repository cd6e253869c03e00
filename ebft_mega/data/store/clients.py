"""Clients of the stores that addresses name. Imports no torch, and no store before it is used."""

import importlib.util
from collections.abc import Mapping
from typing import Any

from ebft_mega.extension.store import StoreClient, Transfer
from ebft_mega.io.input_errors import bad_input
from ebft_mega.registry.store_addresses import address_problem, schemes_in_words, store_of

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
    return store(store.Options.model_validate(dict(options.get(store.name, {})))).client(transfer)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of the package that it lies in
        return False

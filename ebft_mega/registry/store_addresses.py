"""Which addresses are read, and by which store. No torch, no file access."""

import re

from ebft_mega.extension.store import Store
from ebft_mega.registry.kinds import STORES

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


def scheme_of(text: str) -> str:
    """The scheme that an address or a command begins with, in lower case; empty for a path."""
    match = _ADDRESS.match(text)
    return match[1].lower() if match else ""


def store_of(address: str) -> type[Store] | None:
    """The store of an address; None where no store has its scheme."""
    scheme = scheme_of(address)
    return STORES.entry(scheme) if scheme in STORES.names() else None


def address_problem(address: str) -> str | None:
    """Why an address is not one that is read, in words without the address; None where it is."""
    store = store_of(address)
    if store is None:
        return f"the scheme {scheme_of(address)!r}"
    if not address.lower().startswith(f"{store.name}://"):
        return "no :// behind its scheme"
    return store.address_problem(address)


def schemes_in_words() -> str:
    """Beginnings of the addresses that are read: `https:// or s3://`."""
    *others, last = (f"{name}://" for name in STORES.names())
    return f"{', '.join(others)} or {last}" if others else last

"""Which https addresses are read, and which redirects are followed. Imports no torch.

No message shows more of an address that a server has named than its host and port: the rest often contains credentials.
"""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import httpx2

_PLAIN = re.compile(r"https://[A-Za-z0-9.:\[\]-]+(/[^\s?#@]*)?", re.IGNORECASE)
_NO_PLACE = "no valid host, port or path"
_HTTPS_PORT = 443
_LONGEST_HOST = 253  # characters, as the DNS has it


def https_address_problem(address: str) -> str | None:
    """Why an address is not one that `HttpsClient` reads; None where it is."""
    try:
        parts = urlsplit(address)
        port_is_valid = parts.port is None or 0 < parts.port
    except ValueError:  # not its own words: they repeat parts of the address
        return _NO_PLACE
    if parts.scheme.lower() != "https":
        return f"the scheme {parts.scheme!r}"
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        return "a user, password, query or fragment"
    if not port_is_valid or not address.isprintable() or not _PLAIN.fullmatch(address):
        return _NO_PLACE
    return None


def redirect_obstacle(asked: "httpx2.URL", target: "httpx2.URL", redirect_hosts: Iterable[str]) -> str | None:
    """Why a redirect is not followed; None where it is.

    Args:
        asked: the address that the request was for, before any redirect. Its host and port are always allowed.
        target: where the answer leads to.
        redirect_hosts: `host` (port 443), `host:port` or `*.domain` (every host below the domain, with or without
            a port); compared exactly, in any case of letters.
    """
    if target.scheme != "https":
        return f"to the scheme {target.scheme[:20]!a}"
    if target.userinfo:
        return "with a user or password"
    host, port = _host_and_port(target)
    if (host, port) == _host_and_port(asked) or any(_names(entry.lower(), host, port) for entry in redirect_hosts):
        return None
    shown = f"{host[:_LONGEST_HOST]}:{port}" if port != _HTTPS_PORT else host[:_LONGEST_HOST]
    return f"to {ascii(shown)[1:-1]}, which is neither this server nor one of data.redirect_hosts"


def _host_and_port(url: "httpx2.URL") -> tuple[str, int]:
    host = url.raw_host.decode("ascii", "backslashreplace").lower()
    return f"[{host}]" if ":" in host else host, url.port or _HTTPS_PORT


def _names(entry: str, host: str, port: int) -> bool:
    name, colon, number = entry.rpartition(":")
    if not colon or entry.endswith("]"):  # the colons of an address of version 6 are no port
        name, number = entry, str(_HTTPS_PORT)
    is_named = host.endswith(name[1:]) if name.startswith("*.") else host == name
    return is_named and str(port) == number

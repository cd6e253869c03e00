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
_BUCKET_ADDRESS = re.compile(r"[a-z0-9]+://([A-Za-z0-9][A-Za-z0-9._-]{1,221})((?:/[^\s?#/]+)*/?)")
_NO_PLACE = "no valid host, port or path"
_HTTP_PORT, _HTTPS_PORT = 80, 443
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
        return "credentials, a query or a fragment"
    if not port_is_valid or not address.isprintable() or not _PLAIN.fullmatch(address):
        return _NO_PLACE
    return None


def bucket_address_problem(address: str) -> str | None:
    """Why an address is not one of a bucket, or of a folder in it; None where it is.

    It names no user: what stands before an @ in the place of a bucket is often a secret.
    """
    match = _BUCKET_ADDRESS.fullmatch(address)
    if match is None or not address.isprintable():
        return "no bucket, or a user, query, fragment or blank"
    return "a part . or .." if {".", ".."} & set(match[2].split("/")) else None


def bucket_and_name(address: str) -> tuple[str, str]:
    """The bucket and the name of an object of a checked address."""
    match = _BUCKET_ADDRESS.fullmatch(address)
    assert match is not None, "the address was checked"
    return match[1], match[2].removeprefix("/")


def endpoint_problem(address: str, is_secret: bool) -> str | None:
    """Why the address of a server, which the environment names, is not used; None where it is.

    Args:
        address: with its scheme.
        is_secret: whether a token is sent there: without encryption only to this machine.
    """
    try:
        parts = urlsplit(address)
        host = parts.hostname or ""
    except ValueError:
        return _NO_PLACE
    if parts.scheme == "http" and (not is_secret or host in ("localhost", "127.0.0.1", "::1")):
        address = f"https{address[len('http') :]}"
    return https_address_problem(address)


def redirect_obstacle(asked: "httpx2.URL", target: "httpx2.URL", redirect_hosts: Iterable[str]) -> str | None:
    """Why a redirect is not followed; None where it is.

    Args:
        asked: the address that the request was for, before any redirect. Its host and port are always allowed.
        target: where the answer leads to.
        redirect_hosts: `host` (port 443), `host:port` or `*.domain` (every host below the domain, with or without
            a port); compared exactly, in any case of letters.
    """
    if target.scheme not in ("https", asked.scheme):
        return f"to the scheme {target.scheme[:20]!a}"
    if target.userinfo:
        return "with a user or password"
    host, port = _host_and_port(target)
    if (host, port) == _host_and_port(asked) or any(_names(entry.lower(), host, port) for entry in redirect_hosts):
        return None
    shown = f"{host[:_LONGEST_HOST]}:{port}" if port != _HTTPS_PORT else host[:_LONGEST_HOST]
    return f"to {ascii(shown)[1:-1]}, which is neither this server nor one of data.redirect_hosts"


def is_same_server(one: "httpx2.URL", other: "httpx2.URL") -> bool:
    """Whether two addresses have the same scheme, host and port."""
    return one.scheme == other.scheme and _host_and_port(one) == _host_and_port(other)


def _host_and_port(url: "httpx2.URL") -> tuple[str, int]:
    host = url.raw_host.decode("ascii", "backslashreplace").lower()
    port = url.port or (_HTTP_PORT if url.scheme == "http" else _HTTPS_PORT)
    return f"[{host}]" if ":" in host else host, port


def _names(entry: str, host: str, port: int) -> bool:
    name, colon, number = entry.rpartition(":")
    if not colon or entry.endswith("]"):  # the colons of an address of version 6 are no port
        name, number = entry, str(_HTTPS_PORT)
    is_named = host.endswith(name[1:]) if name.startswith("*.") else host == name
    return is_named and str(port) == number

"""At which addresses this process listens for other ranks: where all of them are on one machine, at loopback alone."""

import contextlib
import errno
import ipaddress
import socket
from collections.abc import Mapping, MutableMapping

import psutil

from ebft_mega.errors import Problem, SurroundingsError

# The variables in which gloo and NCCL read the network interface that they listen and connect at.
_GLOO, _NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
_UNKNOWN_HOST = (socket.gaierror, UnicodeError)


def is_on_one_machine(environment: Mapping[str, str]) -> bool:
    """Whether all ranks are on this machine, as far as the launcher's variables tell.

    Args:
        environment: of this process, which has been checked; WORLD_SIZE is at least 2.
    """
    world_size = environment["WORLD_SIZE"]
    # LOCAL_WORLD_SIZE is torchrun's, LOCAL_SIZE deepspeed's.
    if world_size in (environment.get("LOCAL_WORLD_SIZE"), environment.get("LOCAL_SIZE")):
        return True
    # At these no other machine could reach the first rank. The machine's own name may mean loopback to itself alone.
    host = environment["MASTER_ADDR"]
    return host == "localhost" or (_is_numeric(host) and ipaddress.ip_address(host).is_loopback)


def stay_on_loopback(environment: MutableMapping[str, str]) -> None:
    """Let gloo and NCCL listen at loopback alone if all ranks are on one machine, unless their variables are set.

    Otherwise gloo listens at the address that the machine's name means, and NCCL at that of a network interface.

    Args:
        environment: as for `is_on_one_machine`; read by both libraries when they make their first group.
    """
    if not is_on_one_machine(environment):
        return
    name = _loopback_interface()
    if name is not None:
        environment.setdefault(_GLOO, name)
        environment.setdefault(_NCCL, f"={name}")  # NCCL takes a name without the sign as a beginning of names


def require_interfaces(environment: Mapping[str, str]) -> None:
    """Make sure that gloo finds the network interfaces that it is told to listen at; it says it in a C++ stack.

    Raises:
        SurroundingsError: there is no such interface on this machine.
    """
    wanted, known = environment.get(_GLOO, ""), psutil.net_if_addrs()
    if any(name not in known for name in wanted.split(",") if name):
        expected = f"one of this machine's network interfaces: {', '.join(known)}"
        raise SurroundingsError([Problem("environment", _GLOO, repr(wanted), expected)])


def listener_of_store(environment: Mapping[str, str]) -> socket.socket | None:
    """Listen where ranks meet, at the one address that MASTER_ADDR means.

    Returns:
        A listening socket. None: MASTER_ADDR is a name, and ranks of other machines may know it under an address that
        this machine does not; or it means no address of this machine. Whoever listens then takes all addresses.
    Raises:
        OSError: the port is in use, or this user may not listen at it.
    """
    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    if not (_is_numeric(host) or is_on_one_machine(environment)):
        return None
    for address in _addresses(host):
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        try:
            return socket.create_server((str(address), port), family=family, backlog=socket.SOMAXCONN)
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
    return None


def _addresses(host: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """What a host's name or address means here, without those of one link alone."""
    found: dict[ipaddress.IPv4Address | ipaddress.IPv6Address, None] = {}
    with contextlib.suppress(*_UNKNOWN_HOST):
        for _, _, _, _, place in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
            text = str(place[0])
            if "%" not in text:
                found[ipaddress.ip_address(text)] = None
    return list(found)


def _is_numeric(host: str) -> bool:
    try:
        return not ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _loopback_interface() -> str | None:
    """Name of the network interface whose addresses are reached from this machine alone; None if there is none."""
    for name, addresses in psutil.net_if_addrs().items():
        ipv4 = [item.address for item in addresses if item.family == socket.AF_INET]
        if ipv4 and all(ipaddress.ip_address(address).is_loopback for address in ipv4):
            return name
    return None

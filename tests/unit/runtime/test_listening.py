"""Where ranks listen: at loopback where all are on one machine, at MASTER_ADDR's address, or at all addresses."""

import errno
import socket

import psutil
import pytest

from ebft_mega.errors import SurroundingsError
from ebft_mega.runtime.listening import (
    is_on_one_machine,
    listener_of_store,
    require_interfaces,
    stay_on_loopback,
)


def ranks(address="node-1.invalid", **more):
    return {"WORLD_SIZE": "4", "MASTER_ADDR": address, "MASTER_PORT": "0", **more}


@pytest.mark.parametrize(
    ("environment", "is_one"),
    [
        (ranks("127.0.0.1"), True),
        (ranks("localhost"), True),
        (ranks("::1"), True),
        (ranks("192.0.2.77"), False),
        (ranks(), False),
        (ranks(LOCAL_WORLD_SIZE="4"), True),
        (ranks(LOCAL_WORLD_SIZE="2"), False),
        (ranks(LOCAL_SIZE="4", CROSS_SIZE="1"), True),
        (ranks(LOCAL_SIZE="2", CROSS_SIZE="2"), False),
    ],
)
def test_whether_all_ranks_are_on_one_machine(environment, is_one):
    assert is_on_one_machine(environment) is is_one
    stay_on_loopback(environment)
    assert ("GLOO_SOCKET_IFNAME" in environment) is is_one
    assert ("NCCL_SOCKET_IFNAME" in environment) is is_one


def test_interfaces_that_somebody_has_set_stay():
    environment = ranks("127.0.0.1", GLOO_SOCKET_IFNAME="eth1", NCCL_SOCKET_IFNAME="ib0")
    stay_on_loopback(environment)
    assert (environment["GLOO_SOCKET_IFNAME"], environment["NCCL_SOCKET_IFNAME"]) == ("eth1", "ib0")


@pytest.mark.parametrize("names", ["no-such-interface", "lo,no-such-interface", "lo0 lo1"])
def test_an_interface_that_the_machine_does_not_have_is_named(names):
    with pytest.raises(SurroundingsError, match=r"GLOO_SOCKET_IFNAME: found .*; expected .*network interfaces: "):
        require_interfaces(ranks(GLOO_SOCKET_IFNAME=names))


def test_interfaces_of_the_machine_are_none_to_refuse():
    known = list(psutil.net_if_addrs())
    for environment in (ranks(), ranks(GLOO_SOCKET_IFNAME=""), ranks(GLOO_SOCKET_IFNAME=",".join(known[:2]))):
        require_interfaces(environment)


def test_a_machine_that_knows_itself_as_loopback_may_be_one_of_several(monkeypatch):
    """As Debian's /etc/hosts has it."""
    place = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [place])
    assert not is_on_one_machine(ranks("node-1"))
    assert listener_of_store(ranks("node-1")) is None


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", "localhost"])
def test_the_store_listens_at_one_address(address):
    own = listener_of_store(ranks(address))
    with own:
        assert own.getsockname()[0] in ("127.0.0.1", "127.0.0.2", "::1")


@pytest.mark.parametrize("address", ["192.0.2.77", "node-1.invalid", "0.0.0.0", "::"])
def test_an_address_that_is_not_this_machines_or_a_name_binds_nothing(address):
    assert listener_of_store(ranks(address)) is None


def test_a_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as other:
        with pytest.raises(OSError) as refused:
            listener_of_store(ranks("127.0.0.1", MASTER_PORT=str(other.getsockname()[1])))
    assert refused.value.errno == errno.EADDRINUSE

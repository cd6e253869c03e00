"""Ranks meet under their launch: a port in use, something else that listens and another launch end in one line."""

import contextlib
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import psutil
import pytest
import torch
import torch.distributed as dist

from ebft_mega.errors import SurroundingsError
from ebft_mega.parallel.groups import connect, make_process_groups
from ebft_mega.parallel.rendezvous import Patience, meet
from tests.distributed.ranks import free_port, run_ranks

HASTY = Patience(peers=20.0, name=0.5, answer=2.0, other_launch=1.0)
SHORT = Patience(peers=1.0, name=0.5, answer=2.0, other_launch=1.0)


def rank(number, port, world_size=2, **more):
    """The environment of a rank that nobody's launcher has started."""
    return {
        "RANK": str(number),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **more,
    }


def refusal(environment, configuration="", patience=SHORT):
    with pytest.raises(SurroundingsError) as refused:
        meet(environment, configuration, patience)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600
    return str(refused.value)


@contextlib.contextmanager
def listener(answer=None):
    """A program at a port of its own, which says nothing, or the same to everybody."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        if connection.recv(1000):
                            connection.sendall(answer)

        if answer is not None:
            threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]


def test_ranks_of_one_launch_meet():
    port = free_port()
    with ThreadPoolExecutor(3) as ranks:
        stores = list(ranks.map(lambda number: meet(rank(number, port, 3), "a", HASTY), range(3)))
    stores[0].set("key", "value")
    assert [store.get("key") for store in stores] == [b"value"] * 3


def test_two_launches_at_one_port_never_mix():
    """All ranks start at once: one launch runs, and every rank of the other one is refused."""
    port, options = free_port(), "`deepspeed --master_port`"
    deepspeed = {"CROSS_SIZE": "2", "LOCAL_SIZE": "1"}

    def come(which):
        launch, number = which
        try:
            return meet(rank(number, port, **deepspeed), launch, HASTY)
        except SurroundingsError as error:
            return error

    with ThreadPoolExecutor(4) as ranks:
        # The first launch's first rank is late, so the second launch's other rank finds its port open.
        found = list(ranks.map(come, [("a", 0), ("a", 1), ("b", 1)]))
        found.append(come(("b", 1)))
    assert isinstance(found[0], dist.Store) and isinstance(found[1], dist.Store)
    for error in found[2:]:
        assert "another run answers" in str(error) and options in str(error) and "configuration b" in str(error)
    stranger = refusal(rank(1, port, **deepspeed), "a")
    assert "another process is rank 1 already" in stranger


def test_the_port_is_in_use():
    with listener() as port:
        for more, option in (
            ({}, "the variable MASTER_PORT"),
            ({"CROSS_SIZE": "1", "LOCAL_SIZE": "2"}, "`deepspeed --master_port`"),
        ):
            text = refusal(rank(0, port, **more))
            assert text.startswith(
                f"environment: MASTER_PORT: found {port}, at which another program listens; expected"
            )
            assert text.endswith(f"which {option} sets")


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "where something else answers"),
        (None, "where something listens and says nothing"),
    ],
)
def test_what_listens_is_no_store(answer, text, capfd):
    with listener(answer) as port:
        patience = SHORT if answer is None else replace(SHORT, answer=6.0)  # half of it for each try, on a busy machine
        assert text in refusal(rank(1, port), patience=patience)
    assert capfd.readouterr().err == ""


def test_nobody_listens():
    assert "where nothing has answered for 1 s (connection refused)" in refusal(rank(1, free_port()))


def test_a_host_that_is_not_known():
    found = refusal(rank(1, free_port()) | {"MASTER_ADDR": "no-such-host.invalid"})
    assert found.startswith("environment: MASTER_ADDR: found 'no-such-host.invalid', which is not known here; expected")


def test_a_rank_that_does_not_come():
    assert "found 3, of which ranks 1, 2 did not come within 1 s" in refusal(rank(0, free_port(), 3))


def test_the_store_of_torchruns_agent():
    """All ranks are clients; what an earlier start of the ranks has left there is not taken for this one's."""
    agent = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    own = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "job", "LOCAL_WORLD_SIZE": "1"}
    impatient = Patience(peers=20.0, name=0.5, answer=2.0, other_launch=0.1)

    def come(environment):
        time.sleep(0.0 if environment["RANK"] == "1" else 0.6)  # longer than what an earlier start may take to end
        return meet(environment, "", impatient)

    for attempt in "01":
        more = own | {"TORCHELASTIC_RESTART_COUNT": attempt}
        with ThreadPoolExecutor(2) as ranks:
            stores = list(ranks.map(come, [rank(number, agent.port, **more) for number in (1, 0)]))
        assert not stores[0].check(["key"])
        stores[0].set("key", attempt)
        assert stores[1].get("key") == attempt.encode()


def listening():
    """Addresses and ports at which this process listens for connections."""
    found = psutil.Process().net_connections("tcp")
    return {tuple(item.laddr) for item in found if item.status == psutil.CONN_LISTEN}


def test_the_store_listens_where_the_ranks_meet_and_nowhere_else():
    port = free_port()
    with ThreadPoolExecutor(2) as ranks:
        stores = list(ranks.map(lambda number: meet(rank(number, port), "a", HASTY), range(2)))
    assert stores and {address for address, its_port in listening() if its_port == port} == {"127.0.0.1"}


def listen_with_groups():
    connect()
    groups = make_process_groups(torch.device("cpu"))
    dist.all_reduce(torch.ones(1), group=groups.data_parallel)
    return listening(), os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]


def test_ranks_of_one_machine_listen_at_loopback_alone():
    """The store and gloo; without the variables gloo takes the address that the machine's name means."""
    for places, gloo, nccl in run_ranks(2, listen_with_groups):
        assert len(places) >= 2 and {address for address, _ in places} <= {"127.0.0.1", "::1"}
        assert nccl == f"={gloo}"
        assert [item.address for item in psutil.net_if_addrs()[gloo]].count("127.0.0.1") == 1

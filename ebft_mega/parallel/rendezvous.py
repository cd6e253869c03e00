"""Where the ranks of a launch meet: one store, in which a rank of another launch is never taken for one of these."""

import contextlib
import datetime
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import torch.distributed as dist

from ebft_mega.errors import Problem, SurroundingsError
from ebft_mega.runtime.launch_environment import Launch
from ebft_mega.runtime.listening import listener_of_store

T = TypeVar("T")
NAP_SECONDS = 0.1
SPACE = "ebft_mega"  # of this program's keys in a store that may be torchrun's


@dataclass(frozen=True)
class Patience:
    """How long a rank waits for what, in seconds."""

    peers: float = 600.0  # for the first rank to listen, and for all others to come
    name: float = 60.0  # for a host name that is not known (yet)
    answer: float = 60.0  # of whatever listens, as a store answers
    other_launch: float = 10.0  # for what listens to become this launch's store: an earlier one may be ending


def meet(environment: Mapping[str, str], configuration: str = "", patience: Patience | None = None) -> dist.Store:
    """Wait until all ranks of this launch are there.

    The first rank opens a store at MASTER_ADDR and MASTER_PORT (under torchrun its agent has), and writes there which
    launch it belongs to; every other rank compares. Each then takes its number, which can be taken once.

    Args:
        environment: of this process, which has been checked; WORLD_SIZE is at least 2.
        configuration: tells starts of different runs apart where the launcher tells nothing.
    Returns:
        The launch's own part of the store.
    Raises:
        SurroundingsError: the port is in use, something else or another launch answers, ranks do not come.
    """
    return _Meeting(environment, configuration, patience or Patience()).store()


class _Meeting:
    """What one rank does until all are there."""

    def __init__(self, environment: Mapping[str, str], configuration: str, patience: Patience):
        self._host, self._port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        self._rank, self._world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        self._environment = environment
        self._launch = Launch.of(environment)
        self._patience = patience
        self._agent_listens = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        identity = self._launch.identity or f"configuration {configuration}"
        self._token = f"{identity}, start {self._launch.attempt}, {self._world_size} ranks"

    def store(self) -> dist.Store:
        is_first = self._rank == 0
        if not is_first or self._agent_listens:
            self._wait_for_listener()
        store = self._opened(is_first and not self._agent_listens)
        launches = dist.PrefixStore(f"{SPACE}/{self._launch.attempt}", store)
        if is_first:
            launches.set("launch", self._token)
        self._compare(launches)
        own = dist.PrefixStore(f"{SPACE}/{self._token}", store)
        if own.add(f"rank {self._rank}", 1) > 1:
            self._refuse(f"{self._place}, where another process is rank {self._rank} already", self._other_port)
        self._wait_for_all(own)
        return own

    @property
    def _place(self) -> str:
        return f"{self._host}:{self._port}"

    @property
    def _other_port(self) -> str:
        return f"a port of this launch alone, which {self._launch.port_option} sets"

    def _refuse(self, found: str, expected: str, key: str = "MASTER_PORT") -> NoReturn:
        raise SurroundingsError([Problem("environment", key, found, expected)]) from None

    def _wait_for_listener(self) -> None:
        """Until something listens at the place; it may still be starting."""
        started, failure = time.monotonic(), "nobody listens"
        while True:
            try:
                socket.create_connection((self._host, self._port), timeout=1.0).close()
                return
            except (socket.gaierror, UnicodeError):
                if time.monotonic() - started > self._patience.name:
                    expected = "the host name or address of the first rank's machine"
                    self._refuse(f"{self._host!r}, which is not known here", expected, "MASTER_ADDR")
            except OSError as error:
                failure = (error.strerror or str(error)).lower()
            if time.monotonic() - started > self._patience.peers:
                found = f"{self._place}, where nothing has answered for {self._patience.peers:g} s ({failure})"
                self._refuse(found, "the machine and the port at which the first rank listens")
            time.sleep(NAP_SECONDS)

    def _opened(self, listens: bool) -> dist.Store:
        def make() -> dist.Store:
            own = listener_of_store(self._environment) if listens else None
            return dist.TCPStore(
                self._host,
                self._port,
                self._world_size,
                listens,
                timeout=datetime.timedelta(seconds=self._patience.answer / 2),  # of each try
                wait_for_workers=False,  # whoever connects would count
                multi_tenant=True,
                master_listen_fd=None if own is None else own.detach(),  # the store closes it
            )

        try:
            with _torch_prints_nothing():
                return _within(self._patience.answer, make)
        except TimeoutError:
            self._refuse(f"{self._place}, where something listens and says nothing", self._other_port)
        except (RuntimeError, OSError) as error:
            text = str(error).splitlines()[0]
            if "EADDRINUSE" in text or "already in use" in text:
                self._refuse(
                    f"{self._port}, at which another program listens",
                    f"a free port, which {self._launch.port_option} sets",
                )
            if "EACCES" in text or "ermission" in text:
                self._refuse(f"{self._port}, at which this user may not listen", self._other_port)
            if listens and "timed out" in text:
                expected = "the host name or address of the first rank's machine, which this is"
                self._refuse(f"{self._host!r}, where this rank does not hear itself", expected, "MASTER_ADDR")
            self._refuse(f"{self._place}, where something else answers ({text[:150]})", self._other_port)

    def _compare(self, launches: dist.Store) -> None:
        """Until the first rank of this launch has written which one it is."""
        started, found = time.monotonic(), ""
        while True:
            with self._store_may_vanish():
                found = launches.get("launch").decode() if launches.check(["launch"]) else ""
            if found == self._token:
                return
            limit = self._patience.other_launch if found else self._patience.peers
            if time.monotonic() - started > limit:
                what = f"another run answers ({found}; this one is {self._token})" if found else "no first rank comes"
                self._refuse(f"{self._place}, where {what}", self._other_port)
            time.sleep(NAP_SECONDS)

    def _wait_for_all(self, own: dist.Store) -> None:
        started, missing = time.monotonic(), list(range(self._world_size))
        while True:
            with self._store_may_vanish():
                if self._rank == 0:
                    missing = [rank for rank in missing if not own.check([f"rank {rank}"])]
                    if not missing:
                        own.set("complete", "")
                if own.check(["complete"]):
                    return
            if time.monotonic() - started > self._patience.peers:
                who = f"ranks {', '.join(map(str, missing[:20]))}" if self._rank == 0 else "some ranks"
                found = f"{self._world_size}, of which {who} did not come within {self._patience.peers:g} s"
                self._refuse(found, "processes that all start", "WORLD_SIZE")
            time.sleep(NAP_SECONDS)

    @contextlib.contextmanager
    def _store_may_vanish(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError:
            self._refuse(f"{self._place}, where the first rank has gone while ranks met", "a first rank that stays")


def _within(seconds: float, make: Callable[[], T]) -> T:
    """Call a function that may wait for ever; it is then left behind in its thread.

    Raises:
        TimeoutError: it has not returned in time.
    """
    results: list[T] = []
    failures: list[Exception] = []

    def run() -> None:
        try:
            results.append(make())
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="rendezvous", daemon=True)
    thread.start()
    thread.join(seconds)
    if failures:
        raise failures[0]
    if not results:
        raise TimeoutError
    return results[0]


@contextlib.contextmanager
def _torch_prints_nothing() -> Iterator[None]:
    """Let torch's C++ stacks, which it prints beside the error that it raises, lead nowhere."""
    sys.stderr.flush()
    shown = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(shown, 2)
        os.close(shown)
        os.close(nowhere)

"""A value or an error of one rank reaches all ranks, and what a rank sends that is no message is refused."""

import math
import pickle
from pathlib import Path

import torch.distributed as dist

from ebft_mega.errors import FirstRankFailedError, ForeignMessageError, InputError, Problem
from ebft_mega.parallel.groups import connect
from ebft_mega.runtime.agreement import from_first_rank
from ebft_mega.runtime.exchange import all_gather_values, broadcast_message, broadcast_value, gather_values
from tests.distributed.ranks import run_ranks


def refuse():
    raise InputError([Problem("a file", "key", "this", "that")])


def error_of(call, kind):
    try:
        call()
    except kind as error:
        return type(error).__name__, str(error)
    return None


def hear():
    connect()
    value = from_first_rank(dist.get_rank)
    own = [dist.get_rank(), math.inf, {Path("a" * 300 * dist.get_rank()): ("é", None)}]
    return {
        "value": value,
        "refused": error_of(lambda: from_first_rank(refuse), InputError),
        "missing": error_of(lambda: from_first_rank(Path("no such file").read_text), OSError),
        "other": error_of(lambda: from_first_rank(lambda: 1 // 0), (ZeroDivisionError, FirstRankFailedError)),
        "unsent": error_of(lambda: from_first_rank(set), (TypeError, FirstRankFailedError)),
        "all": all_gather_values(own),
        "first": gather_values(own),
        "last": broadcast_value(own, source=1),
        "still there": from_first_rank(lambda: "yes"),
    }


def test_result_and_error_of_the_first_rank_reach_all():
    first, second = run_ranks(2, hear)
    own = [[0, math.inf, {Path(): ("é", None)}], [1, math.inf, {Path("a" * 300): ("é", None)}]]
    words = "a file: key: found this; expected that"
    missing = ("FileNotFoundError", "[Errno 2] No such file or directory: 'no such file'")
    for found in (first, second):
        assert (found["value"], found["refused"], found["still there"]) == (0, ("InputError", words), "yes")
        assert (found["missing"], found["all"], found["last"]) == (missing, own, own[1])
    assert (first["first"], second["first"]) == (own, None)
    assert first["other"][0] == "ZeroDivisionError" and first["unsent"][0] == "TypeError"
    assert second["other"][0] == second["unsent"][0] == "FirstRankFailedError"
    assert "ZeroDivisionError: integer division" in second["other"][1] and "set" in second["unsent"][1]


class Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def hear_a_pickle(trap):
    connect()
    if dist.get_rank() == 0:
        broadcast_message(pickle.dumps(Trap(trap)))
        return None
    return error_of(lambda: from_first_rank(lambda: None), ForeignMessageError)


def test_a_pickle_that_a_rank_sends_is_not_loaded(tmp_path):
    found = run_ranks(2, hear_a_pickle, tmp_path / "trap")
    assert found[1] is not None and "no message of this program" in found[1][1]
    assert not (tmp_path / "trap").exists()

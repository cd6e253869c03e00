"""What all entries of the registries have in common."""

import gc
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from ebft_mega.config.schema import RunConfig
from ebft_mega.extension.entry import place_of_entry


@contextmanager
def other_threads_at_every_collection() -> Iterator[None]:
    """Let a garbage collection, of which there are many, give way to other threads."""
    thresholds = gc.get_threshold()

    def give_way(phase: str, info: dict[str, int]) -> None:
        time.sleep(0)

    gc.callbacks.append(give_way)
    gc.set_threshold(50)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(give_way)


def test_threads_may_ask_for_the_place_of_an_entry_at_once() -> None:
    # A pool of them meets a plugin's faults. Python 3.11: "AST constructor recursion depth mismatch".
    with other_threads_at_every_collection(), ThreadPoolExecutor(8) as executor:
        places = set(executor.map(place_of_entry, [RunConfig] * 40))  # of a large module
    assert len(places) == 1

"""Run a function in real ranks on gloo, forked from a server that has imported torch, deepspeed and megatron-core.

All cases of one world size share one set of processes: starting a rank costs far more than a tiny step.
"""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

TIMEOUT_SECONDS = 300
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.distributed.preload"])


def free_port() -> int:
    """A port that nobody listens on right now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _rank_main(
    pipe: Connection, rank: int, world_size: int, port: int, function: Callable[..., Any], arguments: tuple
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    import torch

    torch.set_num_threads(1)
    try:
        # Pickled here: a pipe would pass tensors as file descriptors, which die with this process.
        pipe.send(("result", pickle.dumps(function(*arguments))))
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
        raise
    finally:
        pipe.close()


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `function(*arguments)` in every rank of a new job.

    Args:
        function: importable by name; joins the process group itself (`connect`).
    Returns:
        Results by rank.
    Raises:
        AssertionError: a rank raised (its traceback is the message) or did not end in time.
    """
    port = free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        ours, theirs = _context.Pipe(duplex=False)
        process = _context.Process(
            target=_rank_main, args=(theirs, rank, world_size, port, function, arguments), daemon=True
        )
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    results: dict[int, Any] = {}
    try:
        while len(results) < world_size:
            waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
            ready = wait(waiting, timeout=TIMEOUT_SECONDS)
            assert ready, f"ranks did not end within {TIMEOUT_SECONDS} s"
            for pipe in ready:
                rank = pipes.index(pipe)
                try:
                    kind, value = pipe.recv()
                except EOFError:
                    raise AssertionError(f"rank {rank} died without a word") from None
                assert kind == "result", f"rank {rank}:\n{value}"
                results[rank] = pickle.loads(value)
    finally:
        for process in processes:
            process.join(timeout=10 if len(results) == world_size else 0)
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(world_size)]

"""The command lines of an experiment's phases, and the options that the tools running experiments share."""

import argparse
import os
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from ebft_mega.apps.experiment.running.phases import PhaseRunner
from ebft_mega.errors import InputError, Problem
from ebft_mega.io.arguments import whole_number
from ebft_mega.io.standard_streams import print_line

MOST_THREADS = 4


def add_runner_options(parser: argparse.ArgumentParser) -> None:
    """Add `--ranks` and `--fresh`, which `phase_runner` reads."""
    parser.add_argument(
        "--ranks", type=whole_number(), default=default_num_ranks(), help="processes (default %(default)s)"
    )
    parser.add_argument("--fresh", action="store_true", help="reuse nothing from an earlier run")


def phase_runner(arguments: argparse.Namespace, root: Path) -> PhaseRunner:
    """Make the runner that a tool's options ask for.

    Args:
        arguments: with the options of `add_runner_options`.
        root: directory in which the commands run.
    """
    return PhaseRunner(
        root,
        say=lambda text: print_line(text, sys.stdout),
        environment=thread_environment(arguments.ranks),
        fresh=arguments.fresh,
    )


def tool_command(tool: str, arguments: Sequence[str]) -> list[str]:
    """Make the command line that runs one of the repository's tools with this interpreter."""
    return [sys.executable, f"tools/{tool}", *arguments]


def find_program(name: str) -> Path:
    """Find a program beside this interpreter, or else on the search path.

    Raises:
        InputError: it is in neither place.
    """
    beside = Path(sys.executable).parent / name
    if beside.exists():
        return beside
    found = shutil.which(name)
    if found is None:
        where = f"beside {sys.executable} or on the search path"
        raise InputError([Problem("environment", name, "no such program", f"{name} {where}: make setup")])
    return Path(found)


def default_num_ranks() -> int:
    """One process on a machine with an NVIDIA GPU; on a CPU one per core, at most 2."""
    if shutil.which("nvidia-smi"):
        return 1
    return min(2, os.cpu_count() or 1)


def thread_environment(num_ranks: int) -> dict[str, str]:
    """Threads of each process, so that the ranks of one machine share its cores.

    The models are tiny: more than a few threads per process would only wait for each other.
    """
    threads = max(1, min(MOST_THREADS, (os.cpu_count() or 1) // num_ranks))
    return {"OMP_NUM_THREADS": str(threads)}


def free_port() -> int:
    """Find a TCP port that nothing listens on, so that two runs on one machine do not use the same one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port

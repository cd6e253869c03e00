"""Jobs of two ranks that tests hold at chosen places, signal and kill, and what jobs leave behind."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.distributed.ranks import free_port
from tests.distributed.runs import TEXT, assert_equal_tensors, checkpoint, lines, make_datasets
from tests.integration import rank_with_faults
from tests.overrides import last_of_each

RANKS = 2
SECONDS_TO_START = 120
SECONDS_TO_END = 60  # after which no process of a job may be left
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.distributed.preload"])


@dataclass(frozen=True)
class Site:
    """A directory with data and a configuration, in which runs are made."""

    directory: Path

    @classmethod
    def made_in(cls, directory: Path) -> "Site":
        make_datasets(directory)
        text = TEXT % ("llama", "true")
        (directory / "config.yaml").write_text(text)
        return cls(directory)

    def arguments(self, output: Path, overrides: tuple[str, ...]) -> list[str]:
        """Of the launcher, for a run into `output`."""
        pairs = (
            f"output_dir={output}",
            f"data.shards={self.directory / 'train'}",
            f"evaluation.shards={self.directory / 'held_out'}",
            f"data.cache={self.directory / 'cache'}",
            *overrides,
        )
        return ["--config", str(self.directory / "config.yaml"), "--set", *last_of_each(*pairs)]


@dataclass
class Job:
    """Ranks that are running, and perhaps their launcher."""

    output: Path
    notes: Path
    consoles: list[Path]
    processes: list[Any]  # what was started here: the ranks themselves, or their launcher
    everybody: list[psutil.Process] = field(default_factory=list)

    @property
    def console(self) -> str:
        """Everything that was printed."""
        return "".join(path.read_text(errors="replace") for path in self.consoles)

    def rank(self, number: int) -> psutil.Process:
        """Process of a rank, once the job is holding."""
        if not isinstance(self.processes[0], subprocess.Popen):
            return psutil.Process(self.processes[number].pid)
        ranks = [process for process in self.everybody if rank_with_faults.__file__ in process.cmdline()[:3]]
        return next(process for process in ranks if process.environ().get("RANK") == str(number))

    @property
    def launch_py(self) -> psutil.Process:
        """DeepSpeed's second launcher, which the command has started."""
        return next(process for process in self.everybody if "deepspeed.launcher.launch" in process.cmdline())

    def wait_until_holding(self, *ranks: int) -> None:
        """Until these ranks wait where they were told to."""
        deadline = time.monotonic() + SECONDS_TO_START
        while not all((self.notes / f"holding-{rank}").exists() for rank in ranks):
            assert time.monotonic() < deadline and not self.has_ended(), self.console
            time.sleep(0.02)
        for process in self.processes:
            self.everybody += [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]

    def go(self) -> None:
        """Let ranks that wait continue."""
        (self.notes / "go").touch()

    def kill(self) -> None:
        """Kill -9 every process of the job."""
        for process in self.everybody:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        for process in self.processes:
            code_of(process, SECONDS_TO_END)

    def has_ended(self) -> bool:
        """Whether any process that was started here has ended."""
        return any(code_of(process, 0) is not None for process in self.processes)

    def end(self) -> list[int]:
        """Exit codes of what was started here; nothing of the job may be left after a while."""
        deadline = time.monotonic() + SECONDS_TO_END
        codes = [code_of(process, deadline - time.monotonic()) for process in self.processes]
        left = psutil.wait_procs(self.everybody, timeout=max(0.0, deadline - time.monotonic()))[1]
        assert None not in codes and not left, f"{codes}, {left}:\n{self.console}"
        return codes

    @property
    def status(self) -> dict[str, Any]:
        return json.loads((self.output / "status.json").read_text())


def code_of(process: Any, timeout: float) -> int | None:
    """Exit code of a process of either kind; None if it does not end in time."""
    if isinstance(process, subprocess.Popen):
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
    process.join(timeout)
    return process.exitcode


@contextmanager
def forked(site: Site, output: Path, *overrides: str, ranks: int = RANKS, **faults: Any) -> Iterator[Job]:
    """A job without a launcher, whose ranks start at once, forked from a process that has imported everything."""
    notes, environment = _prepare(output, faults)
    port = free_port()
    job = Job(output, notes, [notes / f"console-{rank}.txt" for rank in range(ranks)], [])
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}
        arguments = (site.arguments(output, overrides), own, str(job.consoles[rank]))
        process = _context.Process(target=_be_forked_rank, args=arguments)
        process.start()
        job.processes.append(process)
    try:
        yield job
    finally:
        for process in job.processes:
            process.kill()
            process.join(SECONDS_TO_END)


def _be_forked_rank(arguments: list[str], environment: dict[str, str], console: str) -> None:
    os.environ.update(environment)
    stream = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    import torch

    torch.set_num_threads(1)
    rank_with_faults.main(arguments)


@contextmanager
def launched(
    site: Site,
    output: Path,
    *overrides: str,
    launcher: str = "deepspeed",
    pipe: bool = False,
    ignored: tuple[int, ...] = (),
    **faults: Any,
) -> Iterator[Job]:
    """A job of the `deepspeed` command or of `torchrun`, in a process group of its own.

    Args:
        pipe: what it prints goes to a `tee` of the same process group.
        ignored: signals that it ignores when it starts, as under `nohup`.
    """
    notes, environment = _prepare(output, faults)
    programs = Path(sys.executable).parent
    options = {"deepspeed": ("--num_gpus", "--master_port"), "torchrun": ("--nproc-per-node", "--master-port")}[
        launcher
    ]
    command = [str(programs / launcher), options[0], str(RANKS), options[1], str(free_port())]
    command += [rank_with_faults.__file__, *site.arguments(output, overrides)]
    console = notes / "console.txt"
    environment |= {"DS_ACCELERATOR": "cpu", "PATH": f"{programs}:{os.environ['PATH']}"}
    with console.open("wb") as stream:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE if pipe else stream,
            stderr=subprocess.STDOUT,
            process_group=0,
            preexec_fn=lambda: [signal.signal(number, signal.SIG_IGN) for number in ignored],
        )
        try:
            if pipe:  # it ends with its input, or with its process group
                subprocess.Popen(["tee"], stdin=process.stdout, stdout=stream, process_group=process.pid)
                process.stdout.close()
            yield Job(output, notes, [console], [process])
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait(SECONDS_TO_END)


def _prepare(output: Path, faults: dict[str, Any]) -> tuple[Path, dict[str, str]]:
    """A new directory for notes, and the environment of the ranks."""
    number = sum(path.name.startswith(f"{output.name}-notes-") for path in output.parent.iterdir())
    notes = output.parent / f"{output.name}-notes-{number}"
    notes.mkdir()
    environment = {"EBFT_FAULTS": json.dumps(faults), "EBFT_FAULT_NOTES": str(notes), "OMP_NUM_THREADS": "1"}
    return notes, environment


def finish(site: Site, output: Path, *overrides: str, **faults: Any) -> str:
    """Start the run, with faults that do not end it, let it come to its end, and return what it printed."""
    with forked(site, output, *overrides, **faults) as job:
        assert job.end() == [0] * RANKS, job.console
        return job.console


def assert_same_outcome(clean: Path, other: Path, steps: int) -> None:
    """A run that was disturbed has led to the very bits of the one that was not."""
    expected, found = lines(clean), lines(other)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    different = [pair for pair in zip(expected, found, strict=True) if pair[0] != pair[1]]
    assert different == [], different[0]
    for name in ("samples.jsonl", "hf/model.safetensors"):
        assert (other / name).read_bytes() == (clean / name).read_bytes(), name
    assert_equal_tensors(checkpoint(clean, steps), checkpoint(other, steps))
    assert (other / "status.json").read_text() == (clean / "status.json").read_text()

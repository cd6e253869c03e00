"""What a launcher says in environment variables: checked before anything starts, and read in one place. No torch."""

import re
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass

import psutil

from ebft_mega.errors import Problem, SurroundingsError
from ebft_mega.runtime.run_lock import boot_of_machine, process_start

MAX_PROCESSES = 1 << 20
TORCHRUN = "torchrun"
DEEPSPEED = "deepspeed"
_PORTS = range(1, 1 << 16)
_NUMBERS = range(MAX_PROCESSES)
_COUNTS = range(1, MAX_PROCESSES + 1)
_ANY = range(1 << 63)
_PORT = "the port at which the ranks meet"
# Variables of which this program or torch makes integers, what they may be, and what they say.
_OF_RANKS = {
    "RANK": (_NUMBERS, "the number of this process"),
    "WORLD_SIZE": (_COUNTS, "the number of processes"),
    "LOCAL_RANK": (_NUMBERS, "the number of this process on its machine"),
    "LOCAL_WORLD_SIZE": (_COUNTS, "the number of processes on this machine"),
    "MASTER_PORT": (_PORTS, _PORT),
    "TORCHELASTIC_RESTART_COUNT": (_ANY, "how often torchrun has started the ranks again"),
    "SLURM_RESTART_COUNT": (_ANY, "how often Slurm has requeued the job"),
}
_OF_SLURM_TASKS = {
    "SLURM_PROCID": (_NUMBERS, "the number of this task"),
    "SLURM_LOCALID": (_NUMBERS, "the number of this task on its machine"),
    "SLURM_JOB_ID": (_ANY, "the number of the job"),
    "SLURM_NTASKS": (_COUNTS, "the number of tasks"),
    "SLURM_STEP_NUM_TASKS": (_COUNTS, "the number of tasks of the step"),
}
# What the launchers of MPI say of the number of processes.
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_MASTER = "the host name or address of the first rank's machine"
_OTHER_LAUNCHERS = "RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as deepspeed, torchrun and srun set them"


def launching_program(environment: Mapping[str, str]) -> str:
    """Return the program that has started this rank: `torchrun`, `deepspeed`, or nothing where neither has."""
    if "TORCHELASTIC_RUN_ID" in environment:
        return TORCHRUN
    return DEEPSPEED if "CROSS_SIZE" in environment and "LOCAL_SIZE" in environment else ""


@dataclass(frozen=True)
class Launch:
    """One start of all ranks, as far as a rank can tell it from others."""

    port_option: str  # what sets the port at which the ranks meet
    identity: str  # the same on all ranks of this launch and of no other; empty where nothing tells launches apart
    attempt: str  # tells apart what one launcher starts again

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Launch":
        """Read the launch of this rank from its environment, which has been checked.

        With `deepspeed` and `torchrun` on one machine the launcher's process is that of all ranks and of no other
        launch; with `srun` job, step and restart are. `torchrun` over several machines has an id if somebody gives it
        one. Nothing tells apart: ranks that a person starts, and `deepspeed` over several machines.
        """
        program = launching_program(environment)
        if program == TORCHRUN:
            run_id = environment["TORCHELASTIC_RUN_ID"]
            if environment.get("LOCAL_WORLD_SIZE") == environment.get("WORLD_SIZE"):
                identity = _launching_process("TORCHELASTIC_RUN_ID")
            else:
                identity = f"torchrun {run_id}" if run_id != "none" else ""
            attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
            return cls("`torchrun --master-port` or `--rdzv-endpoint`", identity, attempt)
        if program == DEEPSPEED:
            identity = _launching_process("CROSS_SIZE") if environment["CROSS_SIZE"] == "1" else ""
            return cls("`deepspeed --master_port`", identity, "0")
        option = "the variable MASTER_PORT"
        if _is_slurm_task(environment) and environment.get("SLURM_PROCID") == environment.get("RANK"):
            step = f"{environment['SLURM_JOB_ID']}.{environment['SLURM_STEP_ID']}"
            # Components of a heterogeneous job have numbers of their own.
            identity = "" if "SLURM_HET_SIZE" in environment else f"Slurm step {step}"
            return cls(option, identity, environment.get("SLURM_RESTART_COUNT", "0"))
        return cls(option, "", "0")


def enter_launch(environment: MutableMapping[str, str], starts: bool, meets: bool) -> None:
    """Check what the launcher has set; under a bare `srun` be the rank that the task's number says.

    Args:
        environment: of this process.
        starts: whether ranks start; a plan alone may be for a number of processes of which this is none.
        meets: whether the ranks of this environment are those that are started or planned for.
    Raises:
        SurroundingsError: everything that is wrong, at once.
    """
    problems = list(_not_integers(environment, _OF_RANKS))
    if _is_slurm_task(environment):
        problems += _not_integers(environment, _OF_SLURM_TASKS)
        missing = [name for name in ("SLURM_LOCALID", "SLURM_JOB_ID") if name not in environment]
        problems += [Problem("srun", name, "nothing", _OF_SLURM_TASKS[name][1]) for name in missing]
    if not problems:
        problems += be_rank_of_slurm_task(environment)
    if not problems and meets:
        problems += _inconsistent(environment, starts)
    if problems:
        raise SurroundingsError(problems)


def be_rank_of_slurm_task(environment: MutableMapping[str, str]) -> list[Problem]:
    """Under a bare `srun` of several tasks, be the rank that the task's number says.

    Other launchers set RANK themselves. Within an allocation but outside of a step (no SLURM_STEP_ID) a process is
    alone, although a batch script has a SLURM_PROCID, too.

    Returns:
        The problem that the tasks are on several machines and MASTER_ADDR does not say where the first of them is.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
    if "RANK" in environment or not _is_slurm_task(environment) or tasks == "1":
        return []
    rank, local_rank = environment["SLURM_PROCID"], environment["SLURM_LOCALID"]
    environment.update(RANK=rank, LOCAL_RANK=local_rank, WORLD_SIZE=tasks)
    nodes = environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES"))
    if "MASTER_ADDR" not in environment and nodes != "1":
        expected = "the host name of the first rank (launcher/slurm/many_nodes.sbatch sets it)"
        return [Problem("srun", "MASTER_ADDR", "nothing", expected)]
    environment.setdefault("MASTER_ADDR", "127.0.0.1")
    # Below the ports that a system hands out, and different for jobs that share a machine.
    environment.setdefault("MASTER_PORT", str(20000 + int(environment["SLURM_JOB_ID"]) % 10000))
    return []


def speaks_for_machine(environment: Mapping[str, str]) -> bool:
    """Whether this process says what every rank of its machine finds; without numbers every process does."""
    return environment.get("RANK", "0") == "0" or environment.get("LOCAL_RANK", "0") == "0"


def _is_slurm_task(environment: Mapping[str, str]) -> bool:
    return "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment


def _not_integers(environment: Mapping[str, str], variables: Mapping[str, tuple[range, str]]) -> Iterator[Problem]:
    for name, (allowed, meaning) in variables.items():
        text = environment.get(name)
        # Neither signs nor the digits of other scripts, which `int` takes; and no more digits than it takes.
        if text is not None and not (re.fullmatch("[0-9]{1,20}", text) and int(text) in allowed):
            upwards = f"an integer from {allowed[0]}" + f" to {allowed[-1]}" * (allowed is not _ANY)
            yield Problem("environment", name, _shown(text), f"{upwards}: {meaning}")


def _inconsistent(environment: Mapping[str, str], starts: bool) -> Iterator[Problem]:
    """What does not fit together, in an environment whose numbers are numbers."""
    rank, world_size = environment.get("RANK"), environment.get("WORLD_SIZE")
    if rank is None:
        if starts and world_size not in (None, "1"):
            yield Problem("environment", "RANK", f"nothing, with WORLD_SIZE {world_size}", _OF_RANKS["RANK"][1])
        for name in _MPI_SIZES:
            if world_size is None and environment.get(name, "1") != "1":
                yield Problem("environment", "RANK", f"nothing, with {name} {environment[name]}", _OTHER_LAUNCHERS)
                return
        return
    if world_size is None:
        yield Problem("environment", "WORLD_SIZE", f"nothing, with RANK {rank}", _OF_RANKS["WORLD_SIZE"][1])
        return
    for smaller, larger in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if smaller in environment and larger in environment and int(environment[smaller]) >= int(environment[larger]):
            found = f"{environment[smaller]}, with {larger} {environment[larger]}"
            yield Problem("environment", smaller, found, f"a number from 0 to {int(environment[larger]) - 1}")
    if world_size == "1":  # it meets nobody
        return
    address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    if address is None:
        expected = _MASTER if port is not None else f"{_MASTER}, and in MASTER_PORT {_PORT}"
        yield Problem("environment", "MASTER_ADDR", f"nothing, with WORLD_SIZE {world_size}", expected)
        return
    if not address or re.search(r"[\s/]", address) or address.count(":") == 1:  # an IPv6 address has more
        yield Problem("environment", "MASTER_ADDR", _shown(address), f"{_MASTER}, without a port")
    if port is None:
        yield Problem("environment", "MASTER_PORT", f"nothing, with WORLD_SIZE {world_size}", _PORT)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _launching_process(variable: str) -> str:
    """Name the process that has started this launch: the nearest one above that did not get a launcher's variable.

    Between it and the ranks there may be scripts, one for each rank.
    """
    try:
        parents = psutil.Process().parents()
        launcher = next(parent for parent in parents if variable not in parent.environ())
    except (psutil.Error, StopIteration):  # another user's
        return ""
    return f"process {launcher.pid}, tick {process_start(launcher.pid)} of boot {boot_of_machine()}"

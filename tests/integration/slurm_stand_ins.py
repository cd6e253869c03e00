"""Programs that stand for Slurm's on one machine: `srun` starts real local processes, `scontrol` answers and notes.

`srun` knows the options that our scripts use and no others, so that a misspelt one is an error here, too. Like the
real one it numbers tasks in the environment, splits their output by rank, hands USR1 and TERM on to all of a task's
processes, ends everybody once a task has failed if it is told to, and returns the highest exit code.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SECONDS_TO_END = 15


def parse(arguments: list[str]) -> argparse.Namespace:
    """Options up to the first word that is none, then the command."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("--nodes", "--ntasks", "--ntasks-per-node", "--kill-on-bad-exit"):
        parser.add_argument(name, type=int)
    for name in ("--output", "--open-mode", "--container-image", "--container-mounts", "--container-workdir"):
        parser.add_argument(name)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    return parser.parse_args(arguments)


def note(name: str, entry: object) -> None:
    """Append to what the test reads afterwards."""
    with (Path(os.environ["STAND_IN_NOTES"]) / name).open("a") as file:
        file.write(json.dumps(entry) + "\n")


def start_task(options: argparse.Namespace, task: int) -> subprocess.Popen:
    """One task with Slurm's variables."""
    environment = os.environ | {
        "SLURM_PROCID": str(task),
        "SLURM_LOCALID": str(task % options.ntasks_per_node),
        "SLURM_NODEID": str(task // options.ntasks_per_node),
        "SLURM_NTASKS": str(options.ntasks),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(options.ntasks),
        "SLURM_STEP_NUM_NODES": str(options.nodes),
    }
    output = None
    if options.output:
        job = os.environ["SLURM_JOB_ID"]
        path = options.output.replace("%j", job).replace("%t", str(task))
        output = open(path, "ab" if options.open_mode == "append" else "wb")
    return subprocess.Popen(
        options.command, env=environment, stdout=output, stderr=output and subprocess.STDOUT, start_new_session=True
    )


def signal_tasks(tasks: list[subprocess.Popen], number: int) -> None:
    """Send a signal to every process of every task."""
    for task in tasks:
        try:
            os.killpg(task.pid, number)
        except ProcessLookupError:
            pass


def srun(arguments: list[str]) -> int:
    """Run a job step to its end."""
    options = parse(arguments)
    assert options.ntasks == options.nodes * options.ntasks_per_node, "tasks do not fill the nodes"
    note("srun", {**vars(options), "master": f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"})
    tasks = [start_task(options, task) for task in range(options.ntasks)]
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signal_tasks(tasks, number))
    deadline = None
    while any(task.poll() is None for task in tasks):
        if deadline is None and options.kill_on_bad_exit and any(task.poll() for task in tasks):
            deadline = time.monotonic() + SECONDS_TO_END
            signal_tasks(tasks, signal.SIGTERM)
        if deadline is not None and time.monotonic() > deadline:
            signal_tasks(tasks, signal.SIGKILL)
        time.sleep(0.1)
    return max(128 - code if code < 0 else code for code in (task.returncode for task in tasks))


def scontrol(arguments: list[str]) -> int:
    """`show hostnames` prints this machine and others that cannot be reached; anything else is noted."""
    if arguments[:2] == ["show", "hostnames"]:
        assert arguments[2:] == [os.environ["SLURM_JOB_NODELIST"]]
        others = [f"unreachable-{node}.invalid" for node in range(1, int(os.environ["SLURM_JOB_NUM_NODES"]))]
        print("127.0.0.1", *others, sep="\n")
    else:
        note("scontrol", arguments)
    return 0


if __name__ == "__main__":
    program, *rest = sys.argv[1:]
    sys.exit({"srun": srun, "scontrol": scontrol}[program](rest))

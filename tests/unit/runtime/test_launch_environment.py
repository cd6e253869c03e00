"""What a launcher has set is checked at once, and says which launch this rank belongs to."""

import os
import subprocess
import sys

import pytest

from ebft_mega.errors import SurroundingsError
from ebft_mega.runtime.launch_environment import Launch, be_rank_of_slurm_task, enter_launch

SLURM = {"SLURM_JOB_ID": "1234567", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
STEP = SLURM | {"SLURM_STEP_ID": "0"}
MEETING = {"MASTER_ADDR": "first", "MASTER_PORT": "29500"}
RANK = {"RANK": "1", "WORLD_SIZE": "2", **MEETING}


@pytest.mark.parametrize(
    ("given", "added"),
    [
        # A task of a step, on machines of which MASTER_ADDR says the first.
        (
            STEP | {"MASTER_ADDR": "first", "MASTER_PORT": "77", "SLURM_NNODES": "2"},
            {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"},
        ),
        # All tasks on one machine: they meet there without further settings.
        (
            STEP | {"SLURM_NNODES": "1"},
            {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "24567"},
        ),
        # A step on one machine of a larger allocation.
        (
            STEP | {"SLURM_NNODES": "8", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "2"},
            {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "24567"},
        ),
        (SLURM, {}),  # a batch script or an interactive shell: no step
        ({name: value for name, value in STEP.items() if name != "SLURM_PROCID"}, {}),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1"}, {}),  # a step of one task, such as `srun --pty bash`
        (STEP | {"RANK": "0", "WORLD_SIZE": "8"}, {}),  # torchrun or deepspeed within a step
        ({}, {}),
    ],
)
def test_ranks_of_slurm_tasks(given, added):
    environment = dict(given)
    assert be_rank_of_slurm_task(environment) == [] and environment == given | added


@pytest.mark.parametrize(
    ("environment", "keys"),
    [
        (
            {"RANK": "-1", "WORLD_SIZE": "0", "LOCAL_RANK": "1.5", "MASTER_PORT": "65536"},
            "RANK WORLD_SIZE LOCAL_RANK MASTER_PORT",
        ),
        ({"RANK": "", "WORLD_SIZE": "+2"}, "RANK WORLD_SIZE"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "\u0663"}, "WORLD_SIZE"),  # a digit to `int`
        ({"SLURM_RESTART_COUNT": "many"}, "SLURM_RESTART_COUNT"),
        ({"TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT"),
        (
            STEP | {"SLURM_PROCID": "x", "SLURM_JOB_ID": "y", "SLURM_NTASKS": "z"},
            "SLURM_PROCID SLURM_JOB_ID SLURM_NTASKS",
        ),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "SLURM_LOCALID SLURM_JOB_ID"),
        (STEP | {"SLURM_NNODES": "2"}, "MASTER_ADDR"),
        (RANK | {"RANK": "2"}, "RANK"),
        (RANK | {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK"),
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "first"}, "MASTER_PORT"),
        *[(RANK | {"MASTER_ADDR": address}, "MASTER_ADDR") for address in ("", "first:29500", "http://first", "a b")],
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "RANK"),
        ({"PMI_SIZE": "8"}, "RANK"),
    ],
)
def test_refused_surroundings(environment, keys):
    with pytest.raises(SurroundingsError) as refused:
        enter_launch(dict(environment), starts=True, meets=True)
    assert [problem.key for problem in refused.value.problems] == keys.split()
    assert all(len(str(problem)) < 300 for problem in refused.value.problems)


@pytest.mark.parametrize(
    ("environment", "starts", "meets"),
    [
        ({}, True, True),
        (RANK, True, True),
        (RANK | {"MASTER_ADDR": "fe80::1%eth0"}, True, True),
        (RANK | {"MASTER_ADDR": "::1"}, True, True),
        ({"RANK": "0", "WORLD_SIZE": "1"}, True, True),  # it meets nobody
        ({"WORLD_SIZE": "2"}, False, True),  # a plan for two
        ({"RANK": "0", "WORLD_SIZE": "2"}, False, False),  # a plan for another number
        ({"OMPI_COMM_WORLD_SIZE": "1"}, True, True),
        (STEP | {"PMI_SIZE": "4", "SLURM_NNODES": "1"}, True, True),
    ],
)
def test_accepted_surroundings(environment, starts, meets):
    enter_launch(dict(environment), starts, meets)


DEEPSPEED = RANK | {"CROSS_SIZE": "1", "LOCAL_SIZE": "2"}
TORCHRUN = RANK | {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "3"}
ASK = "import os; from ebft_mega.runtime.launch_environment import Launch; print(Launch.of(os.environ).identity)"
SCRIPT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"


def identities_of_ranks(environment):
    """What two ranks of this process say, the second one started by a script."""
    own = {name: value for name, value in os.environ.items() if name not in DEEPSPEED | TORCHRUN}
    for arguments in ([ASK], [SCRIPT, ASK]):
        command = [sys.executable, "-c", *arguments]
        answer = subprocess.run(command, env=own | environment, capture_output=True, text=True, timeout=60, check=True)
        yield answer.stdout


@pytest.mark.parametrize("environment", [DEEPSPEED, TORCHRUN])
def test_ranks_on_one_machine_are_known_by_their_launcher(environment):
    first, second = identities_of_ranks(environment)
    assert first == second and "tick" in first


@pytest.mark.parametrize(
    ("environment", "identity", "attempt", "option"),
    [
        (RANK, "", "0", "the variable MASTER_PORT"),
        (DEEPSPEED | {"CROSS_SIZE": "2"}, "", "0", "`deepspeed --master_port`"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "1"}, "", "3", "`torchrun --master-port` or `--rdzv-endpoint`"),
        (
            TORCHRUN | {"LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "job"},
            "torchrun job",
            "3",
            "`torchrun --master-port` or `--rdzv-endpoint`",
        ),
        (
            STEP | RANK | {"RANK": "3", "SLURM_RESTART_COUNT": "2"},
            "Slurm step 1234567.0",
            "2",
            "the variable MASTER_PORT",
        ),
        (STEP | RANK, "", "0", "the variable MASTER_PORT"),  # a launcher within a step
    ],
)
def test_launches(environment, identity, attempt, option):
    assert Launch.of(environment) == Launch(option, identity, attempt)

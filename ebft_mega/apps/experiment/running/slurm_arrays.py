"""An experiment as Slurm arrays: a batch script for each stage, and one that submits them in order. No torch."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from ebft_mega.apps.experiment.running.plan_table import trials_to_come
from ebft_mega.apps.experiment.runs.declared_experiment import DeclaredExperiment
from ebft_mega.apps.experiment.runs.stages import Stage
from ebft_mega.io.durable import write_bytes
from ebft_mega.io.expanded_paths import REPOSITORY

SLURM_FOLDER = "slurm"
SUBMIT_NAME = "submit.sh"

_SCRIPT = """\
#!/usr/bin/env bash
# Stage {stage} of an experiment; an array task is a run. Written by tools/experiment.py.
#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --output={logs}
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
set -euo pipefail
cd {repository}
export PATH="$PWD/.venv/bin:$PATH"

# The ranks save and end with exit code 75 when they are told that the time limit comes near; launchers, which would die
# of the signal, are deaf to it (task.sh), and the tool is not told.
# shellcheck disable=SC2329 # the trap calls it
descendants() {{
  local child
  for child in $(pgrep -P "$1"); do
    echo "$child"
    descendants "$child"
  done
}}
launcher/slurm/task.sh {command} --task "$SLURM_ARRAY_TASK_ID" &
tool=$!
trap 'interrupted=1; kill -USR1 $(descendants "$tool") 2>/dev/null || true' USR1
while :; do
  interrupted=0 code=0
  wait "$tool" || code=$?
  if ((!interrupted)); then # a signal ends `wait`, not the tool
    break
  fi
done
if ((code == 75 || code == 138)); then # stopped on request, with a checkpoint or (138) with nothing to save
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
fi
exit "$code"
"""


def write_arrays(
    experiment: DeclaredExperiment, stages: Sequence[Stage], command: Sequence[str], sbatch_options: Sequence[str]
) -> Path:
    """Write the batch scripts of the stages.

    Args:
        command: runs this experiment; `--stage` and `--task` are added.
        sbatch_options: of every job, such as `--partition=debug`.
    Returns:
        The script that submits all of them, each after the one before has ended well.
    """
    folder = experiment.setup.output / SLURM_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["#!/usr/bin/env bash", "# Submit the stages, each to begin when the one before has ended well."]
    lines += ["set -euo pipefail", 'after=""']
    options = shlex.join(sbatch_options)
    for stage in stages:
        path = folder / f"{stage.name}.sbatch"
        count = len(trials_to_come(experiment, stage)) if stage.arms else 1
        text = _SCRIPT.format(
            stage=stage.name,
            name=shlex.quote(f"{experiment.setup.output.name}-{stage.name}"),
            last=count - 1,
            logs=shlex.quote(str(folder / f"{stage.name}-%A_%a.out")),
            repository=shlex.quote(str(REPOSITORY)),
            command=shlex.join([*command, "--stage", stage.name]),
        )
        write_bytes(path, text.encode())
        job = f"sbatch --parsable ${{after:+--dependency=afterok:$after --kill-on-invalid-dep=yes}} {options}".rstrip()
        lines += [f"id=$({job} {shlex.quote(str(path))})", "after=${id%%;*}", f'echo "stage {stage.name}: job $after"']
    submit = folder / SUBMIT_NAME
    write_bytes(submit, ("\n".join(lines) + "\n").encode())
    return submit

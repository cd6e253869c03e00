# Sourced by the batch scripts beside it, in the directory where the job was submitted: the environment of a job step,
# the step itself, and what becomes of the job afterwards. `repository` is the root of the repository.
#
# Settings, all optional, from the environment of `sbatch`:
#   CONTAINER_IMAGE   run every step in this image (srun's pyxis plugin); otherwise in .venv, if there is one
#   CONTAINER_MOUNTS  what the container sees; the repository and the directory of the submission unless given, so name
#                     data and models, too
#   OMP_NUM_THREADS   threads per rank; the job's processors per rank unless given
#   MASTER_PORT       where ranks meet; 20000 + job number modulo 10000 unless given
# shellcheck shell=bash

repository=${repository:-$PWD}
REQUEUE_ME=75 # the exit code of a run that was stopped on request after a complete checkpoint

# Print a number from a status.json, or nothing.  status_field FIELD FILE
status_field() {
  if [[ -f $2 ]]; then
    sed -n "s/^ *\"$1\": *\(-\{0,1\}[0-9][0-9]*\),\{0,1\}$/\1/p" "$2"
  fi
}

# Run a job step.  step SRUN_OPTION... COMMAND...
step() {
  local options=(--kill-on-bad-exit=1)
  if [[ -n ${CONTAINER_IMAGE:-} ]]; then
    options+=("--container-image=$CONTAINER_IMAGE" "--container-workdir=$PWD")
    local mounts="$repository:$repository"
    [[ $PWD == "$repository" ]] || mounts+=",$PWD:$PWD"
    options+=("--container-mounts=${CONTAINER_MOUNTS:-$mounts}")
  fi
  exec srun "${options[@]}" "$@"
}

# Set the environment that all ranks share.  prepare RANKS_PER_TASK
prepare() {
  if [[ -z ${CONTAINER_IMAGE:-} && -d $repository/.venv/bin ]]; then
    export PATH="$repository/.venv/bin:$PATH"
  fi
  local processors=${SLURM_CPUS_PER_TASK:-1}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((processors > $1 ? processors / $1 : 1))}
  export SRUN_CPUS_PER_TASK=$processors # srun does not take sbatch's --cpus-per-task over by itself
  # Below the ports that the system hands out, and different for jobs that share a machine.
  export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
}

# Check the configuration before any accelerator works, print the plan, and set `output_dir` and the umask, by which what
# is made here, and what ranks print, is for the same people as what the run makes. A bad configuration ends the job with
# the launcher's own code (2): nothing has started, and trying again would change nothing.
#   check WORLD_SIZE LAUNCHER_ARGUMENT...
check() {
  local world_size=$1 plan code=0 argument quote=\'
  shift
  for argument in "$@"; do
    if [[ $argument == --without-data || $argument == --gpu-memory* ]]; then
      echo "$argument goes with --dry-run, outside of a job: a job needs its model and its data" >&2
      exit 2
    fi
  done
  plan=$(step --nodes=1 --ntasks=1 --ntasks-per-node=1 \
    python "$repository/launcher/train.py" "$@" --dry-run --world-size "$world_size") || code=$?
  printf '%s\n' "$plan"
  if ((code != 0)); then
    exit "$code"
  fi
  output_dir=$(sed -n 's/^ *output_dir: *//p' <<<"$plan" | sed -n 1p)
  if [[ -z $output_dir ]]; then
    echo "the dry run named no output_dir" >&2
    exit 1
  fi
  # As it is written: in quotes where YAML would read something else, with $$ for a dollar sign.
  if [[ $output_dir == $quote*$quote ]]; then
    output_dir=${output_dir:1:-1}
    output_dir=${output_dir//$quote$quote/$quote}
  elif [[ $output_dir == \"* ]]; then
    echo "output_dir: found $output_dir; expected a path without control characters" >&2
    exit 2
  fi
  output_dir=${output_dir//\$\$/\$}
  [[ $output_dir == /* ]] || output_dir=$repository/$output_dir # a configuration's paths start there
  case $(sed -n 's/^permissions: *//p' <<<"$plan" | sed -n 1p) in
    private) umask 077 && export SLURM_UMASK=0077 ;; # the variable is srun's, for the files of --output
    group) umask 007 && export SLURM_UMASK=0007 ;;
  esac
  # All steps are done and everything is there: no ranks are needed, and nothing changes.
  if grep -q '^done at step [0-9]*, nothing to do$' <<<"$plan" &&
    [[ -f $output_dir/status.json && -f $output_dir/report.html ]]; then
    exit 0
  fi
}

# Run the training step, hand Slurm's signals on to it, and end the job as status.json says: launchers swallow and
# change exit codes. A run that was stopped on request (75) is requeued, unless that would go round in circles. During
# the start there is no status.json yet; 75 then comes from the ranks (srun and `deepspeed` return what all of them do).
#   supervise SRUN_OPTION... COMMAND...
supervise() {
  local status="$output_dir/status.json" during_start="$output_dir/logs/slurm-stopped-during-start" stopped_at=""
  if [[ $(status_field exit_code "$status") == "$REQUEUE_ME" ]]; then
    stopped_at="step $(status_field step "$status")"
  elif [[ -f $during_start ]]; then
    stopped_at="the start"
  fi
  # An earlier start's outcome must not be taken for this one's.
  rm -f "$status" "$during_start"
  mkdir -p "$output_dir/logs"

  local pid code cancelled=0 interrupted
  step "$@" &
  pid=$!
  # USR1 comes before the time limit (--signal); the ranks save and stop. TERM means that Slurm ends the job; INT and
  # HUP come from a person, where the script runs in a terminal.
  trap 'interrupted=1; kill -USR1 "$pid" 2>/dev/null || true' USR1
  trap 'interrupted=1; cancelled=1; kill -TERM "$pid" 2>/dev/null || true' TERM INT HUP
  while :; do
    interrupted=0 code=0
    wait "$pid" || code=$?
    if ((!interrupted)); then # a signal ends `wait`, not the step
      break
    fi
  done

  local verdict stopped_now
  verdict=$(status_field exit_code "$status")
  stopped_now="step $(status_field step "$status")"
  if [[ -n $verdict ]]; then
    echo "the step ended with code $code, $status says $verdict"
  elif ((code == REQUEUE_ME)); then
    verdict=$code stopped_now="the start"
    : >"$during_start"
    echo "the step was stopped during the start"
  else
    echo "the step ended with code $code and left no $status: it failed" >&2
    exit $((code == 0 ? 1 : code))
  fi
  if ((verdict == REQUEUE_ME && !cancelled)); then
    if [[ $stopped_now == "$stopped_at" ]]; then
      echo "stopped twice at $stopped_at: the time limit is too short for it, not requeued" >&2
    else
      scontrol requeue "$SLURM_JOB_ID"
    fi
  fi
  exit "$verdict"
}

# Train with `deepspeed` on the one node of this job.  train_on_one_node LAUNCHER_ARGUMENT...
train_on_one_node() {
  local ranks=${SLURM_GPUS_ON_NODE:?this job has no GPUs: ask for --gpus-per-node}
  prepare "$ranks"
  check "$ranks" "$@"
  supervise --nodes=1 --ntasks=1 --ntasks-per-node=1 "$repository/launcher/slurm/task.sh" \
    deepspeed --num_gpus "$ranks" --master_port "$MASTER_PORT" "$repository/launcher/train.py" "$@"
}

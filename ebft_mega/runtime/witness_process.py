"""A small process beside a rank that says how the rank died when the rank could not. Standard library alone.

Started by `witness.py` as `python -S -E witness_process.py DESCRIPTOR RANK_PID`.
"""

import json
import mmap
import os
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ebft_mega.runtime.memory_counters import changes, oom_kills

STATE_BYTE, PHASE_BYTES, SHARED_BYTES = 0, slice(1, 64), 8192
IDLE, WATCHED, LEFT = 0, 1, 2  # what the rank has said last
LOOK_SECONDS = 0.2
KILLED_FOR_MEMORY = 137  # as a shell says it of a process that KILL has ended


def testimony(facts: dict[str, Any], phase: str, evidence: str) -> str:
    """Say in one line what became of a rank that has said nothing itself.

    Args:
        facts: of the rank: its number, its process, and by phase what the plan needs, in words.
        phase: in which it was last.
        evidence: the counter that has grown; empty: none has, or none can be read.
    """
    needs = facts["needs"].get(phase, "")
    place = f"rank {facts['rank']} (process {facts['process']})"
    when = f"in phase {phase}" if phase else "outside of a phase of a step"
    if evidence:
        return f"{place} was killed for lack of memory {when}: {evidence}{needs and f'; {needs}'}"
    causes = "KILL from a person or a scheduler, or a crash; if it was for memory, the kernel's log says so"
    return f"{place} ended without a word {when}: {causes}{needs and f'; {needs}'}"


def record(facts: dict[str, Any], line: str, is_for_memory: bool) -> None:
    """Write the line to standard error and the rank's log, and the outcome unless there is one."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    try:
        os.write(2, f"{line}\n".encode())
    except OSError:  # nobody reads it
        pass
    try:
        with open(facts["log"], "a", encoding="utf-8") as log:
            log.write(f"{stamp} ERROR witness: {line}\n")
        if is_for_memory:
            with open(facts["status"], "x", encoding="utf-8") as status:
                status.write(json.dumps(outcome_in(Path(facts["status"]).parent), indent=2) + "\n")
    except OSError:  # an outcome is on record, or the directory has gone
        pass


def outcome_in(directory: Path) -> dict[str, Any]:
    """The outcome of a run that was killed for memory, with what its directory says of steps and checkpoints."""
    step, checkpoint = 0, None
    try:
        step = int(json.loads((directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["step"])
        checkpoint = (directory / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
    except (
        OSError,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        OverflowError,
        RecursionError,
    ):  # it had not come so far
        pass
    return {"state": "failed", "exit_code": KILLED_FOR_MEMORY, "checkpoint": checkpoint, "step": step}


def watch(shared: mmap.mmap, rank_pid: int) -> None:
    """Wait until the rank has ended, and testify unless it has said goodbye."""
    before = oom_kills()
    while os.getppid() == rank_pid:
        time.sleep(LOOK_SECONDS)
    if shared[STATE_BYTE] != WATCHED:
        return
    facts = json.loads(shared[PHASE_BYTES.stop :].rstrip(b"\0"))
    phase = shared[PHASE_BYTES].rstrip(b"\0").decode()
    evidence = changes(before, oom_kills())
    record(facts, testimony(facts, phase, evidence), bool(evidence))


def main() -> None:
    """Be a witness; it is started with the signals blocked that ask its rank to stop."""
    watch(mmap.mmap(int(sys.argv[1]), SHARED_BYTES), int(sys.argv[2]))


if __name__ == "__main__":
    main()

"""Retention: which old checkpoints are deleted after a new one was committed."""

from collections.abc import Collection
from pathlib import Path

from ebft_mega.checkpoint.commit import complete_folders, discard, newest, step_of


def expired(steps: Collection[int], keep_last: int | None, keep_every: int | None) -> list[int]:
    """Checkpoints to delete, oldest first.

    Args:
        steps: the checkpoints that there are.
        keep_last: how many of the newest are kept, at least 1; None keeps all.
        keep_every: those at multiples of this are kept for good; None: none are.
    """
    if keep_last is None:
        return []
    old = sorted(set(steps))[:-keep_last]
    return [step for step in old if keep_every is None or step % keep_every]


def delete_expired(root: Path, keep_last: int | None, keep_every: int | None) -> list[str]:
    """Delete what is no longer kept, after a new checkpoint was committed.

    Only checkpoints up to the one that `latest` names are looked at: one with more steps is of no use to this run (it
    was passed over when the run began), so it must not push out those that are.

    Returns:
        What could not be deleted and why, in words; nothing is raised for it.
    """
    try:
        folders = {step: path for path in complete_folders(root) if (step := step_of(path.name)) is not None}
        current = step_of(newest(root) or "")
    except OSError as error:
        return [f"old checkpoints in {root} could not be looked for: {error.strerror or error}"]
    steps = [step for step in folders if current is not None and step <= current]
    return [warning for step in expired(steps, keep_last, keep_every) for warning in discard(folders[step])]

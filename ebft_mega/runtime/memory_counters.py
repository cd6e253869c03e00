"""How often the system has killed for lack of memory, as its control groups count. Standard library alone."""

from pathlib import Path


def oom_kills(control_groups: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self")) -> dict[str, int]:
    """Read the counters of this process's control group and of all above it, by file.

    Version 2 counts in `memory.events`, version 1 in `memory.oom_control`. Files that are not there, as above a
    container's own group, are left out; where there are none, `/proc/vmstat` counts for the whole machine.
    """
    counts: dict[str, int] = {}
    for line in _lines(process / "cgroup"):
        _, controllers, own = line.split(":", 2)
        if controllers == "":
            root, name = control_groups, "memory.events"
        elif "memory" in controllers.split(","):
            root, name = control_groups / "memory", "memory.oom_control"
        else:
            continue
        group = Path(own.lstrip("/"))
        for folder in (group, *group.parents):
            _count(root / folder / name, counts)
    if not counts:
        _count(process.parent / "vmstat", counts)
    return counts


def changes(before: dict[str, int], after: dict[str, int]) -> str:
    """Say which counter has grown, the nearest one to the process first; empty if none has."""
    for file, count in after.items():
        if count > before.get(file, count):
            return f"oom_kill in {file} went from {before[file]} to {count}"
    return ""


def _count(file: Path, counts: dict[str, int]) -> None:
    for line in _lines(file):
        if line.startswith("oom_kill "):
            counts[str(file)] = int(line.split()[1])


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []

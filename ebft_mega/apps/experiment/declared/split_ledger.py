"""Which experiment has used which split for what: a file beside the experiments, so that a report split is used once.

A split is known by its fingerprint, whatever directory it lies in. No torch.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from filelock import FileLock

from ebft_mega.apps.experiment.spec import ExperimentSpec
from ebft_mega.errors import Problem
from ebft_mega.io.durable import write_bytes
from ebft_mega.io.records import Record, Sha256, parse_record

LEDGER_NAME = "split_uses.json"
Role = Literal["train", "tuning", "report"]
REUSE_OPTION = "--reuse-report-split"


class SplitUse(Record):
    """One use of a split."""

    fingerprint: Sha256
    role: Role
    experiment: str  # its directory
    spec: Sha256  # what it ran, see `identity`
    place: str  # directory of the dataset
    date: str  # ISO, UTC, of the first such use


class Ledger(Record):
    """All uses, the oldest first."""

    version: Literal[1] = 1
    uses: tuple[SplitUse, ...] = ()


def ledger_path(output: Path) -> Path:
    """The ledger that an experiment shares with those beside it.

    Args:
        output: directory of the experiment.
    """
    return output.parent / LEDGER_NAME


def read_ledger(path: Path) -> Ledger:
    """Read a ledger; an empty one where there is no file.

    Raises:
        BrokenCheckpointError: it is damaged.
        InputError: a newer version of this program has written it.
    """
    try:
        return parse_record(Ledger, path.read_bytes(), str(path))
    except (FileNotFoundError, NotADirectoryError):
        return Ledger()


def identity(spec: ExperimentSpec, overrides: Sequence[str]) -> str:
    """sha256 of what decides an experiment's figures: all but its words, its place, and what is only shown beside.

    Args:
        overrides: `key=value` texts for every run.
    """
    shown = {"question", "output_dir", "prepare", "secondary", "fronts", "limits"}
    content = spec.model_dump(mode="json", exclude=shown)
    for arm in content["arms"].values():
        del arm["about"], arm["directory"]
    text = json.dumps([content, sorted(overrides)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def use_now(fingerprint: str, role: Role, experiment: str, spec: str, place: str) -> SplitUse:
    """A use that begins now."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return SplitUse(fingerprint=fingerprint, role=role, experiment=experiment, spec=spec, place=place, date=date)


def record_uses(path: Path, uses: Iterable[SplitUse]) -> None:
    """Add uses to a ledger, each once; several experiments may do so at the same time.

    Raises:
        InputProblems: the ledger that is there cannot be read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        known = read_ledger(path)
        there = {_without_date(use) for use in known.uses}
        new = [use for use in uses if _without_date(use) not in there]
        if new:
            content = Ledger(uses=(*known.uses, *new)).model_dump_json(indent=1) + "\n"
            write_bytes(path, content.encode())


def _without_date(use: SplitUse) -> tuple[str, ...]:
    return (use.fingerprint, use.role, use.experiment, use.spec)


def earlier_reports(ledger: Ledger, report: str, spec: str) -> list[SplitUse]:
    """Experiments that ran something else and have reported on this split.

    Args:
        report: fingerprint of the report split; spec: identity of the experiment that asks.
    """
    return [use for use in ledger.uses if (use.fingerprint, use.role) == (report, "report") and use.spec != spec]


def refused_uses(ledger: Ledger, report: str, spec: str, may_reuse: bool) -> list[Problem]:
    """Why an experiment may not report on a split.

    Running the same again is no second look: its figures are those of before. So are later choices of others no fault
    of figures that were reported on before them.

    Args:
        report: fingerprint of the report split; spec: identity of the experiment that asks.
        may_reuse: a split that was reported on before may be used knowingly.
    Returns:
        Problems whose `where` is empty.
    """
    own = [use.date for use in ledger.uses if (use.fingerprint, use.role, use.spec) == (report, "report", spec)]
    problems = []
    for use in ledger.uses:
        if use.fingerprint != report or use.role == "report" or (own and min(own) <= use.date):
            continue
        purpose = "trained on" if use.role == "train" else "chosen on"
        found = f"a split that {use.experiment} has {purpose}, on {use.date} ({use.place})"
        problems.append(Problem("", "splits.report", found, "a split that nothing was trained or chosen on"))
    if not may_reuse:
        for use in earlier_reports(ledger, report, spec):
            found = f"a split that was reported on before, with other settings, in {use.experiment} on {use.date}"
            expected = f"a split that is used once, or {REUSE_OPTION}, which the report then says"
            problems.append(Problem("", "splits.report", found, expected))
    return problems


def reuse_notes(ledger: Ledger, report: str, spec: str) -> Mapping[str, str]:
    """What a report says of earlier looks at its split, by name; empty without any."""
    uses = earlier_reports(ledger, report, spec)
    if not uses:
        return {}
    places = ", ".join(dict.fromkeys(f"{use.experiment} on {use.date[:10]}" for use in uses))
    return {
        "report split": f"It was reported on before, with other settings: {places}. Its intervals are no first look."
    }

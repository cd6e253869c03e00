"""What a run's page says of the run beside its curves: head, warnings and notes, checkpoints. No torch."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from ebft_mega.apps.report.page import Table
from ebft_mega.apps.report.run_records import Curve, read_good_lines, read_json
from ebft_mega.checkpoint.commit import CHECKPOINTS, complete_folders, pointed_at, step_of
from ebft_mega.checkpoint.manifest import MANIFEST_NAME, read_manifest
from ebft_mega.errors import InputProblems
from ebft_mega.runtime.run_files import DATA_ERRORS_NAME, ENVIRONMENT_NAME, NOTES_NAME

RUN_FACTS = ("model", "layout", "data", "tokens")
MAX_NOTES = 60  # of each kind; the files have all of them


def run_facts(output_dir: Path, by_key: Mapping[str, Curve]) -> list[tuple[str, str]]:
    """The head of the page: model, data and tokens as the start has recorded them, tokens read, and date.

    Raises:
        InputError: `environment.json` is damaged.
    """
    path = output_dir / ENVIRONMENT_NAME
    environment = read_json(path) if path.exists() else {}
    run = environment.get("run")
    facts = [(name, str(run[name])) for name in RUN_FACTS if name in run] if isinstance(run, dict) else []
    if "data/tokens" in by_key:
        facts.append(("tokens read", f"{by_key['data/tokens'][1][-1]:,.0f}"))
    if "started" in environment:
        facts.append(("date of the last start", str(environment["started"])))
    return facts


def warnings_table(output_dir: Path, by_key: Mapping[str, Curve]) -> Table:
    """What a person should know of the run: notes of its starts, warnings, skipped steps, rows left out."""
    rows = []
    skipped = _growing(by_key.get("train/skipped_steps", ([], [])))
    if skipped:
        steps = ", ".join(map(str, skipped[:MAX_NOTES])) + ", …" * (len(skipped) > MAX_NOTES)
        rows.append(["", f"{len(skipped)} steps were skipped, because something was not finite: {steps}"])
    errors, _ = read_good_lines(output_dir / DATA_ERRORS_NAME)
    if errors:
        steps = ", ".join(dict.fromkeys(str(error["step"]) for error in errors[:MAX_NOTES]))
        rows.append(["", f"{len(errors)} damaged rows were left out, first in steps {steps}: {DATA_ERRORS_NAME}"])
    notes, _ = read_good_lines(output_dir / NOTES_NAME)
    if len(notes) > MAX_NOTES:
        rows.append(["", f"{len(notes) - MAX_NOTES} earlier notes are in {NOTES_NAME}"])
    rows += [[str(note.get("time", "")), str(note.get("text", ""))] for note in notes[-MAX_NOTES:]]
    return Table(["time", "what"], rows, num_text_columns=2)


def _growing(curve: Curve) -> list[int]:
    """Steps at which a count is greater than before."""
    before, found = 0.0, []
    for step, value in zip(*curve, strict=True):
        if value > before:
            found.append(step)
        before = value
    return found


def checkpoints_table(output_dir: Path) -> Table:
    """The checkpoints that are there, the newest first: step, size, and when it was completed.

    Raises:
        OSError: the folder cannot be listed.
    """
    root = output_dir / CHECKPOINTS
    newest = pointed_at(root)
    rows = []
    for folder in complete_folders(root):
        try:
            size = f"{sum(file.bytes for file in read_manifest(folder).files.values()) / 1e9:.3f} GB"
            written = datetime.fromtimestamp((folder / MANIFEST_NAME).stat().st_mtime, UTC)
            time = f"{written:%Y-%m-%d %H:%M:%S} UTC"
        except (InputProblems, OSError):
            size, time = "not readable", ""
        rows.append([folder.name, "newest" if folder.name == newest else "", time, f"{step_of(folder.name)}", size])
    return Table(["checkpoint", "", "completed", "step", "size"], rows, num_text_columns=3)

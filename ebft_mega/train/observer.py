"""What the one writing rank puts where a person reads it: metrics, notes, and rollouts beside their targets."""

import contextlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from ebft_mega.data.store.dataset import Dataset
from ebft_mega.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from ebft_mega.evaluation.held_out import Evaluation
from ebft_mega.metrics.announcer import SILENT, Announcer
from ebft_mega.metrics.sinks import MetricsWriter, cut_after
from ebft_mega.runtime.run_files import DATA_ERRORS_NAME, NOTES_NAME, SAMPLES_NAME
from ebft_mega.train.progress import Progress


@dataclass(frozen=True)
class Observer:
    """Where the one writing rank puts what a person reads; None on other ranks."""

    writer: MetricsWriter
    samples_path: Path
    tokenizer: Tokenizer

    def show_blocks(self, step: int, evaluation: Evaluation) -> None:
        """Append a few rollouts beside their targets, as text."""
        self.writer.show(self.samples_path.name, partial(self._append_blocks, step, evaluation))

    def _append_blocks(self, step: int, evaluation: Evaluation) -> None:
        decode = self.tokenizer.decode
        records = [
            {
                "step": step,
                "row": block.row,
                "block": block.block,
                "context": decode(block.context),
                "target": decode(block.target),
                "rollouts": [decode(rollout) for rollout in block.rollouts],
                "alignment": block.alignment,
            }
            for block in evaluation.shown
        ]
        with self.samples_path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))


def open_observer(
    output: Path,
    dataset: Dataset,
    total_steps: int,
    progress: Progress,
    resumes_here: bool,
    notes: Sequence[str],
    total_rows: int | None = None,
) -> Observer:
    """Open the files of a run directory that a person reads.

    What an earlier start of this run wrote after its checkpoint is cut off; what another run wrote is cut off whole.

    Args:
        dataset: a source of the training data; all have the same tokenizer.
        progress: where this start of the run begins.
        resumes_here: whether its checkpoint lies in this directory.
        notes: shown first.
        total_rows: rows that the whole run reads, for the console; None: it is not known.
    Communication: none.
    """
    logged_step, done_step = (progress.logged_step, progress.step) if resumes_here else (-1, -1)
    samples = output / SAMPLES_NAME
    resumed_step = logged_step if logged_step >= 0 else None
    writer = MetricsWriter(output, total_steps, console=True, resumed_step=resumed_step, total_rows=total_rows)
    writer.show(samples.name, partial(cut_after, samples, logged_step))
    writer.show(DATA_ERRORS_NAME, partial(cut_after, output / DATA_ERRORS_NAME, done_step))
    if not resumes_here:
        writer.show(NOTES_NAME, partial((output / NOTES_NAME).unlink, missing_ok=True))
    story = NotesSink(output / NOTES_NAME, progress.step)
    writer.add(story)
    for note in notes:
        writer.note(f"note: {note}")
        story.write(note)
    if not resumes_here:
        for evaluation in progress.evaluations:
            writer.log(evaluation.step, evaluation.metrics)
    # The copy of the tokenizer may name no end of a document, where another one was chosen.
    tokenizer = load_tokenizer(dataset.tokenizer_directory, str(dataset.manifest.eos_id))
    return Observer(writer, samples, tokenizer)


class NotesSink(logging.Handler):
    """Append notes and this rank's warnings to a file for the run's page, with the step and the time of each.

    A file that cannot be written is done without: what is said there stands in the logs as well.
    """

    name = NOTES_NAME

    def __init__(self, path: Path, step: int):
        """Take warnings from now on, until it is closed."""
        super().__init__(logging.WARNING)
        self._path, self._step = path, step
        logging.getLogger("ebft_mega").addHandler(self)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in which step the run is at."""
        self._step = step

    def write(self, text: str) -> None:
        """Append a note."""
        record = {"step": self._step, "time": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC", "text": text}
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def emit(self, record: logging.LogRecord) -> None:
        """Append a warning."""
        self.write(f"{record.levelname.lower()}: {record.getMessage()}")

    def close(self) -> None:
        """Take no more."""
        logging.getLogger("ebft_mega").removeHandler(self)
        super().close()


def announcer_of(observer: Observer | None) -> Announcer:
    """What says how far long work has come, beside the steps' metrics; silent on the ranks that do not write."""
    return SILENT if observer is None else Announcer(observer.writer.note)

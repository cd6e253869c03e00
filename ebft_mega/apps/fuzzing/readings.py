"""What the program does with each kind of file, as far as a start, a build or a report goes before it computes."""

from pathlib import Path

from ebft_mega.apps.experiment.declared.spec_file import read_spec
from ebft_mega.apps.experiment.declared.spec_rules import spec_problems
from ebft_mega.apps.experiment.declared.split_ledger import read_ledger, refused_uses, reuse_notes
from ebft_mega.apps.experiment.runs.stamps import differences as differences_of_inputs
from ebft_mega.apps.experiment.runs.stamps import read_stamp
from ebft_mega.apps.report.evaluations import differences, read_evaluations
from ebft_mega.apps.report.run_records import curves, read_good_lines
from ebft_mega.checkpoint.run_state import RunState
from ebft_mega.checkpoint.saved_run import read_run
from ebft_mega.checkpoint.tensor_index import TensorIndex, coverage_problems
from ebft_mega.config.load import load_config
from ebft_mega.data.store.inspection import read_metadata
from ebft_mega.data.store.opening import open_dataset
from ebft_mega.data.text.archives import read_text_archive
from ebft_mega.data.text.text_files import ReadOptions, first_record_keys, read_jsonl
from ebft_mega.data.tokenizers.tokenizer import load_tokenizer
from ebft_mega.data.tokenizers.tokenizer_difference import tokenizer_difference
from ebft_mega.errors import BrokenCheckpointError, DamagedDataError, InputProblems
from ebft_mega.lifecycle.findings import look, status_says_done
from ebft_mega.lifecycle.run_record import RunRecord
from ebft_mega.metrics.sinks import cut_after
from ebft_mega.planning.model_files import check_model
from ebft_mega.runtime.run_files import failure_on_record, stop_on_record
from ebft_mega.runtime.run_lock import Holder
from ebft_mega.runtime.witness_process import outcome_in

OPTIONS = ReadOptions(licence_key="licence", keep_keys=("stars",))
TEXT = "def add(first, second):\n    return first + second  # <|endoftext|> </s> <mark>\n"


def configuration(directory: Path) -> None:
    """Load a configuration."""
    load_config(directory / "run.yaml")


def model(directory: Path) -> None:
    """Check a model directory."""
    checked = check_model(directory)
    checked.architecture.exported_config("float32")


def dataset(directory: Path) -> None:
    """Open a dataset and read every document with its metadata."""
    opened = open_dataset(directory)
    damages = []
    try:
        for number in range(opened.manifest.documents):
            for read in (opened.tokens, lambda number: read_metadata(opened, number)):
                try:
                    read(number)
                except DamagedDataError as error:
                    damages.append(error)
    finally:
        opened.close()
    if damages:
        raise damages[0]


def archive(directory: Path) -> None:
    """Read the texts of an archive."""
    _refuse_bad(read_text_archive(directory / "texts.tar", "texts.tar", OPTIONS))


def lines(directory: Path) -> None:
    """Read JSON lines, whole and by their first line."""
    (file,) = directory.iterdir()
    first_record_keys(file)
    _refuse_bad(read_jsonl(file, file.name, OPTIONS))


def _refuse_bad(documents: object) -> None:
    problems = [found.problem for found in documents if hasattr(found, "problem")]  # type: ignore[attr-defined]
    if problems:
        raise InputProblems(problems)


def tokenizer(directory: Path) -> None:
    """Load a tokenizer and encode a text with it."""
    tokenizer_difference(directory, directory)
    loaded = load_tokenizer(directory)
    loaded.decode(loaded.encode(TEXT))


def state(directory: Path) -> None:
    """Read a checkpoint's state."""
    RunState.from_json((directory / "state.json").read_bytes()).to_json()


def checkpoint(directory: Path) -> None:
    """Read the small files of a checkpoint."""
    saved = read_run(directory)
    RunRecord.of_checkpoint(saved)
    problems = coverage_problems(TensorIndex.from_json((directory / "tensors.json").read_bytes()))
    if problems:
        raise BrokenCheckpointError(problems)


def run_directory(directory: Path) -> None:
    """Look at a run directory as a start, a watcher and a report do."""
    status_says_done(directory)
    failure_on_record(directory)
    stop_on_record(directory)
    outcome_in(directory)
    cut_after(directory / "metrics.jsonl", 10**6)
    curves(read_good_lines(directory / "metrics.jsonl")[0])
    holder = Holder.from_json((directory / "run.lock").read_text(encoding="utf-8", errors="replace"))
    if holder is not None:
        own = Holder.of_this_process()
        str(holder), holder.lives_beside(own), holder.was_requeued_as(own)
    str(look(directory).words)


def experiment(directory: Path) -> None:
    """Read an experiment's file, and say everything that is wrong with it."""
    read_spec(directory / "experiment.yaml", spec_problems)


def stamp(directory: Path) -> None:
    """Read what a run was made from, and compare it."""
    found = read_stamp(directory / "run")
    assert found is not None, "there is one"
    list(differences_of_inputs("run", found.inputs, {"settings": {"train.lr": 1.0}, "code": "a", "start": None}))
    str((found.cpu_seconds, found.wall_seconds))


def ledger(directory: Path) -> None:
    """Read what splits were used for."""
    found = read_ledger(directory / "split_uses.json")
    refused_uses(found, "a" * 64, "b" * 64, may_reuse=False)
    reuse_notes(found, "a" * 64, "b" * 64)


def evaluations(directory: Path) -> None:
    """Compare two evaluations."""
    found = read_evaluations({"a": directory / "other.json", "b": directory / "evaluation.json"})
    differences(found, "a", "b", num_resamples=10, seed=0)

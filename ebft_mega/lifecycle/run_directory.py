"""The directory of a run: made, and refused if it cannot be written; cleared of what killed starts have left."""

import shutil
import tempfile
from pathlib import Path

from ebft_mega.config.schema import RunConfig
from ebft_mega.errors import ConfigError, InputError, Problem
from ebft_mega.io.output_directory import discard_hidden_siblings, refuse_other_contents
from ebft_mega.lifecycle.findings import strange_entries
from ebft_mega.model.weights.model_directory import CONFIG_NAME
from ebft_mega.runtime.run_files import MODEL_FOLDER, REPORT_NAME

# What a start writes beside metrics, samples and checkpoints, which are cut or set aside where a run begins anew.
UNFINISHED = ("tensorboard", "profile", "non_finite", "plots", REPORT_NAME)


def make_run_directory(config: RunConfig) -> None:
    """Make `output_dir`, before anything expensive.

    Raises:
        ConfigError: it cannot be made or written to, or something stands where the final model or a file will be.
    """
    output = config.output_dir
    make_writable_directory(output, config.place("output_dir"), "output_dir")
    if strange := list(strange_entries(output)):
        raise ConfigError([problem.within(config.place("output_dir")) for problem in strange])
    try:
        refuse_other_contents(output / MODEL_FOLDER, CONFIG_NAME, overwrite=True)
    except InputError as error:
        problems = [problem.within(config.place("output_dir")) for problem in error.problems]
        raise ConfigError(problems) from None


def make_writable_directory(directory: Path, where: str, key: str) -> None:
    """Make a directory if there is none, and try to write into it.

    Args:
        where, key: what names it, for the message.

    Raises:
        ConfigError: it cannot be made or written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        found = f"{directory}, which cannot be written ({error.strerror})"
        raise ConfigError([Problem(where, key, found, "a writable directory, or one to be made")]) from None


def clear_unfinished(output: Path, is_all: bool) -> None:
    """Delete what killed starts have left beside checkpoints, once nothing can refuse the start any more.

    Args:
        is_all: the run begins anew here; else the profiles and pages of its earlier starts stay.
    """
    discard_hidden_siblings(output / MODEL_FOLDER)
    for name in UNFINISHED if is_all else ():
        path = output / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

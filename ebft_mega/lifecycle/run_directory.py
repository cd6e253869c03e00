"""The directory of a run: made, and refused if it cannot be written, before anything expensive happens."""

import tempfile

from ebft_mega.config.schema import RunConfig
from ebft_mega.errors import ConfigError, InputError, Problem
from ebft_mega.io.output_directory import refuse_other_contents
from ebft_mega.model.weights.model_directory import CONFIG_NAME

MODEL_FOLDER = "hf"  # of a run directory: the final model


def make_run_directory(config: RunConfig) -> None:
    """Make `output_dir`, before anything expensive.

    Raises:
        ConfigError: it cannot be made or written to, or something stands where the final model will be.
    """
    output = config.output_dir
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        found = f"{output}, which cannot be written ({error.strerror})"
        expected = "a writable directory, or one to be made"
        problem = Problem(config.place("output_dir"), "output_dir", found, expected)
        raise ConfigError([problem]) from None
    try:
        refuse_other_contents(output / MODEL_FOLDER, CONFIG_NAME, overwrite=True)
    except InputError as error:
        problems = [problem.within(config.place("output_dir")) for problem in error.problems]
        raise ConfigError(problems) from None

"""Read an axolotl file and write a configuration that this trainer's loader accepts."""

import tempfile
from dataclasses import replace
from pathlib import Path

from ebft_mega.config.axolotl.axolotl_translation import Translation, translate, translated_text
from ebft_mega.config.load import load_config
from ebft_mega.config.yaml_source import MAX_TEXT_BYTES, read_yaml
from ebft_mega.errors import ConfigError, Problem
from ebft_mega.io.durable import write_bytes
from ebft_mega.io.input_errors import read_input_bytes


def import_axolotl(source: Path, output: Path, gpus: int, data_tokens: int | None = None) -> Translation:
    """Translate a file; nothing is written unless the loader accepts what comes out.

    Args:
        source: axolotl's file.
        output: the configuration to write.
        gpus, data_tokens: see `translate`.

    Raises:
        InputError, ConfigError: everything that is wrong with the file, at once.
    """
    try:
        text = read_input_bytes(source, "an axolotl file", MAX_TEXT_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError([Problem(str(source), "(file)", f"{error.reason} at byte {error.start}", "UTF-8")]) from None
    read = read_yaml(text, str(source))
    if read.problems:
        raise ConfigError(read.problems)
    if not isinstance(read.value, dict):
        raise ConfigError([Problem(f"{source}:1", "(file)", "no mapping", "axolotl's keys and their values")])
    translation = translate(read.value, gpus, data_tokens)
    if translation.problems:
        raise ConfigError([_placed(problem, source, read.lines) for problem in translation.problems])
    content = translated_text(translation, source.name)
    with tempfile.TemporaryDirectory() as directory:
        attempt = Path(directory) / "configuration.yaml"
        attempt.write_text(content, encoding="utf-8")
        try:
            load_config(attempt)
        except ConfigError as error:
            # Values that axolotl's file has are checked here; its lines are those of the last part of the key.
            found = [replace(problem, where=problem.key.rpartition(".")[2]) for problem in error.problems]
            raise ConfigError([_placed(problem, source, read.lines) for problem in found]) from None
    output.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(output, content.encode("utf-8"))
    return translation


def _placed(problem: Problem, source: Path, lines: dict[str, int]) -> Problem:
    """The problem at the line of the foreign key that `where` names."""
    name = problem.where
    line = lines.get(name) or next((number for key, number in lines.items() if key.rpartition(".")[2] == name), None)
    return replace(problem, where=f"{source}:{line}" if line else str(source))

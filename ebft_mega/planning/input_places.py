"""Local files and folders that a run reads, by the key that names them. No torch."""

import os
import shlex
from pathlib import Path

from ebft_mega.config.schema import RunConfig
from ebft_mega.errors import Problem

_KEYS = ("model.init_from", "ebft.feature_model", "data.tokenizer", "evaluation.shards", "checkpoint.resume")


def input_places(config: RunConfig) -> dict[str, Path]:
    """Local files and folders that a run reads, by key."""
    places: dict[str, Path] = {}
    for key in _KEYS:
        section, leaf = key.split(".")
        value = getattr(getattr(config, section), leaf)
        if value is not None and not (key == "checkpoint.resume" and value in ("auto", "never")):
            places[key] = Path(value)
    for name, source in config.data.named_sources.items():
        places[config.data.source_key(name)] = Path(source.shards)
    return places


def output_notes(config: RunConfig) -> list[str]:
    """Say so where `permissions` is `group` and the group cannot use the `output_dir` that is there."""
    output = config.output_dir
    if config.permissions != "group" or not output.is_dir() or output.stat().st_mode & 0o070 == 0o070:
        return []
    command = f"chmod -R g+rwX {shlex.quote(str(output))}"
    return [f"permissions is group, and the group cannot use {output} as it is there: {command}"]


def output_problems(config: RunConfig) -> list[Problem]:
    """An `output_dir` that is the model's or a dataset's own folder: a run would write between its files.

    A run that is named as what to resume from may be the run itself.
    """
    key, output = "output_dir", os.path.realpath(config.output_dir)
    same = [
        name
        for name, place in input_places(config).items()
        if name != "checkpoint.resume" and os.path.realpath(place) == output
    ]
    if not same:
        return []
    found = f"{config.output_dir}, which is {' and '.join(same)} too"
    return [Problem(config.place(key), key, found, "a directory of the run's own")]

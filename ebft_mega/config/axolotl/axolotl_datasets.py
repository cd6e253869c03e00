"""Models and datasets that an axolotl file names: what they are called here, and the command that builds shards."""

import re
import shlex
from collections.abc import Mapping
from typing import Any


def is_local(name: str) -> bool:
    """Whether a name is a path and not one of the hub."""
    return name.startswith(("/", "./", "../", "~"))


def literal_path(path: str) -> str:
    """A path whose dollar signs are none of a variable."""
    return path.replace("$", "$$")


def dataset_name(item: Mapping[str, Any]) -> str:
    """A folder's name, which is a source's name, too."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", item["path"].rstrip("/").rpartition("/")[2]).strip("-") or "data"
    return name if name[0].isalpha() else f"data-{name}"


def origin_of(item: Mapping[str, Any]) -> str:
    """Which part of which dataset, in words."""
    parts = [f"{part} {item[part]}" for part in ("name", "data_files", "revision") if item.get(part)]
    if item.get("split"):
        parts.append(str(item["split"]))
    return ", ".join([item["path"], *parts])


def download_words(item: Mapping[str, Any]) -> str:
    """What comes before building: nothing where the text is here."""
    return "" if is_local(item["path"]) else f"download {origin_of(item)}, then "


def build_command(item: Mapping[str, Any], model: str, options: str, name: str) -> str:
    """The command that makes `data/NAME` of a dataset.

    Args:
        item: the dataset as axolotl's file describes it.
        model: directory of the tokenizer.
        options: further ones, each after a space.
        name: of the folder.
    """
    text_key = item.get("text_column") or item.get("field")
    options = (f" --text-key {shlex.quote(str(text_key))}" if text_key else "") + options
    source = shlex.quote(item["path"]) if is_local(item["path"]) else "DOWNLOAD"
    tokenizer = shlex.quote(model)
    return f"python tools/build_shards.py --input {source} --tokenizer {tokenizer}{options} --output data/{name}"

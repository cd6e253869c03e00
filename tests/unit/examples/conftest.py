"""The entry of an example, loaded as a plugin is."""

import importlib.util
from pathlib import Path

import pytest

from ebft_mega.extension.entry import Entry

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


@pytest.fixture
def entry_of_example():
    """`entry_of_example(FILE_STEM)`: the one class with a name in a file of examples/."""

    def load(stem):
        specification = importlib.util.spec_from_file_location(f"example_{stem}", EXAMPLES / f"{stem}.py")
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        (entry,) = [
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, Entry) and value.__module__ == module.__name__
        ]
        return entry

    return load

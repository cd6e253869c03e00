"""What all entries of the registries have in common."""

import inspect
import threading
from pathlib import Path
from typing import Any, ClassVar

from ebft_mega.extension.options import NoOptions, Section

# Two threads that parse source at once may end in SystemError in Python 3.11, and `inspect` parses it to find a class.
_ONE_PARSES = threading.Lock()


class Entry:
    """Base of the contracts. An entry is a class with a `name`, derived from one of them.

    Its first docstring paragraph is what `--help` and docs/configuration.md say of it. A module that defines an entry
    imports torch inside its methods, so that a dry run stays fast.
    """

    name: ClassVar[str] = ""  # what a configuration calls it; lower-case letters, digits and _
    # `options.NAME` of a configuration is checked by it and given to the entry; keys are declared with `options.key`.
    Options: ClassVar[type[Section]] = NoOptions

    options: Any  # an `Options`

    def __init__(self, options: Section | None = None) -> None:
        """Args: options: an `Options`; None: all at their defaults."""
        self.options = self.Options() if options is None else options

    @classmethod
    def is_built_in(cls) -> bool:
        """Whether it is one of the package's own: those keep their contract by the package's tests."""
        return cls.__module__.split(".")[0] == __name__.split(".")[0]

    @classmethod
    def summary(cls) -> str:
        """The first paragraph of its docstring on one line."""
        text = inspect.cleandoc(cls.__doc__ or "")
        return " ".join(text.split("\n\n")[0].split())


def place_of_entry(entry: type[Entry]) -> str:
    """File and line of an entry's class, `file:line`; from any thread."""
    file = inspect.getsourcefile(entry)
    with _ONE_PARSES:
        _, line = inspect.getsourcelines(entry)
    return f"{Path(file or '')}:{line}"

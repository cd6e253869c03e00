"""A registry: the names of one kind's entries, and the entry of a name, imported when it is asked for."""

import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Generic, TypeVar

from ebft_mega.extension.entry import Entry

E = TypeVar("E", bound=Entry)


@dataclass(frozen=True, eq=False)
class Registry(Generic[E]):
    """One kind of entries: those of the package, one a file of a folder, and those of the plugins in use.

    Names are known without importing anything: an entry of the package is called as its file.
    """

    kind: str  # in words
    contract: type[E]
    folder: str  # package whose files are the package's own entries
    added: dict[str, type[E]] = field(default_factory=dict)  # by the plugins in use (`plugins.use_plugins`)

    def names(self) -> tuple[str, ...]:
        """Names of all entries: the package's own in alphabetical order, then those of plugins."""
        return (*self.own_names(), *self.added)

    def own_names(self) -> tuple[str, ...]:
        """Names of the package's own entries, without importing them."""
        return _names_in(self.folder)

    def entry(self, name: str) -> type[E]:
        """Import the entry of a name.

        Raises:
            KeyError: there is none.
        """
        if name in self.added:
            return self.added[name]
        if name not in self.own_names():
            raise KeyError(name)
        module = importlib.import_module(f"{self.folder}.{name}")
        return {entry.name: entry for entry in entries_of(module, self.contract)}[name]

    def summaries(self) -> Mapping[str, str]:
        """What each entry is, in its own words, by its name."""
        return {name: self.entry(name).summary() for name in self.names()}


@cache
def _names_in(folder: str) -> tuple[str, ...]:
    specification = importlib.util.find_spec(folder)
    assert specification is not None, f"{folder} is a folder of this package"
    return tuple(sorted(module.name for module in pkgutil.iter_modules(specification.submodule_search_locations)))


def entries_of(module: ModuleType, contract: type[E]) -> Iterator[type[E]]:
    """The entries that a module defines: its own classes with a name, derived from a contract."""
    for value in vars(module).values():
        if (
            isinstance(value, type)
            and issubclass(value, contract)
            and value.__module__ == module.__name__
            and value.name
        ):
            yield value

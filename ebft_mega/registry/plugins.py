"""Import the plugins that a configuration names, and put their entries into the registries. No torch by itself.

This runs code. It is imported because the configuration names it, never because a checkpoint, a model or a data set
does, and only from where nobody else may have put it (`plugin_sources.py`).
"""

import hashlib
import importlib
import importlib.abc
import importlib.util
import sys
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, TypeVar

from ebft_mega.errors import ConfigError, InputError, Problem
from ebft_mega.extension.entry import Entry, place_of_entry
from ebft_mega.io.input_errors import read_input_bytes
from ebft_mega.io.parse_boundary import is_of_parser
from ebft_mega.registry.entry_checks import wrong_entries
from ebft_mega.registry.kinds import ALL_REGISTRIES
from ebft_mega.registry.plugin_sources import KEY, PluginSource, find_source, refused
from ebft_mega.registry.registry import Registry, entries_of

E = TypeVar("E", bound=Entry)
MAX_SOURCE_BYTES = 4 * 2**20
_LONGEST_MESSAGE = 400


@dataclass(frozen=True)
class PluginEntry:
    """An entry that a plugin defines."""

    kind: str  # of the registry, in words
    name: str
    place: str  # `file:line` of its class
    summary: str


@dataclass(frozen=True)
class Plugin:
    """A plugin in use."""

    name: str  # as the configuration has it
    resolved: str  # as `config.resolved.yaml` has it: a module's name, or the text of an absolute path
    file: Path
    sha256: str  # of the code that was run
    entries: tuple[PluginEntry, ...]
    loads_torch: bool  # whether importing it imports torch
    seconds: float  # that importing it took


@dataclass(frozen=True)
class _Imported:
    module: ModuleType
    sha256: str
    loads_torch: bool
    seconds: float


# What this process has imported, by file (and contents, where it is no installed module): nothing is run twice.
_imported: dict[tuple[Path, str], _Imported] = {}
_added: list[tuple[Registry[Any], type[Entry]]] = []  # what the registries hold of it


def use_plugins(
    names: Sequence[str], beside: Path, forbidden: Mapping[Path, str], places: Sequence[str] = ()
) -> tuple[Plugin, ...]:
    """Import plugins and let the registries hold their entries, and no others beside the package's own.

    Args:
        names: of installed modules, and paths of files that end in .py.
        beside: folder from which relative paths start: the configuration's.
        forbidden: folders and files from which nothing is imported, with what each is: models, data sets, runs.
        places: where each name is written, for messages.
    Raises:
        ConfigError: all problems of all plugins. The registries hold what is left.
    Communication: none; every rank imports for itself.
    """
    problems: list[Problem] = []
    plugins: list[Plugin] = []
    taken: dict[tuple[str, str], str] = {}  # places of entries, by kind and name
    files: dict[Path, str] = {}
    while _added:  # of the configuration before
        registry, entry = _added.pop()
        if registry.added.get(entry.name) is entry:
            del registry.added[entry.name]
    for number, name in enumerate(names):
        where = places[number] if number < len(places) else KEY
        try:
            source = find_source(name, beside, forbidden)
            if (other := files.get(source.file)) is not None:
                raise refused(f"{name!r}, which is {source.file} as {other!r} is", "every plugin once")
            files[source.file] = name
            plugins.append(_use(source, taken))
        except InputError as error:
            problems += [replace(problem, where=where) for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return tuple(plugins)


def plugin_of(entry: type[Entry]) -> str | None:
    """What another process imports an entry from: the name of a module or a path; None for the package's own."""
    for (file, sha256), imported in _imported.items():
        if imported.module is sys.modules.get(entry.__module__):
            return str(file) if sha256 else entry.__module__
    return None


def entry_again(plugin: str, registry: Registry[E], name: str) -> type[E]:
    """Import an entry in another process of the same run, whose registries need not hold it.

    Args:
        plugin: as `plugin_of` says.
        registry, name: of the entry.
    Raises:
        InputError: it cannot be imported any more.
        KeyError: it is not there any more.
    """
    module = _import(find_source(plugin, Path("/"), {})).module
    return {entry.name: entry for entry in entries_of(module, registry.contract)}[name]


def _use(source: PluginSource, taken: dict[tuple[str, str], str]) -> Plugin:
    """Import one plugin and add its entries.

    Args:
        taken: places of the entries that are there; this plugin's are added.
    Raises:
        InputError: whatever is wrong with it.
    """
    imported = _import(source)
    problems = wrong_entries(imported.module, str(source.file), ALL_REGISTRIES)
    if problems:
        raise InputError(problems)
    found = [(registry, entry) for registry in ALL_REGISTRIES for entry in _distinct(registry, imported.module)]
    for registry, entry in found:
        place = place_of_entry(entry)
        if (other := _place_of_name(registry, entry.name, taken)) is not None:
            expected = f"a name of its own: {other} has this one"
            problems.append(Problem("", f"{KEY}: {place}", f"{registry.kind} {entry.name!r} a second time", expected))
        taken.setdefault((registry.kind, entry.name), place)
    if problems:
        raise InputError(problems)
    for registry, entry in found:
        registry.added[entry.name] = entry
        _added.append((registry, entry))
    entries = (
        PluginEntry(registry.kind, entry.name, place_of_entry(entry), entry.summary()) for registry, entry in found
    )
    return Plugin(
        source.name,
        source.resolved,
        source.file,
        imported.sha256,
        tuple(entries),
        imported.loads_torch,
        imported.seconds,
    )


def _distinct(registry: Registry[Any], module: ModuleType) -> Iterable[type[Entry]]:
    """The entries of one kind; a class with two names in the module is one."""
    return dict.fromkeys(entries_of(module, registry.contract))


def _place_of_name(registry: Registry[Any], name: str, taken: Mapping[tuple[str, str], str]) -> str | None:
    """Where the entry of this kind and name stands that is there already."""
    if name in registry.own_names():
        return place_of_entry(registry.entry(name))
    return taken.get((registry.kind, name))


def _import(source: PluginSource) -> _Imported:
    """Run the code of a plugin, once in this process for each version of it.

    Raises:
        InputError: it cannot be read, or raises anything.
    """
    try:
        content = read_input_bytes(source.file, "a Python file", MAX_SOURCE_BYTES)
    except InputError as error:
        found = "; ".join(problem.found for problem in error.problems)
        raise refused(found, "a Python file that can be read", place=str(source.file)) from None
    sha256 = hashlib.sha256(content).hexdigest()
    key = (source.file, "" if source.module else sha256)
    if key not in _imported:
        had_torch, began = "torch" in sys.modules, time.perf_counter()
        module = _run(source, content, sha256)
        loads_torch = (not had_torch and "torch" in sys.modules) or _holds_torch(module)
        _imported[key] = _Imported(module, sha256, loads_torch, time.perf_counter() - began)
    return _imported[key]


def _run(source: PluginSource, content: bytes, sha256: str) -> ModuleType:
    try:
        return importlib.import_module(source.module) if source.module else _run_file(source, content, sha256)
    except BaseException as error:
        # A plugin that ends the process is refused, a request to stop is obeyed.
        if not (is_of_parser(error) or isinstance(error, SystemExit)):
            raise
        line = _line_in(error, source.file)
        said = " ".join(str(error).split())[:_LONGEST_MESSAGE]
        found = f"{type(error).__name__}: {said}" if said else type(error).__name__
        place = f"{source.file}:{line}" if line else str(source.file)
        raise refused(found, _expected(error, source), place=place) from error


def _expected(error: BaseException, source: PluginSource) -> str:
    """What would do instead of the error."""
    name = error.name.split(".")[0] if isinstance(error, ModuleNotFoundError) and error.name else ""
    if name and source.module is None and (source.file.parent / f"{name}.py").is_file():
        return (
            f"a plugin in one file: {name}.py beside it is not on Python's path; install it, or put it into this file"
        )
    return "Python code that can be imported"


def _run_file(source: PluginSource, content: bytes, sha256: str) -> ModuleType:
    """Run a file as a module of its own, which other modules and processes do not find by its name."""
    name = f"plugin_{source.file.stem}_{hashlib.sha256(str(source.file).encode()).hexdigest()[:8]}_{sha256[:8]}"
    specification = importlib.util.spec_from_file_location(name, source.file, loader=_ReadSource(source.file, content))
    assert specification is not None, "a loader with a file has one"
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # where its classes look for their module
    try:
        assert specification.loader is not None, "it was given"
        specification.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


class _ReadSource(importlib.abc.SourceLoader):
    """Run the bytes that were hashed: neither the file as it is a moment later, nor compiled code from beside it."""

    def __init__(self, file: Path, content: bytes):
        self._file, self._content = file, content

    def get_filename(self, fullname: str) -> str:
        return str(self._file)

    def get_data(self, path: Any) -> bytes:
        if str(path) != str(self._file):
            raise OSError(f"{path} is not read")
        return self._content


def _line_in(error: BaseException, file: Path) -> int | None:
    """The line of a file at which an error arose, or which led to it."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return lines[-1] if lines else None


def _holds_torch(module: ModuleType) -> bool:
    """Whether a module has something of torch among its names: it may have been loaded before."""
    names = [value.__name__ for value in vars(module).values() if isinstance(value, ModuleType)]
    names += [value.__module__ for value in vars(module).values() if isinstance(value, type | FunctionType)]
    return any(name.split(".")[0] == "torch" for name in names)

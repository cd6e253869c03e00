"""Find the file of a plugin, and refuse files that somebody else may have put there. Nothing is imported. No torch."""

import difflib
import importlib.machinery
import importlib.util
import itertools
import os
import pkgutil
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ebft_mega.errors import InputError, Problem
from ebft_mega.io.expanded_paths import PathTextError, expanded, written
from ebft_mega.io.input_errors import file_obstacle

KEY = "plugins"
SUFFIX = ".py"
EXPECTED = "the name of an installed module, or the path of a Python file that ends in .py"
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_SIMILAR = 0.6
_MOST_NAMES = 10_000  # of a folder that are compared with a name that is not there
_MOST_LINKS = 40  # on one way, as for the system
# Files by which a folder is recognised that a run, a build or somebody's download has made.
MARKERS = {
    "config.resolved.yaml": "a run or a checkpoint",
    "dataset.json": "a data set",
    "model.safetensors": "a model",
    "model.safetensors.index.json": "a model",
}
_OWN_PLACE = "a file of your own, outside of models, data sets, caches, checkpoints and runs: read it, and copy it"


@dataclass(frozen=True)
class PluginSource:
    """Where the code of a plugin lies."""

    name: str  # as the configuration has it
    resolved: str  # as `config.resolved.yaml` has it: a module's name, or the text of an absolute path
    file: Path  # absolute, reached as the name says
    module: str | None  # name of the installed module; None: a file of its own


def find_source(name: str, beside: Path, forbidden: Mapping[Path, str]) -> PluginSource:
    """Find the file of a plugin.

    Args:
        name: an installed module's, or a path that ends in .py.
        beside: folder from which relative paths start.
        forbidden: folders and files from which nothing is imported, by their absolute paths, with what each is.
    Raises:
        InputError: it is not there, is of another kind, or lies where it must not lie (`where` is empty).
    """
    if name.endswith(SUFFIX):
        return _file_source(name, beside, forbidden)
    if _MODULE.fullmatch(name):
        return _module_source(name, beside, forbidden)
    raise refused(repr(name), EXPECTED, f"{name}{SUFFIX}" if (beside / f"{name}{SUFFIX}").is_file() else "")


def refused(found: str, expected: str, suggestion: str = "", place: str = "") -> InputError:
    """The error of one problem of a plugin.

    Args:
        place: file and line of the plugin.
    """
    return InputError([Problem("", f"{KEY}: {place}" if place else KEY, found, expected, suggestion)])


def _file_source(name: str, beside: Path, forbidden: Mapping[Path, str]) -> PluginSource:
    try:
        path = Path(os.path.normpath(beside / expanded(name, os.environ)))
    except PathTextError as error:
        raise refused(error.found, error.expected, error.suggestion) from None
    obstacle = file_obstacle(path)
    if obstacle is not None:
        is_there = os.path.lexists(path)
        raise refused(f"{name!r}: {path}: {obstacle}", "a Python file", "" if is_there else _nearest_path(path))
    _require_own_place(name, path, forbidden)
    return PluginSource(name, written(str(path)), path, None)


def _module_source(name: str, beside: Path, forbidden: Mapping[Path, str]) -> PluginSource:
    """Find an installed module without importing the packages in which it lies."""
    chain = list(_specifications(name))
    if len(chain) < len(name.split(".")):
        raise refused(f"{name!r}, which is no installed module", EXPECTED, _nearest_module(name, chain, beside))
    for specification in chain:
        for place in (specification.origin, *(specification.submodule_search_locations or ())):
            if place is not None and os.path.isabs(place):
                _require_own_place(name, Path(place), forbidden)
    origin = chain[-1].origin
    if not isinstance(chain[-1].loader, importlib.machinery.SourceFileLoader) or origin is None:
        place = origin or ", ".join(chain[-1].submodule_search_locations or ())
        raise refused(f"{name!r}, which is {_kind(chain[-1])} ({place})", "a module whose code is a .py file")
    return PluginSource(name, name, Path(origin), name)


def _specifications(name: str) -> Iterator[importlib.machinery.ModuleSpec]:
    """Where the packages of a dotted name lie, and then the module itself, as far as there are any."""
    first, *rest = name.split(".")
    try:
        found = importlib.util.find_spec(first)
    except (ImportError, ValueError, AttributeError):  # of a module that is loaded and has no specification
        return
    for part in rest:
        if found is None:
            return
        yield found
        if found.submodule_search_locations is None:
            return
        found = importlib.machinery.PathFinder.find_spec(f"{found.name}.{part}", list(found.submodule_search_locations))
    if found is not None:
        yield found


def _kind(specification: importlib.machinery.ModuleSpec) -> str:
    """What a module is that has no source."""
    loader = type(specification.loader).__name__ if specification.loader is not None else ""
    if "zip" in loader.lower():
        return "a module in a zip archive"
    if specification.origin is None:
        return "a folder without __init__.py"
    return "a module without its source"


def _require_own_place(name: str, path: Path, forbidden: Mapping[Path, str]) -> None:
    """Refuse what lies, or is reached through a link, where others may have put it.

    Raises:
        InputError: it does.
    """
    places = {place: (place, what) for place, what in forbidden.items()}
    places |= {Path(os.path.realpath(place)): (place, what) for place, what in forbidden.items()}
    found = repr(name) if Path(name) == path else f"{name!r}: {path}"
    for step in _steps(path):
        through = "" if step in (path, *path.parents) else f" through a link to {step}"
        for inside in (step, *step.parents):
            if inside in places:
                place, what = places[inside]
                raise refused(f"{found}{through}, which lies in {place}, {what}", _OWN_PLACE)
        for marker, what in MARKERS.items():
            if (step / marker).is_file():
                raise refused(f"{found}{through}, which lies in {step}, {what} (with {marker})", _OWN_PLACE)
        if (danger := _written_by_others(step)) is not None:
            expected = f"a plugin that you alone may change: chmod o-w {step}"
            raise refused(f"{found}{through}, where {step} {danger}", expected)


def _written_by_others(path: Path) -> str | None:
    """Whether any user of the machine may change a file, or put another one in its place."""
    try:
        mode = path.lstat().st_mode
    except OSError:  # a module in an archive, which is refused for that
        return None
    is_shared = stat.S_ISDIR(mode) and mode & stat.S_ISVTX  # as /tmp: files of others cannot be replaced in it
    if mode & stat.S_IWOTH and not stat.S_ISLNK(mode) and not is_shared:
        return f"may be written by every user (mode {stat.S_IMODE(mode):04o})"
    return None


def _steps(path: Path) -> Iterator[Path]:
    """Every folder, link and file on the way to a file, in the order in which the system goes through them."""
    reached, left = Path(path.anchor), list(reversed(path.parts[1:]))
    links = 0
    while left:
        part = left.pop()
        if part == "..":
            reached = reached.parent
            continue
        step = reached / part
        yield step
        if step.is_symlink() and links < _MOST_LINKS:
            links += 1
            target = Path(os.readlink(step))
            reached = Path(target.anchor) if target.is_absolute() else reached
            left += reversed(target.parts[1:] if target.is_absolute() else target.parts)
        else:
            reached = step


def _nearest_path(path: Path) -> str:
    """The path that was meant where the first part that is missing has a near one beside it; empty if none is."""
    missing = next(each for each in reversed((path, *path.parents)) if not os.path.lexists(each))
    try:
        with os.scandir(missing.parent) as entries:
            names = [entry.name for entry in itertools.islice(entries, _MOST_NAMES)]
    except OSError:
        return ""
    if missing == path:
        names = [name for name in names if name.endswith(SUFFIX)]
    near = difflib.get_close_matches(missing.name, names, n=1, cutoff=_SIMILAR)
    return str(missing.parent / near[0] / path.relative_to(missing)) if near else ""


def _nearest_module(name: str, chain: list[importlib.machinery.ModuleSpec], beside: Path) -> str:
    """The module that was meant, or the file of this name beside the configuration; empty if none is near."""
    file = Path(*name.split(".")).with_suffix(SUFFIX)
    if (beside / file).is_file():
        return str(file)
    parts = name.split(".")
    locations = chain[-1].submodule_search_locations if chain else None
    if chain and locations is None:
        return ".".join(parts[: len(chain)])
    names = [module.name for module in itertools.islice(pkgutil.iter_modules(locations), _MOST_NAMES)]
    near = difflib.get_close_matches(parts[len(chain)], names, n=1, cutoff=_SIMILAR)
    return ".".join([*parts[: len(chain)], near[0], *parts[len(chain) + 1 :]]) if near else ""

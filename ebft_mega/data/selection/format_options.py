"""Options of the tools that read texts: `--format`, `--format-option` and `--plugin`."""

import argparse
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ebft_mega.data.selection.text_formats import FormatChoice, entry_class, format_classes, format_list
from ebft_mega.errors import InputError, Problem
from ebft_mega.registry.kinds import TEXT_FORMATS
from ebft_mega.registry.plugins import use_plugins

PLUGIN, OPTION = "--plugin", "--format-option"


class UsedPlugin(NamedTuple):
    """A plugin in use."""

    name: str  # without a folder of the machine
    resolved: str  # by which every process finds it
    sha256: str  # of the code that was run


def add_format_options(parser: argparse.ArgumentParser, default: str) -> None:
    """Add what says which format files have.

    Args:
        parser: of the tool.
        default: what holds without `--format`.
    """
    parser.add_argument(
        "--format",
        metavar="NAME",
        help=f"the format of all files, whatever their names (default: {default}); of a directory those of its "
        f"suffixes are read, or if there are none, all: {format_list()}",
    )
    parser.add_argument(
        OPTION,
        dest="format_options",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME.KEY=VALUE",
        help="options of a format that has any",
    )
    parser.add_argument(
        PLUGIN,
        dest="plugins",
        action="extend",
        nargs="+",
        default=[],
        metavar="FILE_OR_MODULE",
        help="Python code with formats of one's own, which is run: a file that ends in .py, or an installed module",
    )


def plugins_of(names: Sequence[str], places: Mapping[str, Sequence[Path]]) -> tuple[UsedPlugin, ...]:
    """Import the plugins of a command line, so that their formats are known.

    Args:
        names: of files, relative to the working directory, and of installed modules.
        places: what the command reads and writes, by option; nothing is imported from there.

    Raises:
        ConfigError: with all problems of all plugins.
    """
    forbidden = {path.absolute(): f"{option} of this command" for option, paths in places.items() for path in paths}
    used = use_plugins(names, Path.cwd(), forbidden, [PLUGIN] * len(names))
    return tuple(UsedPlugin(Path(plugin.name).name, plugin.resolved, plugin.sha256) for plugin in used)


def use_again(plugins: Sequence[UsedPlugin]) -> None:
    """Import in this process what another one uses.

    Raises:
        InputError: one of them has changed since.
    """
    used = use_plugins([plugin.resolved for plugin in plugins], Path("/"), {}, [PLUGIN] * len(plugins))
    changed = [new.file for old, new in zip(plugins, used, strict=True) if old.sha256 != new.sha256]
    if changed:
        expected = "plugins that do not change during the build"
        raise InputError([Problem(PLUGIN, str(file), "other code than a moment ago", expected) for file in changed])


def format_options(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The options of entries by their names, of texts `NAME.KEY=VALUE`.

    Raises:
        InputError: with all that are not what an entry takes.
    """
    from ebft_mega.config.overrides import apply_overrides  # most commands have none

    tree: dict[str, Any] = {}
    problems = [
        Problem(OPTION, text, "no NAME.KEY=VALUE", "the name of a format, a key of its options and a value")
        for text in texts
        if "." not in text.partition("=")[0] or "=" not in text
    ]
    if not problems:
        problems = [replace(problem, where=OPTION) for problem in apply_overrides(tree, {}, texts)]
        problems += [problem for name, values in tree.items() for problem in _wrong(name, values)]
    if problems:
        raise InputError(problems)
    return tree


def require_use(formats: FormatChoice, given: Mapping[str, str | None]) -> None:
    """Check that the chosen format makes use of some options.

    Args:
        formats: that all files have; without one, each file is a text.
        given: values by what an entry would use (`TextFormat.uses`); None: not given.

    Raises:
        InputError: it does not, or a name is empty.
    """
    chosen = formats.chosen()
    problems = []
    for use, value in given.items():
        if value is None or (value and chosen is not None and use in chosen.uses):
            continue
        option = f"--{use.replace('_', '-')}"
        using = " or ".join(kind.name for kind in format_classes() if use in kind.uses)
        found = f"--format {formats.name}, which has no use for it" if formats.name else "no --format"
        problems.append(Problem(option, value or "(empty)", found, f"a name, with --format {using}"))
    if problems:
        raise InputError(problems)


def _wrong(name: str, values: Mapping[str, Any]) -> Iterator[Problem]:
    from ebft_mega.config.plugin_keys import wrong_options

    names = TEXT_FORMATS.names()
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        yield Problem(OPTION, name, "no such text format", f"a text format: {', '.join(names)}", *near)
        return
    kind = entry_class(name)
    if not kind.Options.model_fields:
        yield Problem(OPTION, name, f"{', '.join(values)}", f"no options: {name} has none")
        return
    yield from (replace(each, where=OPTION) for each in wrong_options(kind, values, name, is_used=True))

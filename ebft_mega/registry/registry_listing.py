"""What the registries hold, as text for `--help` and as tables for the docs. No torch."""

import textwrap
from typing import Any

from ebft_mega.registry.kinds import ALL_REGISTRIES
from ebft_mega.registry.registry import Registry

_WIDTH = 100
_INDENT = 6


def listed_entries() -> str:
    """Every kind with its contract, and below it the names of its entries with what each is, in lines."""
    lines = ["entries, by kind (docs/configuration.md has their options; a plugin adds more, see docs/extending.md):"]
    for registry in ALL_REGISTRIES:
        lines.append(f"  {registry.kind}:")
        for name, summary in registry.summaries().items():
            lines += textwrap.wrap(
                f"{name}: {summary}",
                _WIDTH,
                initial_indent=" " * (_INDENT - 2),
                subsequent_indent=" " * _INDENT,
                break_long_words=False,
                break_on_hyphens=False,
            )
    return "\n".join(lines) + "\n"


def own_file(registry: Registry[Any], name: str) -> str:
    """The file of an entry of the package, from the repository's root on."""
    return f"{_in_repository(registry.folder)}/{name}.py"


def contract_file(registry: Registry[Any]) -> str:
    """The file of a kind's contract, from the repository's root on."""
    return f"{_in_repository(registry.contract.__module__)}.py"


def _in_repository(module: str) -> str:
    return module.replace(".", "/")

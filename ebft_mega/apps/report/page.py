"""Render report pages from the Jinja2 templates in `templates/`; every text and every address is escaped."""

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from ebft_mega.io.durable import write_bytes
from ebft_mega.shown_text import escaped

if TYPE_CHECKING:
    from jinja2 import Environment


@dataclass(frozen=True)
class Table:
    """A table of plain text; the first columns are aligned left, the others hold numbers and are aligned right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]  # as many cells each as the header has
    num_text_columns: int = 1


@dataclass(frozen=True)
class Figure:
    """An image within the page: the page is one file, which can be sent to somebody."""

    png: bytes
    caption: str  # plain text

    @classmethod
    def of(cls, image: Path, caption: str) -> "Figure":
        """Take a PNG file into the page.

        Raises:
            OSError: it cannot be read.
        """
        return cls(image.read_bytes(), caption)


def write_page(path: Path, template: str, *, facts: Sequence[tuple[str, str]] = (), **values: object) -> None:
    """Write a whole HTML document that needs no network, no script and no other file, in place of what lies there.

    Args:
        path: file to write.
        template: name of a file in `templates/`.
        facts: label and text of what stands in the page's head: model, data, tokens, date.
        values: what the template shows, all of it plain text; `title` and `subtitle` for every page.
    Raises:
        jinja2.UndefinedError: the template shows a value that was not given.
        OSError: as for `write_bytes`.
    Communication: none.
    """
    write_bytes(path, _environment().get_template(template).render(values, facts=facts).encode())


@cache
def _environment() -> "Environment":
    # Imported when a page is written: tools answer --help without it.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("ebft_mega.apps.report"),
        autoescape=True,
        finalize=_as_text,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["address"] = _address
    environment.filters["picture"] = _picture
    return environment


def _as_text(value: object) -> object:
    """What a template shows, before its HTML is escaped; what a macro has made is HTML already."""
    return value if hasattr(value, "__html__") else escaped(str(value), "\n\t")


def _picture(png: bytes) -> str:
    """A PNG file as an address that holds it whole."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _address(place: str) -> str:
    """A path as a relative address: nothing in it is a scheme, a query or a place within the page."""
    return quote(os.fsencode(place))

"""The HTML that reports are made of: one style sheet, tables, figures; every text is escaped here."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #dde3ea; --paper: #fff; --wash: #f5f7fa; --accent: #1f6feb; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--wash); color: var(--ink);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
p { margin: .4rem 0 .8rem; max-width: 75ch; }
.soft, figcaption, .caption { color: var(--soft); font-size: .9rem; }
.card, figure { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: 1rem;
                margin: 0 0 1rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 1rem; }
.grid figure { margin: 0; }
img { max-width: 100%; height: auto; display: block; margin: 0 auto; }
figcaption { margin-top: .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; background: var(--paper); font-variant-numeric: tabular-nums;
        width: 100%; }
th, td { text-align: left; padding: .4rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; font-size: .88rem; color: var(--soft); }
td.number, th.number { text-align: right; white-space: nowrap; }
.code { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap;
        overflow-wrap: anywhere; tab-size: 4; }
.context { color: var(--soft); display: block; border-left: 3px solid var(--line); padding-left: .7rem; }
.text { background: #eef4ff; }
.target .text { background: #e8f6ec; }
.newline { color: #a5b0be; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--accent); }
ul { padding-left: 1.2rem; } li { margin: .25rem 0; max-width: 80ch; }
"""


def page(title: str, subtitle: str, sections: Iterable[str]) -> str:
    """A whole HTML document that needs no network and no script.

    Args:
        title, subtitle: plain text.
        sections: HTML made by the other functions of this module.
    """
    body = "\n".join(sections)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<p class="soft">{escape(subtitle)}</p>\n{body}\n'
        f"</main>\n</body>\n</html>\n"
    )


def heading(text: str) -> str:
    """Title of a section."""
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, soft: bool = False) -> str:
    """Plain text; `soft` for remarks."""
    return f'<p class="soft">{escape(text)}</p>' if soft else f"<p>{escape(text)}</p>"


def bullets(items: Iterable[str]) -> str:
    """A list of plain texts."""
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def link(target: str, text: str) -> str:
    """A link, relative to the page."""
    return f'<a href="{escape(target, quote=True)}">{escape(text)}</a>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]], num_text_columns: int = 1) -> str:
    """A table whose first columns are text and whose others are numbers, aligned right.

    Args:
        header: plain text of the head row.
        rows: plain text of each cell.
        num_text_columns: columns from the left that are aligned left.
    """

    def cells(values: Sequence[str], tag: str) -> str:
        opening = [f"<{tag}>" if column < num_text_columns else number_cell(tag) for column in range(len(values))]
        return "".join(f"{start}{escape(value)}</{tag}>" for start, value in zip(opening, values, strict=True))

    def number_cell(tag: str) -> str:
        return f'<{tag} class="number">'

    body = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table>\n<thead><tr>{cells(header, "th")}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def figure(image: Path, directory: Path, caption: str) -> str:
    """An image beside the page, with its caption."""
    source = image.relative_to(directory).as_posix()
    alternative = escape(caption, quote=True)
    return (
        f'<figure><img src="{escape(source, quote=True)}" alt="{alternative}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def grid(items: Iterable[str]) -> str:
    """Figures side by side, as many as fit."""
    return '<div class="grid">\n' + "\n".join(items) + "\n</div>"


def code(text: str, css_class: str = "") -> str:
    """Source text with its whitespace; a line end is also shown as a sign, so that it can be seen.

    A `span`, not a `pre`: HTML drops a newline that stands first in a `pre`.
    """
    shown = escape(text).replace("\n", '<span class="newline">↵</span>\n')
    return f'<span class="code {css_class}">{shown}</span>'


def folded(title: str, text: str) -> str:
    """Long plain text that opens on a click."""
    return (
        f'<details><summary>{escape(title)}</summary><div class="card"><span class="code">'
        f"{escape(text)}</span></div></details>"
    )

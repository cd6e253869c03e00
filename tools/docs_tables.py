"""Write the tables of configuration keys in docs/configuration.md from `ebft_mega/config/schema.py`.

    python tools/docs_tables.py

What stands between the two markers of the page is replaced; the rest of the page is written by hand. `make docs-tables`
runs this; a test fails when page and schema differ.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C in the imports ends them without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import inspect
import sys
from pathlib import Path

from pydantic.fields import FieldInfo

from ebft_mega.config.fields import Section, allowed_text, default_text
from ebft_mega.config.input_keys import SourceConfig
from ebft_mega.config.schema import SECTIONS, RunConfig
from ebft_mega.io.arguments import PlainParser
from ebft_mega.io.command import run_command

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
START = "<!-- Written by `make docs-tables` from ebft_mega/config/schema.py; edit it there. -->"
END = "<!-- End of the written tables. -->"
HEAD = "| key | default | allowed | meaning |\n|---|---|---|---|\n"


def tables() -> str:
    """Describe every key, one table per section, in the order of the schema."""
    run = {name: field for name, field in RunConfig.model_fields.items() if name not in SECTIONS}
    parts = ["### Run\n\n" + _table("", run)]
    for name, section in SECTIONS.items():
        parts.append(f"### `{name}`\n\n{_section(f'{name}.', section)}")
        if name == "data":
            parts.append(_section("data.sources.NAME.", SourceConfig))
    return "\n".join(parts)


def _section(prefix: str, section: type[Section]) -> str:
    return f"{inspect.getdoc(section)}\n\n{_table(prefix, section.model_fields)}"


def _table(prefix: str, fields: dict[str, FieldInfo]) -> str:
    return HEAD + "".join(f"{_row(prefix + name, field)}\n" for name, field in fields.items())


def _row(key: str, field: FieldInfo) -> str:
    default = default_text(field)
    if not field.is_required() and field.default is not None:
        default = f"`{default}`"
    return f"| `{key}` | {default} | {allowed_text(field)} | {field.description} |"


def with_tables(page: str) -> str:
    """Replace what stands between the markers of a page.

    Raises:
        ValueError: a marker is missing, or there are several.
    """
    before, after = page.split(START)
    _, after = after.split(END)
    return f"{before}{START}\n\n{tables()}\n{END}{after}"


def main() -> int:
    """Command line."""
    parser = PlainParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

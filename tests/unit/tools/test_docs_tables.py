"""The tables of docs/configuration.md say what the schema says."""

import runpy
from pathlib import Path

import pytest

from ebft_mega.config.fields import PATH, allowed_text, default_text
from ebft_mega.config.input_keys import SourceConfig
from ebft_mega.config.schema import all_keys
from ebft_mega.registry.store_addresses import schemes_in_words

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def with_tables():
    return runpy.run_path(str(ROOT / "tools" / "docs_tables.py"))["with_tables"]


def test_the_page_is_written_from_the_schema(with_tables):
    assert with_tables(PAGE) == PAGE, "run `make docs-tables`"


def test_the_page_about_axolotl_is_written_from_its_table():
    page = (ROOT / "docs" / "axolotl.md").read_text(encoding="utf-8")
    write = runpy.run_path(str(ROOT / "tools" / "docs_tables.py"))["with_foreign_keys"]
    assert write(page) == page, "run `make docs-tables`"
    assert write(page.replace("`base_model`", "`base`")) == page


def test_the_page_about_experiments_is_written_from_their_schema():
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    write = runpy.run_path(str(ROOT / "tools" / "docs_tables.py"))["with_experiment_keys"]
    assert write(page) == page, "run `make docs-tables`"
    assert write(page.replace("`arms.NAME.like`", "`arms.NAME.as`")) == page


def test_an_edited_table_is_written_anew_and_the_rest_stays(with_tables):
    edited = PAGE.replace("| `train.lr` | `1e-06` |", "| `train.lr` | `1e-05` |")
    assert edited != PAGE and with_tables(edited) == PAGE
    assert with_tables(f"{PAGE}More.") == f"{PAGE}More."
    with pytest.raises(ValueError, match="unpack"):
        with_tables("a page without markers")


def test_every_key_has_one_row_with_default_allowed_value_and_meaning():
    keys = all_keys() | {f"data.sources.NAME.{name}": field for name, field in SourceConfig.model_fields.items()}
    for key, field in keys.items():
        (row,) = (line for line in PAGE.splitlines() if line.startswith(f"| `{key}` |"))
        cells = row.strip("| ").split(" | ", maxsplit=3)
        assert cells == [f"`{key}`", cells[1], allowed_text(field), field.description]
        assert cells[1].strip("`") == default_text(field)


@pytest.mark.parametrize(
    ("key", "default", "allowed"),
    [
        ("output_dir", "required", "a local path (relative paths start at the repository root)"),
        ("seed", "`0`", "an integer from 0 to 2**63 - 1"),
        (
            "data.shards",
            "not set",
            f"{PATH} or an address that begins with {schemes_in_words()}",
        ),
        ("data.document_masking", "`false`", "true or false"),
        ("data.sources.NAME.max_epochs", "not set", "a number > 0, epochs"),
        ("data.max_skipped_share", "`0.001`", "a number >= 0 and <= 1"),
        ("ebft.mode", "`strided`", "strided"),
        ("ebft.feature_layers", "`[0.25, 0.5, 0.75]`", "a list of numbers > 0 and <= 1"),
        ("train.max_tokens", "not set", "an integer >= 1, tokens"),
        ("train.lr", "`1e-06`", "a number > 0"),
        ("zero.stage", "`3`", "0, 1, 2 or 3"),
    ],
)
def test_rows_of_every_kind_of_key(key, default, allowed):
    assert f"\n| `{key}` | {default} | {allowed} | " in PAGE

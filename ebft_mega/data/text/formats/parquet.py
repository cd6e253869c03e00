"""Parquet files."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from ebft_mega.data.text.file_kinds import BUILD_IT, kind
from ebft_mega.data.text.parquet_columns import unknown_columns
from ebft_mega.data.text.parquet_files import parquet_layout, read_parquet
from ebft_mega.data.text.text_files import BadText, ReadOptions, TextDocument
from ebft_mega.errors import Problem
from ebft_mega.extension.text_format import FilePart, Layout, TextFormat


class Parquet(TextFormat):
    """Each row is a document: a column of texts, as in data sets of Hugging Face's hub."""

    name = "parquet"
    suffixes = (".parquet",)
    kinds = (kind("a Parquet file", f"a name that ends in .parquet; {BUILD_IT}", rb"PAR1", suffixes),)
    uses = frozenset({"text_key", "records"})
    refuses_other_kinds = True
    install = "pyarrow, which reads Parquet: pip install 'ebft-mega[parquet]'"

    def import_packages(self) -> None:
        """The package that parses Parquet."""
        import pyarrow.parquet  # noqa: F401

    def layout(self, file: Path, options: ReadOptions) -> Layout:
        """Sections are row groups; of each, what the columns that are read unpack to."""
        found = parquet_layout(file, options)
        return Layout(found.group_bytes, found.columns)

    def option_problems(self, layouts: Sequence[Layout], options: ReadOptions) -> Iterator[Problem]:
        """Columns of licences, and kept ones, that no file has."""
        columns = tuple(dict.fromkeys(column for layout in layouts for column in layout.details))
        return unknown_columns(columns, options)

    def read(self, part: FilePart) -> Iterator[TextDocument | BadText]:
        """The texts of the rows of some row groups."""
        groups = range(part.begin, part.end)
        return read_parquet(part.file, part.path, part.options, groups, part.left_out)

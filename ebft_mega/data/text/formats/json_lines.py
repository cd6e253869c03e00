"""JSON lines."""

from collections.abc import Iterator
from pathlib import Path

from ebft_mega.data.text.compression import GZIP_SUFFIX, ZSTANDARD_SUFFIX
from ebft_mega.data.text.file_kinds import JSON_LINES
from ebft_mega.data.text.text_files import (
    BLANK_LINES,
    BadText,
    ReadOptions,
    TextDocument,
    count_lines,
    first_record_keys,
    read_jsonl,
)
from ebft_mega.extension.text_format import FilePart, TextFormat


class JsonLines(TextFormat):
    """Each line is a JSON object with a text, plain or packed by gzip or zstandard."""

    name = "json_lines"
    suffixes = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz")
    possible_suffixes = (".json", ".ndjson")
    kinds = (JSON_LINES,)
    uses = frozenset({"text_key", "records"})
    refuses_other_kinds = True
    reasons = (BLANK_LINES,)

    def first_keys(self, file: Path, options: ReadOptions) -> list[str] | None:
        """Of the first line that is not blank."""
        return first_record_keys(file, options.encoding_fallback)

    def may_be_cut(self, name: str) -> bool:
        """A plain file is cut into ranges of lines."""
        return not name.endswith((GZIP_SUFFIX, ZSTANDARD_SUFFIX))

    def count(self, file: Path, begin: int, end: int) -> int:
        """Lines."""
        return count_lines(file, begin, end)

    def read(self, part: FilePart) -> Iterator[TextDocument | BadText]:
        """The texts of the lines."""
        end = part.end if part.is_cut else None
        return read_jsonl(part.file, part.path, part.options, part.begin, end, part.first, part.left_out)

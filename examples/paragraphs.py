"""A text format: files of paragraphs, each a document."""

# No key of a configuration names it: data sets are built with it.
#     python tools/build_shards.py --plugin paragraphs.py --input letters.paragraphs ...
#     python tools/train_tokenizer.py --plugin paragraphs.py --format paragraphs --input FOLDER ...
#     --format-option paragraphs.min_characters=20  # not needed

from collections.abc import Iterator
from typing import BinaryIO

from ebft_mega.data.text.bounded_reading import open_regular, read_line, skip_line
from ebft_mega.data.text.text_files import BadText, TextDocument
from ebft_mega.extension.options import Section, key
from ebft_mega.extension.text_format import FilePart, TextFormat

SHORT = "paragraphs that are too short"


class ParagraphsOptions(Section):
    """What is left out."""

    min_characters: int = key(0, "Shorter paragraphs are left out and counted.", ge=0)


class Paragraphs(TextFormat):
    """Each paragraph of a file is a document: lines up to an empty one."""

    name = "paragraphs"
    suffixes = (".paragraphs",)
    reasons = (SHORT,)
    Options = ParagraphsOptions

    def may_be_cut(self, name: str) -> bool:
        """Several processes may read one file: a paragraph belongs to the range in which it begins."""
        return True

    def read(self, part: FilePart) -> Iterator[TextDocument | BadText]:
        """The paragraphs that begin in a range of bytes; a document's path is its file with the offset."""
        most = part.options.max_document_bytes
        with open_regular(part.file) as lines:
            position, after_empty = self._first_line(lines, part.begin)
            begin, content = None, b""
            while position < part.end or begin is not None:
                line, num_bytes = read_line(lines, most)
                if line in (b"\n", b""):
                    if begin is not None:
                        yield from self._documents(part, content, begin)
                    begin, content, after_empty = None, b"", True
                elif begin is not None or after_empty:
                    begin = position if begin is None else begin
                    # Of a paragraph that is too long no more is held than tells it.
                    content = (content + (line or bytes(most + 1)))[: most + 1]
                    after_empty = False
                if not num_bytes:
                    return
                position += num_bytes

    def _first_line(self, lines: BinaryIO, begin: int) -> tuple[int, bool]:
        """Go to the first line that begins at or after an offset; where that is, and whether an empty one is before."""
        before = b""
        if begin:
            lines.seek(max(0, begin - 2))
            before = lines.read(min(begin, 2))
        if before[-1:] not in (b"", b"\n"):
            return begin + skip_line(lines, None), False
        return begin, before in (b"", b"\n", b"\n\n")

    def _documents(self, part: FilePart, content: bytes, begin: int) -> Iterator[TextDocument | BadText]:
        document = part.document(content, begin)
        if isinstance(document, TextDocument) and len(document.text) < self.options.min_characters:
            part.left_out[SHORT] += 1
        elif document is not None:
            yield document

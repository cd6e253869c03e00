"""Files of which each is a document."""

from collections.abc import Iterator

from ebft_mega.data.text.text_files import BadText, TextDocument, read_text_file
from ebft_mega.extension.text_format import FilePart, TextFormat


class PlainFiles(TextFormat):
    """Each file is a document: source code, say."""

    name = "plain_files"
    takes_any_file = True

    def read(self, part: FilePart) -> Iterator[TextDocument | BadText]:
        """The text of the file."""
        document = read_text_file(part.file, part.path, part.options, part.left_out)
        if document is not None:
            yield document

"""Archives of source trees."""

from collections.abc import Iterator
from pathlib import Path

from ebft_mega.data.text.file_kinds import BUILD_IT, kind
from ebft_mega.data.text.source_archives import SOURCE, ZIP_SUFFIX, common_folder, kind_of_tar, read_source_archive
from ebft_mega.data.text.text_files import ARCHIVE_SUFFIX, SOURCE_SUFFIXES, BadText, ReadOptions, TextDocument
from ebft_mega.extension.text_format import FilePart, TextFormat


class SourceArchive(TextFormat):
    """Each member of an archive is a document: a source tree in a tar or zip file."""

    name = "source_archive"
    suffixes = (*SOURCE_SUFFIXES, ARCHIVE_SUFFIX)
    kinds = (kind("a zip file", f"a name that ends in .zip; {BUILD_IT}", rb"PK\x03\x04", (ZIP_SUFFIX,)),)
    uses = frozenset({"members"})
    refuses_other_kinds = True
    archive_word = SOURCE
    archive_meaning = "each member is a text"

    def holds(self, file: Path, options: ReadOptions) -> tuple[bool, str]:
        """As its first members tell."""
        kind_of_members, words = kind_of_tar(file, options.text_member)
        return kind_of_members == SOURCE, f"a tar file of {words}"

    def common_folder(self, file: Path) -> str:
        """That of its members."""
        return common_folder(file)

    def read(self, part: FilePart) -> Iterator[TextDocument | BadText]:
        """The texts of the members that are chosen."""
        return read_source_archive(part.file, part.path, part.options, part.left_out, part.choose)

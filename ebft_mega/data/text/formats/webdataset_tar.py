"""Text webdatasets."""

from collections.abc import Iterator
from pathlib import Path

from ebft_mega.data.text.archives import read_text_archive
from ebft_mega.data.text.source_archives import WEBDATASET, kind_of_tar
from ebft_mega.data.text.text_files import ARCHIVE_SUFFIX, OTHER_MEMBERS, BadText, ReadOptions, TextDocument
from ebft_mega.extension.text_format import FilePart, TextFormat


class WebdatasetTar(TextFormat):
    """Each sample of a tar file is a document: members that differ in their suffix only, one of them a text."""

    name = "webdataset_tar"
    suffixes = (ARCHIVE_SUFFIX,)
    uses = frozenset({"text_member", "records"})
    refuses_other_kinds = True
    archive_word = WEBDATASET
    archive_meaning = "samples with a text each"
    reasons = (OTHER_MEMBERS,)

    def holds(self, file: Path, options: ReadOptions) -> tuple[bool, str]:
        """As its first members tell."""
        kind, words = kind_of_tar(file, options.text_member)
        return kind == WEBDATASET, f"a tar file of {words}"

    def read(self, part: FilePart) -> Iterator[TextDocument | BadText]:
        """The texts of the samples."""
        return read_text_archive(part.file, part.path, part.options, part.left_out)

"""Options of a dataset build: together with the inputs and the tokenizer they decide every byte of the dataset."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from ebft_mega.data.selection.file_choice import FileChoice
from ebft_mega.data.selection.format_options import UsedPlugin, use_again
from ebft_mega.data.selection.held_out_split import SplitOptions
from ebft_mega.data.selection.licence_choice import LicenceChoice
from ebft_mega.data.selection.text_formats import FormatChoice
from ebft_mega.data.selection.text_limits import TextLimits
from ebft_mega.data.text.text_files import MAX_DOCUMENT_BYTES, ReadOptions

_OF_FORMATS = ("format", "format_options", "plugins")
DEFAULT_SHARD_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class BuildOptions:
    """What is read, what is left out, and how large the shards are."""

    pattern: str = "*"  # shell pattern on the file names of directories
    include: Sequence[str] = ()  # git's patterns on the paths below each directory; () is all
    exclude: Sequence[str] = ()
    gitignore: bool = False  # leave out what the `.gitignore` files in each directory name
    # The member of a JSON line that holds the text. None: "text", and JSON lines are told by the names of files alone.
    text_key: str | None = None
    # The suffix of the member of a webdataset sample that holds the text. None: "txt", in folders of containers only.
    text_member: str | None = None
    # What plain tar files hold: "source", a text in each member, or "webdataset", samples. None: as they clearly say.
    archives: str | None = None
    # Recorded with every document that names none. None: from the corpus manifest of `tools/build_corpus.py` in or
    # above each source, else "unknown".
    licence: str | None = None
    licence_key: str | None = None  # the member of a JSON line, or of a sample's `.json` member, that names the licence
    keep_keys: Sequence[str] = ()  # members of the same that are copied into each document's metadata
    deduplicate: bool = True  # leave out a document whose text an earlier one has, in the order of the inputs
    # Leave out documents that cannot be used, files that cannot be read to their end and folders that cannot be
    # entered, and list them in `skipped.jsonl`.
    skip_bad: bool = False
    max_document_bytes: int = MAX_DOCUMENT_BYTES  # of a text as UTF-8; longer documents are left out, and never read
    min_document_bytes: int | None = None
    max_line_length: int | None = None  # see `TextLimits`
    max_mean_line_length: float | None = None
    min_alphanumeric: float | None = None
    encoding_fallback: str | None = None  # of texts that are not UTF-8
    keep_licences: Sequence[str] = ()  # names or shell patterns; () is all
    drop_licences: Sequence[str] = ()
    shard_bytes: int = DEFAULT_SHARD_BYTES  # after so many bytes a shard is closed
    # Leave out documents that are nearly the same as an earlier one that stays: the least Jaccard index for that.
    near_deduplicate: float | None = None
    split: SplitOptions | None = None  # hold shares of the documents out, and write several datasets
    # Input bytes of a work unit. None: 1/64 of all inputs, at least 4 MiB and at most 1 GiB.
    work_unit_bytes: int | None = None
    format: str | None = None  # that all files have; None: the one that each is recognised as
    format_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of entries, by name; checked
    plugins: Sequence[UsedPlugin] = ()  # whose formats are known, in every process

    @property
    def formats(self) -> FormatChoice:
        """What is said about formats."""
        return FormatChoice(self.format, self.format_options)

    @property
    def of_formats(self) -> dict[str, Any]:
        """What is said about formats, and the plugins in use; without what is not given, and without places."""
        plugins = [{"name": plugin.name, "sha256": plugin.sha256} for plugin in self.plugins]
        given = {"format": self.format, "format_options": dict(self.format_options), "plugins": plugins}
        return {name: value for name, value in given.items() if value}

    def prepare_process(self) -> Callable[[], None] | None:
        """What another process calls before it works on a build; None: nothing."""
        return partial(use_again, tuple(self.plugins)) if self.plugins else None

    def given(self) -> dict[str, Any]:
        """All options; about formats and plugins only what is given, so that identities of others stay."""
        return {name: value for name, value in asdict(self).items() if name not in _OF_FORMATS} | self.of_formats

    @property
    def read(self) -> ReadOptions:
        """Those that say what is taken from a document's record."""
        defaults = ReadOptions()
        key, member = self.text_key or defaults.text_key, self.text_member or defaults.text_member
        groups = self.split.keys if self.split else ()
        return ReadOptions(
            key,
            member,
            self.licence_key,
            tuple(self.keep_keys),
            self.max_document_bytes,
            groups,
            self.encoding_fallback,
        )

    @property
    def files(self) -> FileChoice:
        """Those that choose among files by name and path."""
        return FileChoice(self.pattern, tuple(self.include), tuple(self.exclude))

    @property
    def limits(self) -> TextLimits:
        """Those that say which texts stay."""
        return TextLimits(
            self.min_document_bytes, self.max_line_length, self.max_mean_line_length, self.min_alphanumeric
        )

    @property
    def licences(self) -> LicenceChoice:
        """Those that say which licences stay."""
        return LicenceChoice(tuple(self.keep_licences), tuple(self.drop_licences))

    @property
    def wants_records(self) -> bool:
        """Whether an option names a member of JSON records, which are then told by what files hold."""
        return bool(self.text_key or self.licence_key or self.keep_keys or (self.split and self.split.key))


DEFAULT_BUILD_OPTIONS = BuildOptions()

"""Build a corpus of real code, by default from a Python standard library, split by package.

Files of one package quote and copy each other, so a split by file would leak held-out text into training.
"""

import fnmatch
import hashlib
import importlib.metadata
import json
import os
import platform
import sysconfig
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ebft_mega.data.text.bounded_reading import read_at_most
from ebft_mega.data.text.listing import OTHER_NAMES, list_files
from ebft_mega.data.text.text_files import MAX_DOCUMENT_BYTES
from ebft_mega.errors import InputError, Problem
from ebft_mega.io.contained_files import leaves, read_contained, read_contained_json
from ebft_mega.io.input_errors import bad_input
from ebft_mega.io.output_directory import new_directory
from ebft_mega.io.parse_boundary import reading
from ebft_mega.io.progress_bar import track

CORPUS_MANIFEST_NAME = "corpus.json"
UNKNOWN_LICENCE = "unknown"
LICENCE = "PSF-2.0"
LICENCE_FILE_NAME = "LICENSE.txt"
_LICENCE_BYTES = 1 << 20
MIN_FILE_BYTES = 64
SPLIT_SHARES = {"train": 0.84, "tuning": 0.06, "validation": 0.10}

# Installed software is under other licences; tests repeat the code that they test; the rest is generated
# tables.
LEFT_OUT_DIRECTORIES = ("site-packages", "dist-packages", "__pycache__", "lib-dynload", "config-*")
LEFT_OUT_TABLES = ("encodings", "pydoc_data", "_sysconfigdata*.py")
LEFT_OUT_TESTS = ("test", "tests", "idle_test")

# Packages that hold near-copies of one another count as one.
_FAMILIES = (
    ("asyncore", "asynchat"),
    ("aifc", "chunk", "imghdr", "sndhdr", "sunau", "wave"),
    ("_collections_abc", "collections"),
    ("_pydecimal", "decimal"),
    ("_pyio", "io"),
    ("_threading_local", "threading"),
    ("_weakrefset", "weakref"),
    ("_bootsubprocess", "subprocess"),
    ("cProfile", "profile", "pstats"),
    ("cgitb", "cgi"),
    ("genericpath", "nturl2path", "ntpath", "posixpath"),
    ("imp", "importlib", "zipimport"),
    ("lib2to3", "token", "tokenize"),
    ("re", "sre_compile", "sre_constants", "sre_parse"),
)
FAMILY_OF = {member: family[-1] for family in _FAMILIES for member in family}


@dataclass(frozen=True)
class CorpusKind:
    """Which files of a folder make a corpus, and what a package is there."""

    pattern: str = "*.py"  # shell pattern of the names of its files
    left_out: tuple[str, ...] = LEFT_OUT_DIRECTORIES + LEFT_OUT_TABLES + LEFT_OUT_TESTS  # of files and folders
    licence: str = LICENCE
    package_folders: int = 1  # a package is what lies in so many first folders of its path; a file above is one
    families: bool = True  # whether packages of `FAMILY_OF` count as one
    source: str = f"{platform.python_implementation()} {platform.python_version()} standard library"
    # Marks texts that are nearly the same as one before them, which are left out; None leaves them.
    near_copies: Callable[[Sequence[bytes]], Sequence[bool]] | None = None

    def package_of(self, path: str) -> str:
        """Package that a file belongs to.

        Args:
            path: relative to the source, with forward slashes.
        """
        *folders, name = path.split("/")
        first = "/".join(folders[: self.package_folders]) or name.removesuffix(Path(self.pattern).suffix)
        return FAMILY_OF.get(first, first) if self.families else first


STANDARD_LIBRARY = CorpusKind()


@dataclass(frozen=True)
class CorpusFile:
    """One file of the corpus; `path` is relative to the source, and to the split's folder in the corpus."""

    path: str
    sha256: str
    bytes: int
    package: str
    split: str


def standard_library() -> Path:
    """The standard library of the running interpreter (a virtual environment's base interpreter)."""
    return Path(sysconfig.get_path("stdlib"))


def installed_folder(path: str) -> Path:
    """A folder of an installed package, below the site-packages of the running interpreter.

    Args:
        path: relative, such as `torch/include`.

    Raises:
        InputError: there is no such folder there.
    """
    for scheme in ("platlib", "purelib"):
        base = Path(sysconfig.get_path(scheme))
        if not leaves(base, base / path) and (base / path).is_dir():
            return base / path
    raise bad_input("--installed", path, "no such folder of an installed package", "one below site-packages")


def installed_name(path: str) -> str:
    """What a corpus of an installed folder says it was made from: package, version and folder."""
    package = path.strip("/").partition("/")[0]
    try:
        return f"{package} {importlib.metadata.version(package)}, {path}"
    except importlib.metadata.PackageNotFoundError:
        return path


def build_corpus(
    source: Path,
    output: Path,
    *,
    kind: CorpusKind = STANDARD_LIBRARY,
    seed: int = 0,
    include_tests: bool = False,
    max_bytes: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Copy a folder's files of code into `train`, `tuning` and `validation` below `output`.

    Exact duplicates, files that are not UTF-8 and files under 64 bytes are left out and counted.

    Args:
        source: the standard library, or another folder.
        output: the directory to make.
        kind: which of its files are taken, and what a package is.
        seed: chooses which packages go into which split.
        include_tests: keep test folders, more than half of the library.
        max_bytes: stop at about this many bytes of text, for small corpora; files are chosen by a hash of
            their path.
        overwrite: replace an existing corpus.

    Returns:
        The manifest that was written to `corpus.json`.

    Raises:
        InputError: the source has too few packages to split, or the output may not be written.
    """
    if include_tests:
        kind = replace(kind, left_out=tuple(each for each in kind.left_out if each not in LEFT_OUT_TESTS))
    contents, counts, followed = _read_files(source, kind)
    chosen = _choose_files(contents, max_bytes)
    counts |= {"beyond_max_bytes": len(contents) - len(chosen)} if max_bytes is not None else {}
    packages = _package_sizes(chosen, kind)
    if len(packages) < len(SPLIT_SHARES):
        found, expected = f"{len(packages)} packages", f"at least {len(SPLIT_SHARES)} packages"
        what = "standard library" if kind.families else f"folder with files of {kind.pattern}"
        raise bad_input(str(source), what, found, expected)
    split_of_package = assign_splits(packages, seed)
    with new_directory(output, CORPUS_MANIFEST_NAME, overwrite) as directory:
        files = []
        for path, content in chosen.items():
            package = kind.package_of(path)
            split = split_of_package[package]
            target = directory / split / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            files.append(CorpusFile(path, hashlib.sha256(content).hexdigest(), len(content), package, split))
        licence_file = _copy_licence(source, directory, of_python=kind.families)
        manifest = _manifest(files, counts, followed, kind, seed, licence_file)
        text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
        (directory / CORPUS_MANIFEST_NAME).write_text(text, encoding="utf-8")
    return manifest


def package_of(path: str) -> str:
    """Package that a file of the library belongs to: its top-level folder or module, or the family of that.

    Args:
        path: relative to the library, with forward slashes.
    """
    return STANDARD_LIBRARY.package_of(path)


def assign_splits(package_bytes: dict[str, int], seed: int) -> dict[str, str]:
    """Give every package to one split, so that sizes come close to `SPLIT_SHARES`.

    Packages are taken in the order of a hash of seed and name. Each goes to the split that is least full in
    proportion to its share, the package included. A package that is large compared with the held-out shares
    therefore goes to the training split.

    Args:
        package_bytes: bytes of each package.
        seed: part of the hash.

    Returns:
        The split of each package.
    """
    order = sorted(package_bytes, key=lambda name: hashlib.sha256(os.fsencode(f"{seed}\0{name}")).digest())
    filled = dict.fromkeys(SPLIT_SHARES, 0)
    splits = {}
    for package in order:
        size = package_bytes[package]
        split = min(SPLIT_SHARES, key=lambda name: (filled[name] + size) / SPLIT_SHARES[name])
        splits[package] = split
        filled[split] += size
    return splits


def _read_files(source: Path, kind: CorpusKind) -> tuple[dict[str, bytes], dict[str, int], dict[str, int]]:
    """Contents of the files to use, by sorted relative path, what is left out, by reason, and links that are followed.

    Raises:
        InputError: with every folder and file that cannot be read.
    """
    listing = list_files(source, kind.pattern)
    paths = [file.relative_to(source).as_posix() for file in listing.files]
    chosen = [path for path in paths if not _is_left_out(path, kind.left_out)]
    counts = {"duplicate": 0, "not_utf8": 0, "tiny": 0, "left_out_by_name": len(paths) - len(chosen)}
    counts |= {reason: count for reason, count in listing.left_out.items() if reason != OTHER_NAMES}
    contents: dict[str, bytes] = {}
    seen = set()
    problems = list(listing.unreadable)
    for path in track(chosen, len(chosen), "reading files of code"):
        try:
            content = read_at_most(source / path, MAX_DOCUMENT_BYTES)
        except OSError as error:
            problems.append(Problem(str(source / path), "--source", str(error.strerror), "a file that can be read"))
            continue
        if content is None:
            counts["too_long"] = counts.get("too_long", 0) + 1
            continue
        digest = hashlib.sha256(content).digest()
        if len(content) < MIN_FILE_BYTES:
            counts["tiny"] += 1
        elif digest in seen:
            counts["duplicate"] += 1
        elif not _is_utf8(content):
            counts["not_utf8"] += 1
        else:
            contents[path] = content
        seen.add(digest)
    if problems:
        raise InputError(problems)
    if kind.near_copies is not None:
        near = dict(zip(contents, kind.near_copies(list(contents.values())), strict=True))
        counts["near_copies"] = sum(map(int, near.values()))
        contents = {path: content for path, content in contents.items() if not near[path]}
    return contents, counts, dict(listing.followed)


def _is_left_out(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(part, pattern) for part in path.split("/") for pattern in patterns)


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _choose_files(contents: dict[str, bytes], max_bytes: int | None) -> dict[str, bytes]:
    if max_bytes is None:
        return contents
    chosen, total = set(), 0
    for path in sorted(contents, key=lambda path: hashlib.sha256(os.fsencode(path)).digest()):
        if total + len(contents[path]) <= max_bytes:
            chosen.add(path)
            total += len(contents[path])
    return {path: content for path, content in contents.items() if path in chosen}


def _package_sizes(contents: dict[str, bytes], kind: CorpusKind) -> dict[str, int]:
    sizes: defaultdict[str, int] = defaultdict(int)
    for path, content in contents.items():
        sizes[kind.package_of(path)] += len(content)
    return dict(sizes)


def _copy_licence(source: Path, directory: Path, of_python: bool) -> str | None:
    """Copy the licence of the source beside the corpus; Debian keeps that of Python with the documentation.

    Raises:
        InputError: it is no text, or a link that leaves the library.
    """
    version = platform.python_version_tuple()
    documentation = Path(sysconfig.get_path("data"), "share", "doc")
    places = ((source, LICENCE_FILE_NAME), (documentation, f"python{version[0]}.{version[1]}/copyright"))
    for place, name in places if of_python else places[:1]:
        if (place / name).is_file():
            content = read_contained(place, name, _LICENCE_BYTES, "a licence")
            with reading(place / name, name, "a licence in UTF-8"):
                content.decode("utf-8")
            (directory / LICENCE_FILE_NAME).write_bytes(content)
            return LICENCE_FILE_NAME
    return None


def _manifest(
    files: list[CorpusFile],
    counts: dict[str, int],
    followed: dict[str, int],
    kind: CorpusKind,
    seed: int,
    licence_file: str | None,
) -> dict[str, Any]:
    splits = {}
    for split in SPLIT_SHARES:
        members = [file for file in files if file.split == split]
        splits[split] = {
            "files": len(members),
            "bytes": sum(file.bytes for file in members),
            "packages": sorted({file.package for file in members}),
        }
    return {
        "format": "ebft_mega.corpus",
        "version": 1,
        "source": kind.source,
        "licence": kind.licence,
        "licence_file": licence_file,
        "seed": seed,
        "left_out_files": counts,
        "followed": followed,
        "left_out_patterns": sorted(kind.left_out),
        "splits": splits,
        "files": [asdict(file) for file in files],
    }


def corpus_licence(source: Path) -> str:
    """Licence of documents that name none: from the corpus manifest in or above a source, else "unknown"."""
    for directory in (source, source.absolute().parent):
        if (directory / CORPUS_MANIFEST_NAME).is_file():
            manifest = read_contained_json(directory, CORPUS_MANIFEST_NAME, "a corpus manifest")
            return str(manifest.get("licence", UNKNOWN_LICENCE))
    return UNKNOWN_LICENCE

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebft_mega.data.text.corpus import (
    SPLIT_SHARES,
    CorpusKind,
    assign_splits,
    build_corpus,
    installed_folder,
    installed_name,
    package_of,
    standard_library,
)
from ebft_mega.errors import InputError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("corpus") / "corpus"
    build_corpus(standard_library(), output)
    return output


@pytest.fixture(scope="module")
def manifest(corpus: Path) -> dict[str, Any]:
    return json.loads((corpus / "corpus.json").read_text())


def test_manifest_describes_every_file(corpus: Path, manifest: dict[str, Any]) -> None:
    on_disk = {path.relative_to(corpus).as_posix() for path in corpus.rglob("*.py")}
    assert on_disk == {f"{file['split']}/{file['path']}" for file in manifest["files"]}
    for file in manifest["files"]:
        content = (corpus / file["split"] / file["path"]).read_bytes()
        assert content == (standard_library() / file["path"]).read_bytes()
        assert file["bytes"] == len(content) >= 64
        assert file["sha256"] == hashlib.sha256(content).hexdigest()
        content.decode("utf-8")
    assert len({file["sha256"] for file in manifest["files"]}) == len(manifest["files"])
    assert manifest["licence"] == "PSF-2.0"
    assert manifest["licence_file"] is None or (corpus / manifest["licence_file"]).is_file()


def test_no_package_is_in_two_splits(manifest: dict[str, Any]) -> None:
    splits_of_package: dict[str, set[str]] = {}
    for file in manifest["files"]:
        splits_of_package.setdefault(package_of(file["path"]), set()).add(file["split"])
        assert file["package"] == package_of(file["path"])
    assert all(len(splits) == 1 for splits in splits_of_package.values())
    assert splits_of_package["tokenize"] == splits_of_package[package_of("lib2to3/pgen2/tokenize.py")]


def test_splits_are_near_their_shares_and_hold_many_packages(manifest: dict[str, Any]) -> None:
    total = sum(split["bytes"] for split in manifest["splits"].values())
    assert total > 3_000_000
    for name, share in SPLIT_SHARES.items():
        split = manifest["splits"][name]
        assert abs(split["bytes"] / total - share) < 0.03
        assert len(split["packages"]) >= 10


def test_tests_tables_and_installed_packages_are_left_out(manifest: dict[str, Any]) -> None:
    parts = {part for file in manifest["files"] for part in file["path"].split("/")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "encodings", "__pycache__"}
    assert {"argparse.py", "asyncio", "email"} <= parts


def small_library(directory: Path) -> Path:
    for number in range(12):
        package = directory / f"package{number}"
        package.mkdir(parents=True)
        (package / "code.py").write_text(f"value = {number}\n" * 30)
        (package / "copy.py").write_text(f"value = {number % 6}\n" * 30)
    (directory / "tiny.py").write_text("x = 1\n")
    (directory / "latin.py").write_bytes(b"# \xe9" * 40)
    (directory / "notes.txt").write_text("text" * 40)
    (directory / "test").mkdir()
    (directory / "test" / "test_it.py").write_text("def test_it(): pass\n" * 10)
    (directory / "LICENSE.txt").write_text("licence")
    return directory


def test_left_out_files_are_counted(tmp_path: Path) -> None:
    library = small_library(tmp_path / "library")
    (library / "linked.py").symlink_to("package0/code.py")
    (library / "folder").symlink_to("package0")
    (tmp_path / "secret.py").write_text("secret = 1\n" * 30)
    (library / "outside.py").symlink_to("../secret.py")
    manifest = build_corpus(library, tmp_path / "out", max_bytes=100_000)
    assert manifest["left_out_files"] == {
        **{"duplicate": 12, "not_utf8": 1, "tiny": 1, "left_out_by_name": 1, "beyond_max_bytes": 0},
        **{"links to folders": 1, "links to files that are read anyway": 1, "links that leave the input": 1},
    }
    assert manifest["followed"] == {}
    assert len(manifest["files"]) == 12
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "licence"
    with_tests = build_corpus(tmp_path / "library", tmp_path / "more", include_tests=True)
    assert len(with_tests["files"]) == 13


def test_a_licence_elsewhere_is_not_copied(tmp_path: Path) -> None:
    library = small_library(tmp_path / "library")
    (tmp_path / "secret").write_text("a secret")
    (library / "LICENSE.txt").unlink()
    (library / "LICENSE.txt").symlink_to("../secret")
    with pytest.raises(InputError, match=r"LICENSE\.txt: found a link to .*secret, which is outside"):
        build_corpus(library, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_same_seed_gives_the_same_corpus(tmp_path: Path) -> None:
    library = small_library(tmp_path / "library")
    first = build_corpus(library, tmp_path / "first", seed=1)
    assert build_corpus(library, tmp_path / "second", seed=1) == first
    assert (tmp_path / "first/corpus.json").read_bytes() == (tmp_path / "second/corpus.json").read_bytes()
    others = [build_corpus(library, tmp_path / f"seed{seed}", seed=seed)["splits"] for seed in range(2, 6)]
    assert any(splits != first["splits"] for splits in others)


def test_max_bytes_limits_the_corpus(tmp_path: Path) -> None:
    manifest = build_corpus(small_library(tmp_path / "library"), tmp_path / "out", max_bytes=2000)
    assert 1500 < sum(file["bytes"] for file in manifest["files"]) <= 2000


def test_a_library_that_cannot_be_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="packages"):
        build_corpus(tmp_path, tmp_path / "out")


@given(
    st.dictionaries(st.text(min_size=1, max_size=5), st.integers(1, 100), min_size=60, max_size=90),
    st.integers(),
)
def test_many_small_packages_fill_the_shares(sizes: dict[str, int], seed: int) -> None:
    splits = assign_splits(sizes, seed)
    assert splits.keys() == sizes.keys()
    assert splits == assign_splits(dict(reversed(sizes.items())), seed)
    for name, share in SPLIT_SHARES.items():
        filled = sum(size for package, size in sizes.items() if splits[package] == name)
        assert abs(filled - share * sum(sizes.values())) <= 200


def other_code(directory: Path) -> Path:
    same = "".join(f"int same_{line}();\n" for line in range(60))
    for number in range(8):
        folder = directory / "a" / f"p{number}" / "deep"
        folder.mkdir(parents=True)
        (folder / "code.h").write_text(f"int value_{number}();\n" * 30)
        (folder.parent / "near.h").write_text(same + f"// {number}\n")
        (folder / "notes.py").write_text("x = 1\n" * 30)
    (directory / "io.h").write_text("int top;\n" * 30)
    (directory / "a" / "old").mkdir()
    (directory / "a" / "old" / "code.h").write_text("int old;\n" * 30)
    return directory


def test_other_code_is_divided_by_folders_and_near_copies_are_left_out_before(tmp_path: Path) -> None:
    def near_copies(texts: Sequence[bytes]) -> list[bool]:
        return [b"same_" in text and any(b"same_" in other for other in texts[:n]) for n, text in enumerate(texts)]

    kind = CorpusKind("*.h", ("old",), "MIT", 2, families=False, source="other", near_copies=near_copies)
    manifest = build_corpus(other_code(tmp_path / "code"), tmp_path / "out", kind=kind)
    packages = {file["path"]: file["package"] for file in manifest["files"]}
    assert packages == {
        **{f"a/p{number}/deep/code.h": f"a/p{number}" for number in range(8)},
        **{"a/p0/near.h": "a/p0", "io.h": "io"},
    }
    assert manifest["left_out_files"]["near_copies"] == 7 and manifest["left_out_files"]["left_out_by_name"] == 1
    assert (manifest["licence"], manifest["source"], manifest["licence_file"]) == ("MIT", "other", None)
    split_of = {file["package"]: file["split"] for file in manifest["files"]}
    assert all(split_of[file["package"]] == file["split"] for file in manifest["files"])
    assert all((tmp_path / "out" / file["split"] / file["path"]).is_file() for file in manifest["files"])


def test_a_folder_of_an_installed_package_is_found_and_nothing_else() -> None:
    assert (installed_folder("numpy/lib") / "__init__.py").is_file()
    assert installed_name("numpy/lib") == f"numpy {np.__version__}, numpy/lib"
    for path in ("no_such_package", "../..", "/"):
        with pytest.raises(InputError, match="--installed: .*no such folder of an installed package"):
            installed_folder(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--exclude", "old"], "--exclude: found without --pattern"),
        (["--installed", "numpy"], "--installed: found without --pattern"),
        (["--installed", "numpy", "--source", "x", "--pattern", "*.h"], "--installed: found with --source"),
        (["--package-folders", "0"], "--package-folders: found '0'; expected a whole number from 1"),
    ],
)
def test_options_that_do_not_fit_are_named(
    tmp_path: Path, arguments: list[str], message: str, tool: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        tool("--output", tmp_path / "out", *arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_tool_builds_from_other_code(
    tmp_path: Path, tool: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--pattern", "*.h", "--package-folders", 2, "--exclude", "old", "--near-deduplicate", 0.8)
    tool("--source", other_code(tmp_path / "code"), *arguments, "--output", tmp_path / "out")
    assert "7 near_copies; licence unknown" in capsys.readouterr().out


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run the tool in this process."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[4] / "tools"))
    from build_corpus import main

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["build_corpus.py", *map(str, arguments)])
        main()

    return run

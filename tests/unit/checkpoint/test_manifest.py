"""A manifest says exactly which files make up a checkpoint; whatever differs from it is found before it is used."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebft_mega.checkpoint.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    file_problems,
    read_listed,
    read_manifest,
    share_of_files,
    unlisted_files,
    write_file,
    write_manifest,
)
from ebft_mega.checkpoint.saved_run import read_run
from ebft_mega.errors import BrokenCheckpointError, InputError, InputProblems
from tests.unit.checkpoint.folder_stand_ins import write_checkpoint

WEIGHTS = "weights/rank-00000.safetensors"
A_RECORD = {"bytes": 1, "sha256": "a" * 64}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoints", 20)


def rewrite(folder: Path, change) -> None:
    """Change the manifest as plain JSON."""
    fields = json.loads((folder / MANIFEST_NAME).read_text())
    change(fields)
    (folder / MANIFEST_NAME).write_text(json.dumps(fields))


def problems_of(folder: Path) -> list:
    """Everything that a reader finds wrong with a folder."""
    try:
        manifest = read_manifest(folder)
        found = file_problems(folder, manifest, manifest.files)
        if not found:
            read_run(folder)
    except InputProblems as error:
        return list(error.problems)
    return found


def test_a_manifest_survives_being_written(folder: Path) -> None:
    manifest = read_manifest(folder)
    text = (folder / MANIFEST_NAME).read_bytes()
    assert write_manifest(folder, manifest) == FileRecord(bytes=len(text), sha256=hashlib.sha256(text).hexdigest())
    assert (folder / MANIFEST_NAME).read_bytes() == text
    assert set(manifest.files) == {"state.json", "config.resolved.yaml", "config.json", WEIGHTS}
    assert problems_of(folder) == []
    assert unlisted_files(folder, manifest) == []


def test_a_manifest_that_ends_early_is_broken_and_named_with_its_place(folder: Path) -> None:
    text = (folder / MANIFEST_NAME).read_bytes()
    for length in range(0, len(text) - 1, 3):  # the last byte ends the last line
        (folder / MANIFEST_NAME).write_bytes(text[:length])
        with pytest.raises(BrokenCheckpointError) as caught:
            read_manifest(folder)
        (problem,) = caught.value.problems
        last_line = text[:length].count(b"\n") + 1
        assert problem.where == f"{folder / MANIFEST_NAME}:{last_line}"
        assert "(column " in problem.found


@pytest.mark.parametrize("stride", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_a_changed_bit_in_any_byte_of_any_file_is_found(folder: Path, stride: int) -> None:
    names = [MANIFEST_NAME, *read_manifest(folder).files]
    for name in names:
        path = folder / name
        content = path.read_bytes()
        for place in range(0, len(content) - (name == MANIFEST_NAME), stride):
            damaged = bytearray(content)
            damaged[place] ^= 1 << (place % 8)
            path.write_bytes(damaged)
            assert problems_of(folder), f"byte {place} of {name}: {content[place : place + 1]!r}"
            if name not in (MANIFEST_NAME, WEIGHTS) and place % 10 == 0:
                with pytest.raises(BrokenCheckpointError, match=name):  # and this without the other
                    read_run(folder)
        path.write_bytes(content)
    assert problems_of(folder) == []


def test_each_kind_of_damage_is_named_with_what_was_found_and_expected(folder: Path) -> None:
    manifest, content = read_manifest(folder), (folder / WEIGHTS).read_bytes()
    expected = {
        "missing": ("no such file", f"a file of {len(content)} bytes"),
        "cut off": (f"{len(content) - 1} bytes", f"{len(content)} bytes"),
        "longer": (f"{len(content) + 1} bytes", f"{len(content)} bytes"),
        "other": (f"sha256 {hashlib.sha256(b'WEIGHTS').hexdigest()}", f"sha256 {hashlib.sha256(content).hexdigest()}"),
    }
    damages = {"cut off": content[:-1], "longer": content + b"x", "other": b"WEIGHTS"}
    for kind, words in expected.items():
        (folder / WEIGHTS).unlink()
        if kind in damages:
            (folder / WEIGHTS).write_bytes(damages[kind])
        (problem,) = file_problems(folder, manifest, manifest.files)
        assert (problem.where, problem.key) == (str(folder / WEIGHTS), WEIGHTS)
        assert (problem.found, problem.expected) == words
        with pytest.raises(BrokenCheckpointError) as caught:
            read_listed(folder, manifest, WEIGHTS)
        assert caught.value.problems == (problem,)
        (folder / WEIGHTS).write_bytes(content)
    assert file_problems(folder, manifest, ["state.json"]) == []
    assert read_listed(folder, manifest, WEIGHTS) == content


def test_a_file_that_is_not_listed_is_none_of_the_checkpoint(folder: Path) -> None:
    manifest = read_manifest(folder)
    with pytest.raises(BrokenCheckpointError, match=r"no optimizer\.pt"):
        read_listed(folder, manifest, "optimizer.pt")


@pytest.mark.parametrize(
    "name",
    [
        *("../state.json", "/etc/passwd", "weights/../../x", "./state.json", "weights//x", "weights/", "", ".", ".."),
        *("a\\b", "a\nb", "a\0b", "\ud800", MANIFEST_NAME),
    ],
)
def test_a_manifest_with_a_file_outside_or_of_no_plain_name_is_refused(folder: Path, name: str) -> None:
    rewrite(folder, lambda fields: fields["files"].update({name: A_RECORD}))
    with pytest.raises(BrokenCheckpointError):
        read_manifest(folder)


@pytest.mark.parametrize("name", [WEIGHTS, "weights", "config.json", MANIFEST_NAME])
def test_no_link_is_followed_out_of_the_folder(folder: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    assert [problem.found for problem in problems_of(folder)][0] == "a link out of the checkpoint folder"


def test_a_folder_that_is_reached_through_a_link_is_as_good_as_any(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "best").symlink_to(folder)
    assert problems_of(tmp_path / "best") == []


def test_links_in_a_circle_and_pipes_are_problems_and_stop_nobody(folder: Path) -> None:
    manifest = read_manifest(folder)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("rank-00000.safetensors")
    assert len(problems_of(folder)) == 1
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    empty = manifest.model_copy(update={"files": {WEIGHTS: FileRecord(bytes=0, sha256="a" * 64)}})
    (problem,) = file_problems(folder, empty, [WEIGHTS])
    assert problem.found == "no plain file"
    (folder / MANIFEST_NAME).unlink()
    os.mkfifo(folder / MANIFEST_NAME)
    with pytest.raises(BrokenCheckpointError, match="no plain file"):
        read_manifest(folder)


def test_foreign_files_are_named_and_change_nothing(folder: Path, tmp_path: Path) -> None:
    manifest = read_manifest(folder)
    (folder / "weights" / "planted.pt").write_bytes(b"cos\nsystem\n(S'touch planted'\ntR.")
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("a note")
    (folder / "elsewhere").symlink_to(tmp_path)
    assert unlisted_files(folder, manifest) == ["elsewhere", "notes/mine.txt", "weights/planted.pt"]
    assert problems_of(folder) == []


def test_a_missing_manifest_is_a_broken_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(BrokenCheckpointError) as caught:
        read_manifest(tmp_path / "nowhere")
    (problem,) = caught.value.problems
    assert (problem.where, problem.found) == (str(tmp_path / "nowhere" / MANIFEST_NAME), "no such file")


@pytest.mark.parametrize(
    ("text", "key", "found"),
    [
        ('{"version": 1, "step": 1, "step": 2, "files": {}}', "(text)", "'step' more than once"),
        ('{"version": 1, "step": 1, "files": {"a": {}, "a": {}}}', "(text)", "'a' more than once"),
        ('{"version": 1, "step": NaN, "files": {}}', "(text)", "NaN"),
        ('{"version": 1, "step": 9223372036854775808, "files": {}}', "step", "9223372036854775808"),
        ('{"version": 1, "step": -1, "files": {}}', "step", "-1"),
        ('{"version": 1, "step": 1.0, "files": {}}', "step", "1.0"),
        ('{"version": 1, "step": true, "files": {}}', "step", "True"),
        ('{"version": 1, "step": ' + "9" * 5000 + ', "files": {}}', "(text)", "5000 digits"),
        ("[" * 100_000, "(text)", "nested too deeply"),
        ('{"version": 0, "step": 1, "files": {}}', "version", "0"),
        ('{"version": 1, "step": 1, "files": {}, "code": "x"}', "code", "'x'"),
        ('{"version": 1, "step": 1, "files": {"a": {"bytes": 1, "sha256": "A"}}}', "files.a.sha256", "'A'"),
        ("[]", "(text)", "[]"),
        ("\ufeff{}", "(text)", "BOM"),
    ],
)
def test_whatever_is_no_manifest_is_a_broken_checkpoint(tmp_path: Path, text: str, key: str, found: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(BrokenCheckpointError) as caught:
        read_manifest(tmp_path)
    problem = caught.value.problems[0]
    assert (problem.key, found in problem.found) == (key, True), str(problem)
    assert problem.where.startswith(str(tmp_path / MANIFEST_NAME))


def test_bytes_that_are_no_text_are_a_broken_checkpoint(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes('{"version": 1, "step": 1, "files": {}}'.encode("utf-16"))
    with pytest.raises(BrokenCheckpointError, match="byte 0, which is not UTF-8"):
        read_manifest(tmp_path)


def test_a_newer_version_is_named_as_such_and_is_not_broken(folder: Path) -> None:
    rewrite(folder, lambda fields: fields.update(version=2, layout="flat"))
    with pytest.raises(InputError, match="newer version") as caught:
        read_manifest(folder)
    assert not isinstance(caught.value, BrokenCheckpointError)


SIZES = st.dictionaries(st.text("abc/", min_size=1, max_size=4), st.integers(0, 1000), max_size=30)


@given(SIZES, st.integers(1, 9))
def test_every_file_falls_to_one_rank_and_the_bytes_are_balanced(sizes: dict[str, int], ranks: int) -> None:
    files = {name: FileRecord(bytes=size, sha256="a" * 64) for name, size in sizes.items()}
    manifest = Manifest.model_construct(version=1, step=0, files=files)
    shares = [share_of_files(manifest, rank, ranks) for rank in range(ranks)]
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)
    backwards = Manifest.model_construct(version=1, step=0, files=dict(reversed(files.items())))
    assert [share_of_files(backwards, rank, ranks) for rank in range(ranks)] == shares


def test_one_large_file_is_weighed_against_many_small_ones() -> None:
    sizes = {"large": 100, **{f"small{number}": 10 for number in range(10)}}
    files = {name: FileRecord(bytes=size, sha256="a" * 64) for name, size in sizes.items()}
    manifest = Manifest(version=1, step=0, files=files)
    assert [len(share_of_files(manifest, rank, 2)) for rank in range(2)] == [1, 10]


def test_a_file_that_cannot_be_written_leaves_the_old_one(folder: Path, monkeypatch) -> None:
    before = (folder / "state.json").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_file(folder, "state.json", b"new")
    assert (folder / "state.json").read_bytes() == before
    assert unlisted_files(folder, read_manifest(folder)) == []


def test_files_are_synced_before_they_have_their_name_and_the_name_after(tmp_path: Path, monkeypatch) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def traced_sync(descriptor: int) -> None:
        done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).relative_to(tmp_path)}")
        sync(descriptor)

    def traced_replace(old, new) -> None:
        done.append(f"rename to {Path(new).relative_to(tmp_path)}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", traced_sync)
    monkeypatch.setattr(os, "replace", traced_replace)
    record = write_file(tmp_path, "weights/x", b"abc")
    assert done == ["sync weights/.x.tmp", "rename to weights/x", "sync weights"]
    assert record == FileRecord(bytes=3, sha256=hashlib.sha256(b"abc").hexdigest())

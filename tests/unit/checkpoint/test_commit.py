"""A checkpoint is committed by one rename; a kill at any moment leaves the last committed one to be found."""

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebft_mega.checkpoint.commit import (
    LATEST,
    complete_folders,
    discard,
    folder_name,
    leftovers,
    newest,
    point_latest,
    pointed_at,
    publish,
    remove_leftovers,
    restore_replaced,
    set_aside,
    step_of,
    temporary_folder,
)
from ebft_mega.checkpoint.manifest import MANIFEST_NAME, file_problems, read_manifest
from ebft_mega.checkpoint.retention import delete_expired
from ebft_mega.errors import BrokenCheckpointError
from tests.unit.checkpoint.folder_stand_ins import fill, run_config, run_state, write_checkpoint


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


def names(root: Path) -> list[str]:
    return sorted(os.listdir(root))


@given(st.integers(0, 10**17))
def test_a_name_says_its_step(step: int) -> None:
    assert step_of(folder_name(step)) == step


@pytest.mark.parametrize(
    "name",
    [
        *("step-1", "step-0000001", "step-000000001", "step-00000001.tmp", "step-00000001.abandoned", "Step-00000001"),
        *("step-00000001\n", " step-00000001", "step-٠٠٠٠٠٠٠١", "step--0000001", "latest", "", "step-" + "9" * 5000),
    ],
)
def test_no_other_name_is_one_of_a_checkpoint(name: str) -> None:
    assert step_of(name) is None


def test_only_real_folders_of_exact_names_are_listed_newest_first(root: Path, tmp_path: Path) -> None:
    assert complete_folders(root) == []
    for name in ("step-00000005", "step-00000010", "step-100000000", "step-00000020.tmp", "step-7", "other"):
        (root / name).mkdir(parents=True)
    (root / "step-00000030").write_text("a file")
    (root / "step-00000040").symlink_to(root / "step-00000005")
    expected = ["step-100000000", "step-00000010", "step-00000005"]
    assert [folder.name for folder in complete_folders(root)] == expected
    assert complete_folders(root / "step-00000030") == []


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(root: Path, monkeypatch) -> None:
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError):
        complete_folders(root)


def test_a_folder_that_vanishes_between_listing_and_looking_is_passed_over(root: Path, monkeypatch) -> None:
    class Gone:
        name = "step-00000009"

        def is_dir(self, follow_symlinks: bool) -> bool:
            raise OSError(116, "Stale file handle")

    write_checkpoint(root, 5)
    with os.scandir(root) as found:
        entries = [*found, Gone()]
    monkeypatch.setattr("ebft_mega.checkpoint.commit._entries", lambda path: entries)
    assert [folder.name for folder in complete_folders(root)] == ["step-00000005"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"step-00000005\n", "step-00000005"),
        (b"step-00000005", "step-00000005"),
        (b"step-00000007\n", "step-00000010"),  # not there
        (b"../../etc", "step-00000010"),
        (b"step-00000005.tmp", "step-00000010"),
        (b"", "step-00000010"),
        (b"\xff\xfe", "step-00000010"),
        (b"step-00000005" + b" " * 10**6 + b"x", "step-00000005"),  # no more of it is read than a name can have
        (None, "step-00000010"),
    ],
)
def test_newest_is_what_latest_says_if_it_is_there(root: Path, content: bytes | None, expected: str) -> None:
    assert newest(root) is None
    (root / "step-00000005").mkdir(parents=True)
    (root / "step-00000010").mkdir()
    if content is not None:
        (root / LATEST).write_bytes(content)
    assert newest(root) == expected


def test_latest_is_replaced_at_once(root: Path) -> None:
    root.mkdir(parents=True)
    point_latest(root, "step-00000005")
    before = (root / LATEST).stat().st_ino
    point_latest(root, "step-00000010")
    assert (root / LATEST).read_text() == "step-00000010\n"
    assert (root / LATEST).stat().st_ino != before
    assert names(root) == [LATEST]


def test_what_is_published_has_its_name_and_everything_is_synced_before(root: Path, monkeypatch) -> None:
    done: list[str] = []
    sync, rename = os.fsync, os.rename
    temporary = temporary_folder(root, 20)
    fill(temporary, 20, run_config(root.parent), run_state(20))
    (temporary / "tokenizer.json").write_text("{}")  # copied by somebody who does not sync

    def traced_sync(descriptor: int) -> None:
        done.append(f"sync {os.readlink(f'/proc/self/fd/{descriptor}').removeprefix(str(root))}")
        sync(descriptor)

    def traced_rename(old, new, **options) -> None:
        done.append(f"rename to {Path(new).name}")
        rename(old, new, **options)

    monkeypatch.setattr(os, "fsync", traced_sync)
    monkeypatch.setattr(os, "rename", traced_rename)
    assert publish(temporary, root) == root / "step-00000020"
    before, after = done[: done.index("rename to step-00000020")], done[done.index("rename to step-00000020") + 1 :]
    for name in ("", "/manifest.json", "/tokenizer.json", "/state.json", "/weights"):
        assert f"sync /step-00000020.tmp{name}" in before
    assert f"sync {root.parent}" in before
    assert after == ["sync "]
    assert names(root) == ["step-00000020"]


@pytest.mark.parametrize("obstacle", ["folder", "file", "link"])
def test_what_has_the_name_already_is_replaced(root: Path, tmp_path: Path, obstacle: str) -> None:
    elsewhere = tmp_path / "archive"
    (elsewhere / "kept").mkdir(parents=True)
    root.mkdir(parents=True)
    final = root / "step-00000020"
    if obstacle == "folder":
        (final / "weights").mkdir(parents=True)
    elif obstacle == "file":
        final.write_text("a file")
    else:
        final.symlink_to(elsewhere)
    write_checkpoint(root, 20)
    assert names(root) == ["step-00000020"]
    assert read_manifest(final).step == 20
    assert (elsewhere / "kept").is_dir()


def test_a_rename_that_fails_gives_the_old_folder_its_name_back(root: Path) -> None:
    write_checkpoint(root, 20, weights=b"old")
    with pytest.raises(FileNotFoundError):
        publish(temporary_folder(root, 20), root)
    assert names(root) == ["step-00000020"]


class Killed(BaseException):
    """Nothing runs after it, as after a kill."""


OPERATIONS = ("rename", "replace", "unlink", "rmdir", "fsync", "mkdir")


def killed_before(number: int, action: Callable[[], None], monkeypatch) -> bool:
    """Run an action up to its operation with this number; whether it was cut off there."""
    done = itertools.count()

    def counted(operation: Callable) -> Callable:
        def run(*arguments, **options):
            if next(done) >= number:
                raise Killed
            return operation(*arguments, **options)

        return run

    with monkeypatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, counted(getattr(os, name)))
        try:
            action()
        except Killed:
            return True
    return False


def whole(folder: Path) -> bool:
    try:
        manifest = read_manifest(folder)
    except BrokenCheckpointError:
        return False
    return file_problems(folder, manifest, manifest.files) == []


def weights(folder: Path) -> bytes:
    return (folder / "weights" / "rank-00000.safetensors").read_bytes()


@pytest.mark.parametrize("in_the_way", ["nothing", "broken", "whole"])
def test_a_kill_between_any_two_operations_loses_no_checkpoint(root: Path, monkeypatch, in_the_way: str) -> None:
    temporary, prepared = temporary_folder(root, 20), root.with_name("new")
    fill(prepared, 20, run_config(root.parent), run_state(20), b"new")

    def commit() -> None:
        point_latest(root, publish(temporary, root).name)
        delete_expired(root, 1, 10)  # also between the renames of the deleted ones

    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # counted all the same, and not waited for
    for step in (5, 10, 15):
        write_checkpoint(root, step)
    point_latest(root, "step-00000015")
    if in_the_way != "nothing":
        write_checkpoint(root, 20, weights=b"old")
    if in_the_way == "broken":
        (root / "step-00000020" / MANIFEST_NAME).write_text("{")
    before = root.rename(root.with_name("before"))
    number, outcomes = 0, []
    while True:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(before, root)
        shutil.copytree(prepared, temporary)
        was_killed = killed_before(number, commit, monkeypatch)

        restore_replaced(root)
        folders = complete_folders(root)
        broken = [folder.name for folder in folders if not whole(folder)]
        assert set(broken) <= ({"step-00000020"} if in_the_way == "broken" else set())
        best = next(folder for folder in folders if whole(folder))
        assert best.name == ("step-00000015" if weights(folders[0]) == b"weights" or broken else "step-00000020")
        if in_the_way == "whole":
            assert best.name == "step-00000020"
        assert (root / "step-00000010").is_dir()
        assert newest(root) in [folder.name for folder in folders]
        outcomes.append(weights(best))

        remove_leftovers(root)
        assert leftovers(root) == [] and restore_replaced(root) == []
        assert complete_folders(root) == folders
        shutil.copytree(prepared, temporary)
        commit()  # the next run resumes, whatever the last one left
        assert [folder.name for folder in complete_folders(root)] == ["step-00000020", "step-00000010"]
        assert (weights(root / "step-00000020"), newest(root)) == (b"new", "step-00000020")
        assert leftovers(root) == []
        if not was_killed:
            break
        number += 1
    assert outcomes == sorted(outcomes, key=lambda content: content == b"new"), "once it counts, it counts for good"
    assert outcomes[0] != b"new" and outcomes[-1] == b"new" and number > 15


def test_leftovers_are_removed_and_nothing_else_is(root: Path) -> None:
    write_checkpoint(root, 10)
    kept = ["step-00000010", "step-00000010.abandoned", "mine.tmp", "step-5.tmp", "step-00000030.replaced.tmp"]
    for name in (*kept[1:], "step-00000020.tmp", "step-00000020.expired.tmp", "step-00000010.replaced.tmp"):
        (root / name / "weights").mkdir(parents=True)
    (root / ".latest.tmp").write_text("step-0")
    gone = [".latest.tmp", "step-00000010.replaced.tmp", "step-00000020.expired.tmp", "step-00000020.tmp"]
    assert remove_leftovers(root) == gone
    assert names(root) == sorted(kept)
    assert restore_replaced(root) == ["step-00000030"]
    assert remove_leftovers(root) == []


def test_a_leftover_that_cannot_be_removed_is_a_warning(root: Path, monkeypatch, caplog) -> None:
    (root / "step-00000020.tmp").mkdir(parents=True)

    def busy(path):
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(shutil, "rmtree", busy)
    assert remove_leftovers(root) == []
    assert "step-00000020.tmp could not be removed: Directory not empty" in caplog.text


def test_a_link_is_removed_and_what_it_points_to_stays(root: Path, tmp_path: Path) -> None:
    (tmp_path / "archive").mkdir()
    root.mkdir(parents=True)
    (root / "step-00000020.tmp").symlink_to(tmp_path / "archive")
    assert remove_leftovers(root) == ["step-00000020.tmp"]
    assert discard(root / "step-00000020.tmp") == []
    assert (tmp_path / "archive").is_dir()


def test_what_is_set_aside_keeps_its_files_and_latest_names_what_is_left(root: Path) -> None:
    for step in (5, 10, 15):
        write_checkpoint(root, step, weights=str(step).encode())
    point_latest(root, "step-00000015")
    assert set_aside(root, [15, 10, 12]) == ["step-00000010.abandoned", "step-00000015.abandoned"]
    assert newest(root) == pointed_at(root) == "step-00000005"
    write_checkpoint(root, 10, weights=b"again")
    assert set_aside(root, [10, 5], "broken") == ["step-00000005.broken", "step-00000010.broken"]
    assert pointed_at(root) is None
    write_checkpoint(root, 10)
    assert set_aside(root, [10]) == ["step-00000010.abandoned-2"]
    assert weights(root / "step-00000015.abandoned") == b"15" and whole(root / "step-00000015.abandoned")
    assert complete_folders(root) == [] and leftovers(root) == []
    assert set_aside(root / "nowhere", [3]) == []


def test_what_cannot_be_set_aside_is_an_error(root: Path, monkeypatch) -> None:
    write_checkpoint(root, 5)

    def refuse(old, new, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(PermissionError):
        set_aside(root, [5])

"""Old checkpoints go by their number; the newest one, and whatever the run cannot use, never do."""

import shutil
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from ebft_mega.checkpoint.commit import complete_folders, folder_name, leftovers, point_latest
from ebft_mega.checkpoint.retention import delete_expired, expired

LIMIT = st.none() | st.integers(1, 8)


@given(st.sets(st.integers(0, 40)), LIMIT, LIMIT)
def test_what_expires_is_neither_among_the_newest_nor_a_multiple(steps, keep_last, keep_every) -> None:
    gone = expired(steps, keep_last, keep_every)
    assert gone == sorted(gone)
    for step in steps:
        newer = sum(other > step for other in steps)
        is_kept = keep_last is None or newer < keep_last or (keep_every is not None and step % keep_every == 0)
        assert (step in gone) == (not is_kept)


def make(root: Path, *steps: int) -> None:
    for step in steps:
        (root / folder_name(step) / "weights").mkdir(parents=True)
        (root / folder_name(step) / "weights" / "rank-00000.safetensors").write_bytes(b"x")


def names(root: Path) -> list[str]:
    return [folder.name for folder in reversed(complete_folders(root))]


def test_the_last_and_every_nth_checkpoint_stay(tmp_path: Path) -> None:
    make(tmp_path, 5, 10, 15, 20, 25)
    point_latest(tmp_path, folder_name(25))
    assert delete_expired(tmp_path, 2, 10) == []
    assert names(tmp_path) == [folder_name(step) for step in (10, 20, 25)]
    assert leftovers(tmp_path) == []


def test_a_checkpoint_that_was_passed_over_pushes_out_none_that_counts(tmp_path: Path) -> None:
    make(tmp_path, 10, 15, 20)
    point_latest(tmp_path, folder_name(15))  # the run resumed from step 10, because 20 was broken
    assert delete_expired(tmp_path, 1, None) == []
    assert names(tmp_path) == [folder_name(15), folder_name(20)]


def test_without_a_number_all_stay(tmp_path: Path) -> None:
    make(tmp_path, 5, 10)
    assert delete_expired(tmp_path, None, 7) == []
    assert delete_expired(tmp_path / "nowhere", 1, None) == []
    assert len(names(tmp_path)) == 2


def test_what_cannot_be_deleted_is_told_and_looks_like_no_checkpoint(tmp_path: Path, monkeypatch) -> None:
    make(tmp_path, 5, 10, 15)
    real = shutil.rmtree

    def failing(path, *arguments, **options) -> None:
        if "00000005" in str(path):
            raise PermissionError(13, "Permission denied")
        real(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", failing)
    (warning,) = delete_expired(tmp_path, 1, None)
    assert "step-00000005" in warning and warning.endswith("Permission denied")
    assert names(tmp_path) == [folder_name(15)]
    assert [path.name for path in leftovers(tmp_path)] == ["step-00000005.expired.tmp"]


def test_the_same_step_can_fail_to_be_deleted_again(tmp_path: Path, monkeypatch) -> None:
    def failing(path, *arguments, **options) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", failing)
    for _ in range(2):
        make(tmp_path, 5)
        (tmp_path / folder_name(9)).mkdir(exist_ok=True)
        assert len(delete_expired(tmp_path, 1, None)) == 1
    assert [path.name for path in leftovers(tmp_path)] == ["step-00000005.expired-2.tmp", "step-00000005.expired.tmp"]

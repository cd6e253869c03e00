"""Which checkpoints a run may resume from, for every value of `checkpoint.resume`."""

import hashlib
import shutil
from pathlib import Path

import pytest

from ebft_mega.checkpoint.commit import folder_name, point_latest
from ebft_mega.checkpoint.manifest import MANIFEST_NAME
from ebft_mega.checkpoint.resume_candidates import candidates, named_origin, origin
from ebft_mega.checkpoint.run_state import StartedFrom
from ebft_mega.checkpoint.saved_run import read_run
from ebft_mega.config.schema import RunConfig
from ebft_mega.errors import ConfigError
from tests.unit.checkpoint.folder_stand_ins import fill, run_config, run_state, write_checkpoint


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def root(output: Path) -> Path:
    return output / "checkpoints"


def steps_of(root: Path, *steps: int) -> tuple[Path, ...]:
    return tuple(root / folder_name(step) for step in steps)


def began_at(folder: Path) -> StartedFrom:
    """What checkpoints of a run say that was started with `checkpoint.resume: folder`."""
    text = (folder / MANIFEST_NAME).read_bytes()
    return StartedFrom(path=str(folder.resolve()), manifest_sha256=hashlib.sha256(text).hexdigest())


def resuming(output: Path, resume: Path | str) -> RunConfig:
    return run_config(output, checkpoint__resume=str(resume))


def test_a_new_run_has_no_candidates(output: Path) -> None:
    for resume in ("auto", "never"):
        found = candidates(resuming(output, resume))
        assert (found.paths, found.is_explicit, found.abandoned, found.notes) == ((), False, (), ())


def test_never_abandons_what_is_there(output: Path, root: Path) -> None:
    for step in (10, 5):
        write_checkpoint(root, step)
    found = candidates(resuming(output, "never"))
    assert (found.paths, found.is_explicit, found.abandoned) == ((), False, (5, 10))
    assert found.notes == (
        "checkpoint.resume is never: the run begins anew beside 2 checkpoints, also when it is requeued",
    )


def test_auto_tries_the_newest_first_whatever_latest_says(output: Path, root: Path) -> None:
    for step in (5, 10, 15):
        write_checkpoint(root, step)
    (root / "step-00000020.tmp").mkdir()
    found = candidates(resuming(output, "auto"))
    assert (found.paths, found.abandoned, found.notes) == (steps_of(root, 15, 10, 5), (), ())
    point_latest(root, "step-00000010")
    found = candidates(resuming(output, "auto"))
    assert found.paths == steps_of(root, 15, 10, 5)
    assert found.notes == (f"{root / 'latest'} names step-00000010; step-00000015 is newer",)
    point_latest(root, "step-00000099")
    assert candidates(resuming(output, "auto")).notes == (f"{root / 'latest'} names step-00000099, which is not there",)


def test_where_a_run_begins_is_named_only_outside_its_directory(tmp_path: Path, output: Path, root: Path) -> None:
    folder = write_checkpoint(tmp_path / "other" / "checkpoints", 5)
    for resume, began in (("auto", None), (folder, began_at(folder)), (tmp_path / "other", began_at(folder))):
        config = resuming(output, resume)
        assert named_origin(config, candidates(config)) == began
    own = resuming(output, write_checkpoint(root, 10))
    assert named_origin(own, candidates(own)) is None


@pytest.mark.parametrize("way", ["folder", "checkpoints", "run", "link"])
def test_a_path_means_a_checkpoint_or_the_newest_of_a_run(tmp_path: Path, output: Path, way: str) -> None:
    other = tmp_path / "other" / "checkpoints"
    for step in (5, 10, 15):
        write_checkpoint(other, step)
    point_latest(other, "step-00000010")
    (tmp_path / "best").symlink_to(other / "step-00000010")
    places = {
        "folder": other / "step-00000010",
        "checkpoints": other,
        "run": tmp_path / "other",
        "link": tmp_path / "best",
    }
    found = candidates(resuming(output, places[way]))
    assert found.paths == (found.named,) == steps_of(other, 10)
    assert found.is_explicit and found.abandoned == () and found.notes == ()


@pytest.mark.parametrize("place", ["nowhere", "empty", "a file", "other/checkpoints/step-00000010.tmp", "x" * 5000])
def test_a_path_without_a_checkpoint_is_an_error_that_names_it(tmp_path: Path, output: Path, place: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a file").write_text("")
    fill(tmp_path / "other/checkpoints/step-00000010.tmp", 10, run_config(output), run_state(10))
    with pytest.raises(ConfigError) as caught:
        candidates(resuming(output, tmp_path / place))
    (problem,) = caught.value.problems
    assert (problem.key, problem.found) == ("checkpoint.resume", f"{tmp_path / place}, where there is none")


def test_a_broken_checkpoint_at_a_path_is_still_the_candidate(tmp_path: Path, output: Path) -> None:
    (tmp_path / "step-00000010").mkdir()
    assert candidates(resuming(output, tmp_path / "step-00000010")).paths == (tmp_path / "step-00000010",)


@pytest.mark.parametrize("way", ["folder", "run"])
def test_a_job_that_is_queued_again_resumes_from_its_own_checkpoints(
    tmp_path: Path, output: Path, root: Path, way: str
) -> None:
    other = tmp_path / "other" / "checkpoints"
    start, unrelated = write_checkpoint(other, 10), write_checkpoint(other, 5)
    place = start if way == "folder" else tmp_path / "other"
    write_checkpoint(root, 3)
    write_checkpoint(root, 12, began_at(unrelated) if way == "folder" else None)
    own = [write_checkpoint(root, step, began_at(start)) for step in (15, 20)]
    found = candidates(resuming(output, place))
    assert found.paths == (own[1], own[0], start)
    assert found.abandoned == (3, 12)
    (note,) = found.notes
    assert str(place) in note

    # Its own later checkpoints keep the name of where it began, however often it is queued again.
    for path in found.paths:
        assert origin(read_run(path), found) == began_at(start)
    assert origin(read_run(own[1]), candidates(resuming(output, "auto"))) == began_at(start)
    assert origin(read_run(root / "step-00000003"), candidates(resuming(output, "auto"))) is None


def test_a_run_that_begins_at_a_run_with_an_origin_has_one_of_its_own(tmp_path: Path, output: Path) -> None:
    other = tmp_path / "other" / "checkpoints"
    start = write_checkpoint(other, 10, StartedFrom(path="/elsewhere", manifest_sha256="f" * 64))
    assert origin(read_run(start), candidates(resuming(output, start))) == began_at(start)


def test_a_run_that_began_at_a_run_is_known_if_that_one_has_continued(tmp_path: Path, output: Path, root: Path) -> None:
    other = tmp_path / "other" / "checkpoints"
    start = write_checkpoint(other, 10)
    own = write_checkpoint(root, 15, began_at(start))
    later = write_checkpoint(other, 30)
    shutil.rmtree(start)  # by the other run's retention
    found = candidates(resuming(output, tmp_path / "other"))
    assert (found.paths, found.named, found.abandoned) == ((own, later), later, ())


def test_a_run_resumes_when_the_checkpoint_that_it_began_at_is_gone(tmp_path: Path, output: Path, root: Path) -> None:
    start = write_checkpoint(tmp_path / "other" / "checkpoints", 10)
    own = write_checkpoint(root, 15, began_at(start))
    elsewhere = write_checkpoint(root, 12, StartedFrom(path="/elsewhere", manifest_sha256="f" * 64))
    shutil.rmtree(start)
    found = candidates(resuming(output, start))
    assert (found.paths, found.named, found.abandoned) == ((own,), None, (12,))
    assert origin(read_run(own), found) is not None
    assert elsewhere.is_dir()


def test_going_back_in_a_run_abandons_what_came_later(output: Path, root: Path) -> None:
    for step in (5, 10, 15, 20):
        write_checkpoint(root, step)
    found = candidates(resuming(output, root / "step-00000010"))
    assert (found.paths, found.abandoned) == (steps_of(root, 10), (15, 20))
    assert origin(read_run(root / "step-00000010"), found) == began_at(root / "step-00000010")
    # The run has continued from there, and is queued again.
    shutil.rmtree(root / "step-00000015")
    write_checkpoint(root, 15, began_at(root / "step-00000010"), weights=b"again")
    found = candidates(resuming(output, root / "step-00000010"))
    assert (found.paths, found.abandoned) == (steps_of(root, 15, 10), (20,))
    # Retention has deleted the one that the path names.
    shutil.rmtree(root / "step-00000010")
    assert candidates(resuming(output, root / "step-00000010")).paths == steps_of(root, 15)


@pytest.mark.parametrize("place", ["run", "run/checkpoints", "link"])
def test_its_own_run_directory_is_like_auto(tmp_path: Path, output: Path, root: Path, place: str) -> None:
    with pytest.raises(ConfigError):
        candidates(resuming(output, output))
    start = write_checkpoint(root, 5)
    for step in (10, 15):
        write_checkpoint(root, step, began_at(start))
    point_latest(root, "step-00000010")  # the run was killed before this was step 15
    (tmp_path / "link").symlink_to(output)
    found = candidates(resuming(output, tmp_path / place))
    assert (found.paths, found.is_explicit, found.abandoned) == (steps_of(root, 15, 10, 5), True, ())
    assert "step-00000015 is newer" in found.notes[0]
    assert origin(read_run(found.paths[0]), found) == began_at(start)


def test_a_checkpoint_of_its_own_is_named_as_the_others_there(tmp_path: Path, output: Path, root: Path) -> None:
    for step in (5, 10):
        write_checkpoint(root, step)
    (tmp_path / "link").symlink_to(output)
    found = candidates(resuming(tmp_path / "link", root / "step-00000005"))
    assert (found.paths, found.abandoned) == ((tmp_path / "link" / "checkpoints" / "step-00000005",), (10,))


def test_a_folder_that_cannot_be_read_is_of_no_line(tmp_path: Path, output: Path, root: Path) -> None:
    start = write_checkpoint(tmp_path / "other" / "checkpoints", 10)
    broken = write_checkpoint(root, 15, began_at(start))
    (broken / "state.json").write_text("{}")
    found = candidates(resuming(output, start))
    assert (found.paths, found.abandoned) == ((start,), (15,))

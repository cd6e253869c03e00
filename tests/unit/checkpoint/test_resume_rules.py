"""Which checkpoint a run goes on from, and what may have changed in the meantime."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.checkpoint.commit import folder_name, point_latest, publish, temporary_folder
from ebft_mega.checkpoint.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    read_manifest,
    write_file,
    write_manifest,
)
from ebft_mega.checkpoint.resume_rules import (
    COMPARED_ELSEWHERE,
    FREE,
    FREE_SECTIONS,
    LENGTH,
    NOTED,
    REFUSED,
    SavedRun,
    candidates,
    described_start,
    noted_changes,
    origin,
    read_run,
    refused_changes,
)
from ebft_mega.checkpoint.run_state import StartedFrom
from ebft_mega.config.schema import RunConfig, all_keys
from ebft_mega.errors import BrokenCheckpointError, ConfigError, InputError
from tests.unit.checkpoint.folder_stand_ins import MODEL, fill, run_config, run_state, write_checkpoint


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


# reading


def test_a_checkpoint_is_read_with_its_identity(root: Path, output: Path) -> None:
    folder = write_checkpoint(root, 20)
    saved = read_run(folder)
    assert (saved.directory, saved.manifest, saved.state) == (folder, read_manifest(folder), run_state(20))
    assert saved.manifest_sha256 == hashlib.sha256((folder / MANIFEST_NAME).read_bytes()).hexdigest()
    assert RunConfig.model_validate(saved.config) == run_config(output)
    assert saved.architecture == Architecture.from_hf(MODEL, "here")


@pytest.mark.parametrize("damage", ["missing", "changed", "unlisted"])
def test_all_small_files_that_are_not_as_written_are_named_at_once(root: Path, damage: str) -> None:
    folder = write_checkpoint(root, 20)
    names = ["state.json", "config.resolved.yaml", "config.json"]
    if damage == "unlisted":
        manifest = read_manifest(folder)
        kept = {name: record for name, record in manifest.files.items() if name not in names}
        write_manifest(folder, manifest.model_copy(update={"files": kept}))
    for name in names:
        if damage == "missing":
            (folder / name).unlink()
        elif damage == "changed":
            content = (folder / name).read_bytes()
            (folder / name).write_bytes(content[:-1] + b"#")
    with pytest.raises(BrokenCheckpointError) as caught:
        read_run(folder)
    text = str(caught.value)
    assert len(caught.value.problems) == 3 and all(name in text for name in names)


def relist(folder: Path, name: str, content: bytes) -> None:
    """Replace a file, and the manifest with it."""
    manifest = read_manifest(folder)
    files = manifest.files | {name: write_file(folder, name, content)}
    write_manifest(folder, manifest.model_copy(update={"files": files}))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("state.json", b"{}"),
        ("config.resolved.yaml", b"- a list"),
        ("config.resolved.yaml", b"train: 5"),
        ("config.resolved.yaml", b"seed: !!python/object/apply:os.system ['touch planted']"),
        ("config.resolved.yaml", b"seed: 1\nseed: 2"),
        ("config.resolved.yaml", b"\xff"),
        ("config.resolved.yaml", b"[" * 100_000),
        ("config.json", b"[]"),
        ("config.json", b"{"),
        ("config.json", b"[" * 100_000),
        ("config.json", b"\xff"),
    ],
)
def test_a_file_that_says_nothing_sensible_is_a_broken_checkpoint(root: Path, name: str, content: bytes) -> None:
    folder = write_checkpoint(root, 20)
    relist(folder, name, content)
    with pytest.raises(BrokenCheckpointError) as caught:
        read_run(folder)
    assert all(name in problem.where for problem in caught.value.problems)


def test_a_model_that_is_not_known_here_is_no_broken_checkpoint(root: Path) -> None:
    folder = write_checkpoint(root, 20)
    relist(folder, "config.json", json.dumps(MODEL | {"model_type": "gpt5"}).encode())
    with pytest.raises(InputError, match="model_type"):
        read_run(folder)


def test_the_steps_of_manifest_state_and_name_agree(root: Path, tmp_path: Path, output: Path) -> None:
    folder = write_checkpoint(root, 20)
    (root / "step-00000030").mkdir()
    shutil.copytree(folder, root / "step-00000030", dirs_exist_ok=True)
    with pytest.raises(BrokenCheckpointError, match=r"step: found 20; expected that of the folder's name"):
        read_run(root / "step-00000030")
    shutil.copytree(folder, tmp_path / "best")
    assert read_run(tmp_path / "best").state.step == 20
    temporary = temporary_folder(root, 40)
    fill(temporary, 40, run_config(output), run_state(39))
    with pytest.raises(BrokenCheckpointError, match=r"found 40; expected 39, as in state\.json"):
        read_run(publish(temporary, root))


# candidates


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


def test_a_dry_run_says_where_the_run_would_go_on(output: Path, root: Path) -> None:
    assert described_start(resuming(output, "auto")) == "The run begins at its first step."
    write_checkpoint(root, 5)
    assert described_start(resuming(output, "auto")) == f"The run goes on from {root / 'step-00000005'}."
    write_checkpoint(root, 10)
    words = described_start(resuming(output, "auto"))
    assert words == f"The run goes on from {root / 'step-00000010'}, or from an older one if that is not whole."


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
def test_a_job_that_is_queued_again_goes_on_from_its_own_checkpoints(
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


def test_a_run_that_began_at_a_run_is_known_when_that_one_has_gone_on(tmp_path: Path, output: Path, root: Path) -> None:
    other = tmp_path / "other" / "checkpoints"
    start = write_checkpoint(other, 10)
    own = write_checkpoint(root, 15, began_at(start))
    later = write_checkpoint(other, 30)
    shutil.rmtree(start)  # by the other run's retention
    found = candidates(resuming(output, tmp_path / "other"))
    assert (found.paths, found.named, found.abandoned) == ((own, later), later, ())


def test_a_run_goes_on_when_the_checkpoint_that_it_began_at_is_gone(tmp_path: Path, output: Path, root: Path) -> None:
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
    # The run has gone on from there, and is queued again.
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


# changes


@pytest.fixture
def saved(root: Path) -> SavedRun:
    return read_run(write_checkpoint(root, 20))


def test_every_key_is_of_one_kind() -> None:
    for key in all_keys():
        kinds = [key in kind for kind in (REFUSED, NOTED, LENGTH, COMPARED_ELSEWHERE, FREE)]
        assert sum(kinds) + (key.split(".")[0] in FREE_SECTIONS) == 1, f"{key}: put it into one class of resume.py"
    for key in (*REFUSED, *NOTED, *LENGTH, *COMPARED_ELSEWHERE, *FREE):
        assert key in all_keys()


def test_nothing_has_changed(saved: SavedRun, output: Path) -> None:
    config = run_config(output)
    assert refused_changes(saved, config, Architecture.from_hf(MODEL, "here")) == []
    assert noted_changes(saved, config) == []


@pytest.mark.parametrize(
    ("changes", "key", "old", "new"),
    [
        ({"seed": 4}, "seed", "3", "4"),
        ({"data__document_masking": True}, "data.document_masking", "false", "true"),
        ({"ebft__stride": 4}, "ebft.stride", "8", "4"),
        ({"ebft__feature_layers": [0.5]}, "ebft.feature_layers", "[0.25, 0.5, 0.75]", "[0.5]"),
        ({"ebft__rl_coef": 0.0}, "ebft.rl_coef", "1.0", "0.0"),
        ({"ebft__whitening": "feature"}, "ebft.whitening", "sample", "feature"),
    ],
)
def test_another_run_is_refused_with_the_old_and_the_new_value(
    saved: SavedRun, output: Path, changes: dict, key: str, old: str, new: str
) -> None:
    config = run_config(output, **changes).with_places({key: "run.yaml:7"})
    (problem,) = refused_changes(saved, config, saved.architecture)
    assert (problem.where, problem.key, problem.found) == ("run.yaml:7", key, new)
    assert problem.expected.startswith(f"{old}, as in {saved.directory}; ")
    assert f"model.init_from: {saved.directory}" in problem.expected
    assert noted_changes(saved, config) == []


@pytest.mark.parametrize(
    ("changes", "key", "old", "new"),
    [
        ({"hidden_size": 32}, "hidden_size", "16", "32"),
        ({"num_hidden_layers": 5}, "num_hidden_layers", "4", "5"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings", "false", "true"),
        ({"rope_theta": 5e5}, "rope_theta", "10000.0", "500000.0"),
        ({"rope_scaling": {"type": "linear"}}, "rope_type", "default", "linear"),
        ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "rope_factor", "null", "2.0"),
    ],
)
def test_another_architecture_is_refused(
    saved: SavedRun, output: Path, changes: dict, key: str, old: str, new: str
) -> None:
    problems = refused_changes(saved, run_config(output), Architecture.from_hf(MODEL | changes, "here"))
    (problem,) = [problem for problem in problems if problem.key == f"model.config: {key}"]
    assert problem.found == new
    assert problem.expected.startswith(f"{old}, as in {saved.directory}; ")


def test_the_same_architecture_in_other_words_is_the_same(saved: SavedRun, output: Path) -> None:
    words = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000},
        "num_key_value_heads": 4,
        "dtype": "bfloat16",
        "transformers_version": "5.23.0",
        "architectures": ["LlamaForCausalLM"],
    }
    assert refused_changes(saved, run_config(output), Architecture.from_hf(MODEL | words, "here")) == []


def test_all_refused_changes_come_at_once(saved: SavedRun, output: Path) -> None:
    config = run_config(output, seed=9, ebft__n_samples_per_prompt=8, ebft__top_p=0.9)
    problems = refused_changes(saved, config, Architecture.from_hf(MODEL | {"vocab_size": 101}, "here"))
    keys = [problem.key for problem in problems]
    assert keys == ["seed", "ebft.n_samples_per_prompt", "ebft.top_p", "model.config: vocab_size"]


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"train__lr": 2e-6}, "train.lr was 1e-06 and is 2e-06 now"),
        ({"train__betas": [0.8, 0.95]}, "train.betas was [0.9, 0.95] and is [0.8, 0.95] now"),
        ({"train__dtype": "float32"}, "train.dtype was bfloat16 and is float32 now"),
        ({"train__global_batch_size": 16}, "train.global_batch_size was 8 and is 16 now"),
        ({"evaluation__shards": "x"}, "evaluation.shards was null and is x now"),
        ({"evaluation__interval": 5}, "evaluation.interval was null and is 5 now"),
    ],
)
def test_what_makes_other_numbers_is_noted(saved: SavedRun, output: Path, changes: dict, note: str) -> None:
    config = run_config(output, **changes)
    (found,) = noted_changes(saved, config)
    assert found.startswith(note + ": ")
    assert refused_changes(saved, config, saved.architecture) == []


def test_another_length_is_noted_where_the_learning_rate_depends_on_it(root: Path, output: Path) -> None:
    saved = read_run(write_checkpoint(root, 20))
    assert noted_changes(saved, run_config(output, train__max_steps=20)) == []
    temporary = temporary_folder(root, 30)
    fill(temporary, 30, run_config(output, train__lr_scheduler="cosine"), run_state(30))
    saved = read_run(publish(temporary, root))
    (note,) = noted_changes(saved, run_config(output, train__lr_scheduler="cosine", train__max_steps=20))
    assert note.startswith("the run had 10 steps and has 20 now (train.max_steps or train.max_tokens): ")
    same = {"train__lr_scheduler": "cosine", "train__max_steps": None}
    assert noted_changes(saved, run_config(output, **same, train__max_tokens=10 * 8 * 32 + 5)) == []


def test_how_and_where_a_run_is_done_is_free(saved: SavedRun, tmp_path: Path) -> None:
    config = run_config(
        tmp_path / "elsewhere",
        data__shards="moved/train",
        data__workers=0,
        data__on_error="skip",
        parallel__tensor_parallel_size=2,
        zero__stage=1,
        learn__reuse_rollout="off",
        checkpoint__interval=5,
        profile__start=3,
        train__micro_batch_size=2,
        train__attention="dense",
        train__activation_checkpointing="full",
    )
    assert refused_changes(saved, config, saved.architecture) == []
    assert noted_changes(saved, config) == []


def test_a_key_that_the_checkpoint_does_not_know_had_its_default(root: Path, output: Path) -> None:
    folder = write_checkpoint(root, 20)
    relist(folder, "config.resolved.yaml", b"seed: 3\noutput_dir: x\ntrain:\n  max_steps: 10\n  global_batch_size: 8\n")
    saved = read_run(folder)
    assert refused_changes(saved, run_config(output), saved.architecture) == []
    assert noted_changes(saved, run_config(output)) == []
    assert len(refused_changes(saved, run_config(output, ebft__stride=4), saved.architecture)) == 1


def test_a_manifest_alone_makes_no_checkpoint(root: Path) -> None:
    write_manifest(root / "step-00000020", Manifest(version=1, step=20, files={}))
    with pytest.raises(BrokenCheckpointError) as caught:
        read_run(root / "step-00000020")
    assert len(caught.value.problems) == 3
    assert FileRecord(bytes=0, sha256="a" * 64) not in read_manifest(root / "step-00000020").files.values()

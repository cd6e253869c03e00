"""The small files of a checkpoint are those that were written, or the checkpoint is broken."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.checkpoint.commit import publish, temporary_folder
from ebft_mega.checkpoint.manifest import MANIFEST_NAME, FileRecord, Manifest, read_manifest, write_manifest
from ebft_mega.checkpoint.saved_run import read_run
from ebft_mega.config.schema import RunConfig
from ebft_mega.errors import BrokenCheckpointError, InputError
from tests.unit.checkpoint.folder_stand_ins import MODEL, fill, relist, run_config, run_state, write_checkpoint


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def root(output: Path) -> Path:
    return output / "checkpoints"


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


def test_a_manifest_alone_makes_no_checkpoint(root: Path) -> None:
    write_manifest(root / "step-00000020", Manifest(version=1, step=20, files={}))
    with pytest.raises(BrokenCheckpointError) as caught:
        read_run(root / "step-00000020")
    assert len(caught.value.problems) == 3
    assert FileRecord(bytes=0, sha256="a" * 64) not in read_manifest(root / "step-00000020").files.values()

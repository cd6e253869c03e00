"""Text webdatasets that are tokenized on the way into a run."""

import multiprocessing
import shutil
from pathlib import Path

import pytest
from webdataset import TarWriter

from ebft_mega.data.builder.on_demand import tokenized_dataset
from ebft_mega.data.store.opening import open_dataset
from ebft_mega.data.tokenizers.tokenizer import load_tokenizer
from ebft_mega.errors import InputError


@pytest.fixture
def place(tmp_path: Path, texts: dict[str, str]) -> Path:
    (tmp_path / "shards").mkdir()
    for shard in range(3):
        with (tmp_path / "shards" / f"{shard}.tar").open("wb") as file, TarWriter(file, mtime=0) as tar:
            for number, text in enumerate(sorted(texts.values())[shard::3]):
                tar.write({"__key__": f"{number:04d}", "txt": text})
            tar.write({"__key__": "again", "txt": "the same in each\n"})
    return tmp_path / "shards"


def test_a_text_dataset_is_made_once(
    tmp_path: Path,
    place: Path,
    texts: dict[str, str],
    tokenizer_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (place / "README.md").write_text("not a shard")
    first = tokenized_dataset(place, tokenizer_directory, tmp_path / "cache", 1)
    dataset, tokenizer = open_dataset(first), load_tokenizer(tokenizer_directory)
    found = [tokenizer.decode(dataset.tokens(number)) for number in range(dataset.manifest.documents)]
    assert sorted(found) == sorted([*texts.values(), *["the same in each\n"] * 3])

    def again(*_: object, **__: object) -> None:
        raise AssertionError("it was made")

    monkeypatch.setattr("ebft_mega.data.builder.on_demand.build_dataset", again)
    assert tokenized_dataset(place, tokenizer_directory, tmp_path / "cache", 2) == first
    # Found by contents, wherever they lie and whenever they were written.
    shutil.copytree(place, tmp_path / "moved", copy_function=shutil.copyfile)
    assert tokenized_dataset(tmp_path / "moved", tokenizer_directory, tmp_path / "cache", 1) == first


def test_other_shards_or_another_tokenizer_make_another_dataset(
    tmp_path: Path, place: Path, tokenizer_directory: Path, hugging_face_directory: Path
) -> None:
    cache = tmp_path / "cache"
    made = {tokenized_dataset(place, tokenizer_directory, cache, 1)}
    made.add(tokenized_dataset(place, hugging_face_directory, cache, 1))
    content = (place / "1.tar").read_bytes()
    (place / "1.tar").write_bytes(content.replace(b"the same in each", b"the same in EACH"))
    made.add(tokenized_dataset(place, tokenizer_directory, cache, 1))
    (place / "1.tar").rename(place / "9.tar")
    made.add(tokenized_dataset(place, tokenizer_directory, cache, 1))
    assert len(made) == 4
    assert len({open_dataset(path).manifest.fingerprint for path in made}) == 4


def test_shards_elsewhere_are_refused_and_none_is_read_twice(
    tmp_path: Path, place: Path, tokenizer_directory: Path
) -> None:
    before = open_dataset(tokenized_dataset(place, tokenizer_directory, tmp_path / "cache", 1)).manifest
    (place / "again.tar").symlink_to("1.tar")
    assert open_dataset(tokenized_dataset(place, tokenizer_directory, tmp_path / "cache", 1)).manifest == before
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "0.tar").write_bytes((place / "0.tar").read_bytes())
    (tmp_path / "links" / "1.tar").symlink_to(place / "1.tar")
    with pytest.raises(InputError, match=r"links: shards: found links that leave the input: 1; expected shards in the"):
        tokenized_dataset(tmp_path / "links", tokenizer_directory, tmp_path / "cache", 1)
    (tmp_path / "way").symlink_to(place)
    assert open_dataset(tokenized_dataset(tmp_path / "way", tokenizer_directory, tmp_path / "cache", 1))


def test_damaged_shards_are_refused_and_leave_nothing(tmp_path: Path, place: Path, tokenizer_directory: Path) -> None:
    (place / "1.tar").write_bytes((place / "1.tar").read_bytes()[:1024])
    with pytest.raises(InputError, match=r"1\.tar"):
        tokenized_dataset(place, tokenizer_directory, tmp_path / "cache", 1)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    with pytest.raises(InputError, match="no such file or directory"):
        tokenized_dataset(tmp_path / "absent", tokenizer_directory, tmp_path / "cache", 1)


def make(place: Path, tokenizer_directory: Path, cache: Path) -> None:
    tokenized_dataset(place, tokenizer_directory, cache, 1)


def test_processes_that_ask_at_once_share_one_build(tmp_path: Path, place: Path, tokenizer_directory: Path) -> None:
    # Forked, since a fresh interpreter costs a second each.
    context = multiprocessing.get_context("fork")
    arguments = (place, tokenizer_directory, tmp_path / "cache")
    processes = [context.Process(target=make, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == ["", ".lock"]

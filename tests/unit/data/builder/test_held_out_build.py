"""A build that holds documents out: two datasets of one scan, that appear together."""

import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ebft_mega.data.builder import dataset_build
from ebft_mega.data.builder.build_options import BuildOptions
from ebft_mega.data.builder.build_record import read_build_record
from ebft_mega.data.builder.dataset_build import BuildResult, build_dataset
from ebft_mega.data.selection.held_out_split import SplitOptions
from ebft_mega.data.store.inspection import read_metadata
from ebft_mega.data.store.opening import open_dataset
from ebft_mega.data.store.verify import verify_dataset
from ebft_mega.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from ebft_mega.errors import InputError

REPOSITORY = Path(__file__).resolve().parents[4]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_directory: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_directory)


def write(base: Path, contents: dict[str, str]) -> Path:
    for name, text in contents.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(text)
    return base


def write_records(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def paths_of(directory: Path) -> list[str]:
    dataset = open_dataset(directory)
    return [str(read_metadata(dataset, number)["path"]) for number in range(dataset.manifest.documents)]


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def split(share: str = "10%", by: str | None = None, seed: int = 0, **options: object) -> BuildOptions:
    return BuildOptions(split=SplitOptions(share, by, seed), **options)


def folders(base: Path) -> Path:
    return write(
        base, {f"p{f}/m{n}.py": f"def f_{f}_{n}():\n    return {f * n}\n" * 3 for f in range(12) for n in range(4)}
    )


def test_the_two_sides_divide_the_documents_by_folders_whatever_the_processes(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folders(tmp_path / "source")
    result = build_dataset(source, tokenizer, tmp_path / "out", split(work_unit_bytes=300))
    train, held_out = paths_of(tmp_path / "out" / "train"), paths_of(tmp_path / "out" / "held-out")
    assert not {p.partition("/")[0] for p in train} & {p.partition("/")[0] for p in held_out}
    build_dataset(source, tokenizer, tmp_path / "whole")
    assert sorted([*train, *held_out]) == paths_of(tmp_path / "whole") and len(held_out) == 4
    (held_out_manifest,) = result.held_out
    assert (result.manifest.documents, held_out_manifest.documents, result.record.documents) == (44, 4, 48)
    for side in ("train", "held-out"):
        dataset = open_dataset(tmp_path / "out" / side)
        assert not [problem for report in verify_dataset(dataset) for problem in report.problems]
        record = read_build_record(tmp_path / "out" / side)
        assert record is not None and record.split["side"] == side and record.documents == dataset.manifest.documents
    common = json.loads((tmp_path / "out" / "build.json").read_text())
    assert common["split"] == result.record.split and common["documents"] == 48
    expected = {"by": "top-folder", "held_out_groups": 1, "groups": 12, "asked": "10%"}
    assert expected.items() <= common["split"].items()
    line = (
        "held out: 1 of 12 groups (--split-by top-folder, as nothing else was said), 8.72 % of the bytes of text where"
    )
    assert f"{line} 10 % were asked for" in capsys.readouterr().err
    build_dataset(source, tokenizer, tmp_path / "two", split(work_unit_bytes=300), processes=2)
    assert bytes_of(tmp_path / "two") == bytes_of(tmp_path / "out")


def test_a_build_that_was_stopped_between_the_sides_is_resumed_and_nothing_appears_before(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, options = folders(tmp_path / "source"), split(work_unit_bytes=300)
    build_dataset(source, tokenizer, tmp_path / "whole", options)
    join, calls = dataset_build.join_units, []

    def stopped(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return join(*arguments)

    monkeypatch.setattr(dataset_build, "join_units", stopped)
    for stop_at in (1, 2):  # noqa: B007 - `stopped` reads it
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            build_dataset(source, tokenizer, tmp_path / "out", options)
        assert not (tmp_path / "out").exists()
    stop_at = 0
    monkeypatch.setattr(dataset_build, "tokenize_work_unit", None)  # all of it is there
    build_dataset(source, tokenizer, tmp_path / "out", options)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


def repositories(path: Path) -> Path:
    return write_records(
        path,
        [
            {"text": f"x = {n}\n" * 9, "repo_name": f"user/r{n % 20}", "id": n, "empty": "", "list": []}
            for n in range(100)
        ],
    )


def test_records_are_grouped_by_their_repository_or_a_key(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    source = repositories(tmp_path / "dump.jsonl")
    for by, groups in (("repo", 20), ("repo_name", 20), ("id", 100), ("document", 100), (None, 100)):
        output = tmp_path / str(by)
        build_dataset(source, tokenizer, output, split("5%", by, keep_keys=("repo_name",)))
        assert json.loads((output / "build.json").read_text())["split"]["groups"] == groups
    assert "what names the groups: repo_name of 100 documents" in capsys.readouterr().err
    sides = []
    for side in ("train", "held-out"):
        dataset = open_dataset(tmp_path / "repo" / side)
        metadata = [read_metadata(dataset, number) for number in range(dataset.manifest.documents)]
        sides.append({each["fields"]["repo_name"] for each in metadata})  # type: ignore[index]
    assert not sides[0] & sides[1] and len(sides[1]) == 1
    assert bytes_of(tmp_path / "repo" / "train") != bytes_of(tmp_path / "repo" / "held-out")


def test_folders_with_git_are_repositories(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(
        tmp_path / "source", {f"team{n % 2}/r{n}/src/a{k}.py": f"# {n} {k}\n" for n in range(6) for k in range(3)}
    )
    with pytest.raises(InputError, match=r"--split-by: repo: found no folder with \.git"):
        build_dataset(source, tokenizer, tmp_path / "out", split(by="repo"))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
    for n in range(6):
        (source / f"team{n % 2}" / f"r{n}" / ".git").mkdir()
    write(source, {"loose.py": "# loose file\n"})
    capsys.readouterr()
    result = build_dataset(source, tokenizer, tmp_path / "out", split("15%", "repo"))
    assert "what names the groups: .git of 18 documents, top-folder of 1 documents" in capsys.readouterr().err
    assert result.record.split["groups"] == 7
    sides = [{p.rpartition("/src")[0] for p in paths_of(tmp_path / "out" / side)} for side in ("train", "held-out")]
    assert not sides[0] & sides[1]


def packed(path: Path, contents: dict[str, str]) -> Path:
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in contents.items():
                archive.writestr(name, text)
        return path
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, text in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


@pytest.mark.parametrize("wrapper", ["", "proj-1.0/", "./a/b/"])
@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz"])
def test_one_archive_is_divided_by_its_own_folders(
    tmp_path: Path, tokenizer: Tokenizer, name: str, wrapper: str
) -> None:
    texts = {f"p{f}/m{n}.py": f"# {f} {n}\n" * 5 for f in range(8) for n in range(3)} | {"setup.py": "# one\n"}
    contents = {f"{wrapper}{path}": text for path, text in texts.items()}
    archive = packed(tmp_path / "in" / name, contents | {".hidden/x.py": "# hidden\n"})
    result = build_dataset(archive, tokenizer, tmp_path / "out", split("20%", "top-folder"))
    assert result.record.split["groups"] == 9 and result.record.split["named_by"] == {"folder of the archive": 25}
    sides = [paths_of(tmp_path / "out" / side) for side in ("train", "held-out")]
    assert sorted([*sides[0], *sides[1]]) == sorted(f"{name}/{path}" for path in contents)
    train, held_out = ({path.rpartition("/")[0] for path in side} for side in sides)
    assert held_out and not (train - {f"{name}/{wrapper}".rstrip("/")}) & held_out


def test_several_archives_are_repositories_and_are_not_divided(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(5):
        contents = {f"r/p{f}/m.py": f"# {f} {number}\n" * 9 for f in range(3)}
        packed(tmp_path / "in" / f"{number}.zip", contents)
    for by, kind in (("repo", "archive"), ("top-folder", "top-folder")):
        result = build_dataset(tmp_path / "in", tokenizer, tmp_path / by, split("20%", by))
        assert result.record.split["groups"] == 5 and result.record.split["named_by"] == {kind: 15}
    assert "what names the groups: archive of 15 documents" in capsys.readouterr().err
    with pytest.raises(InputError, match="a single group, in/0.zip .*, top-folder the folders of an archive"):
        build_dataset(tmp_path / "in" / "0.zip", tokenizer, tmp_path / "out", split("20%", "repo"))


@pytest.mark.parametrize("deduplicate", [True, False])
def test_no_text_lies_on_both_sides(
    tmp_path: Path, tokenizer: Tokenizer, deduplicate: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = {f"p{f:02d}/m{n}.py": f"# {f} {n}\n" * 5 for f in range(10) for n in range(2)}
    for folder in range(10):  # each folder has texts of two others
        contents[f"p{folder:02d}/copy.py"] = f"# {(folder + 3) % 10} 0\n" * 5
        contents[f"p{folder:02d}/licence.py"] = "# the same for all\n"
    source = write(tmp_path / "source", contents)
    result = build_dataset(source, tokenizer, tmp_path / "out", split("30%", deduplicate=deduplicate))
    texts: list[set[str]] = []
    for side in ("train", "held-out"):
        dataset = open_dataset(tmp_path / "out" / side)
        texts.append({str(read_metadata(dataset, n)["sha256"]) for n in range(dataset.manifest.documents)})
    assert not texts[0] & texts[1] and len(texts[0] | texts[1]) == 21
    records = [read_build_record(tmp_path / "out" / side) for side in ("train", "held-out", ".")]
    train, held_out, both = (record for record in records if record is not None)
    assert both.duplicates == train.duplicates + held_out.duplicates == 40 - both.documents
    equal = result.record.split["equal_across"]
    assert 0 < equal and f"{equal} documents are left out because the other dataset has their text" in both.notes
    if not deduplicate:  # what is held out stays whole
        assert held_out.duplicates == 0 and equal == train.duplicates
        groups = {p.partition("/")[0] for p in paths_of(tmp_path / "out" / "held-out")}
        assert len(paths_of(tmp_path / "out" / "held-out")) == 4 * len(groups)


@pytest.mark.parametrize(
    ("contents", "options", "message"),
    [
        (
            {"p/a.py": "a\n", "p/b.py": "b\n"},
            split(by="top-folder"),
            "--held-out: 10%: found a single group, source/p ",
        ),
        ({"a.py": "a\n"}, split(), r"a single group(, [0-9a-f]+)? \(--split-by document\); expected at least two"),
        (
            {"a.py": "a\n", "b.py": "b\n"},
            split(by="repos"),
            "--split-by: repos: found inputs of which each file is a text.* Did you mean 'repo'",
        ),
        ({"a.py": "a\n", "b.py": "b\n"}, split(by="repository"), "Did you mean 'repo'"),
        ({"a.py": "a\n", "b.py": "b\n"}, split(by="top_folder"), "Did you mean 'top-folder'"),
    ],
)
def test_a_side_without_documents_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, contents: dict[str, str], options: BuildOptions, message: str
) -> None:
    source = write(tmp_path / "source", contents)
    with pytest.raises(InputError, match=message):
        build_dataset(source, tokenizer, tmp_path / "out", options)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("by", "found"),
    [
        (
            "owner",
            "the keys empty, id, list, repo_name, text; expected the key 'owner', a text or a whole number",
        ),
        ("repository", "found the keys .* Did you mean 'repo'"),
        ("repo_nam", "a text or a whole number. Did you mean 'repo_name'"),
        ("empty", "found 'empty', an empty text"),
        ("list", "found 'list', a JSON list"),
    ],
)
def test_records_without_the_key_are_named_with_the_keys_that_they_have(
    tmp_path: Path, tokenizer: Tokenizer, by: str, found: str
) -> None:
    source = repositories(tmp_path / "dump.jsonl")
    with pytest.raises(InputError, match=found) as caught:
        build_dataset(source, tokenizer, tmp_path / "out", split(by=by))
    assert caught.value.problems[0].key == "--split-by" and [path.name for path in tmp_path.iterdir()] == ["dump.jsonl"]


def test_bad_documents_are_listed_once_for_both_sides(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = repositories(tmp_path / "dump.jsonl")
    with source.open("a") as file:
        file.write('{"text": "no repository"}\n{"text": 3}\n')
    result = build_dataset(source, tokenizer, tmp_path / "out", split("5%", "repo", skip_bad=True, work_unit_bytes=700))
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in lines] == ["no key of a group", "no text under the key"]
    assert result.record.skipped == 2 and result.record.documents == 100


def test_an_output_of_either_kind_replaces_the_other_when_asked(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source, output = folders(tmp_path / "source"), tmp_path / "out"
    for options in (split(), BuildOptions(), split()):
        result: BuildResult = build_dataset(source, tokenizer, output, options, overwrite=True)
        assert (output / "dataset.json").exists() == (options.split is None) and result.record.documents == 48
        with pytest.raises(InputError, match="an earlier result"):
            build_dataset(source, tokenizer, output, options)
    with pytest.raises(InputError, match=r"two datasets, train and held-out.*expected .*/out/train or .*/out/held-out"):
        open_dataset(output)


@pytest.mark.parametrize("deduplicate", [True, False])
def test_several_held_out_datasets_share_no_group_and_no_text(
    tmp_path: Path, tokenizer: Tokenizer, deduplicate: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = {f"p{f:02d}/m{n}.py": f"# {f} {n}\n" * 5 for f in range(20) for n in range(2)}
    for folder in range(20):
        contents[f"p{folder:02d}/copy.py"] = f"# {(folder + 3) % 20} 0\n" * 5
    source = write(tmp_path / "source", contents)
    options = split("tuning=15%,report=30%", "top-folder", deduplicate=deduplicate)
    result = build_dataset(source, tokenizer, tmp_path / "out", options)
    names = ("train", "tuning", "report")
    groups = [{path.partition("/")[0] for path in paths_of(tmp_path / "out" / name)} for name in names]
    assert [len(each) for each in groups] == [11, 3, 6] and len(set.union(*groups)) == 20
    texts = []
    for name in names:
        dataset = open_dataset(tmp_path / "out" / name)
        texts.append({str(read_metadata(dataset, n)["sha256"]) for n in range(dataset.manifest.documents)})
    assert len(set.union(*texts)) == sum(map(len, texts)) == 40
    assert [manifest.documents for manifest in result.held_out][0] == len(paths_of(tmp_path / "out" / "tuning"))
    printed = capsys.readouterr().err
    assert "tuning: 3 of 20 groups (--split-by top-folder), " in printed and "report: 6 of 20 groups" in printed
    assert result.record.split["asked"] == "tuning=15%,report=30%" and result.record.split["held_out_groups"] == 9
    equal = result.record.split["equal_across"]
    assert equal and f"{equal} documents are left out because another dataset has their text" in printed
    if not deduplicate:  # the last dataset stays whole
        assert len(paths_of(tmp_path / "out" / "report")) == 18
    with pytest.raises(InputError, match=r"3 datasets, train, report and tuning.*/out/train or .*/report or .*/tuning"):
        open_dataset(tmp_path / "out")


def test_too_few_groups_for_several_datasets_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write(tmp_path / "source", {"p/a.py": "# a\n" * 9, "q/a.py": "# b\n" * 9})
    with pytest.raises(InputError, match=r"--held-out: .* 2 groups .* which leave a dataset without any; expected sev"):
        build_dataset(source, tokenizer, tmp_path / "out", split("tuning=10%,report=30%"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


def test_options_of_the_tool(tmp_path: Path, tokenizer_directory: Path) -> None:
    base = ["tools/build_shards.py", "--input", folders(tmp_path / "source"), "--tokenizer", tokenizer_directory]
    output = tmp_path / "out"
    tail = ("--processes", 1, "--split-by", "top-folder", "--held-out")
    done = run(*base, "--output", output, *tail, "10%")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == (
        f"next: python tools/new_config.py --model MODEL --data {output}/train --held-out {output}/held-out "
        "--output CONFIG.yaml"
    )
    assert f"{output}/held-out: 4 documents" in done.stdout
    done = run(*base, "--output", tmp_path / "named", *tail, "tuning=10%,report=20%")
    assert done.returncode == 0, done.stderr
    counts = {"train": 36, "tuning": 4, "report": 8}
    assert all(f"{tmp_path}/named/{name}: {count} documents" in done.stdout for name, count in counts.items())
    assert f"--data {tmp_path}/named/train --held-out {tmp_path}/named/tuning " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--held-out", "0"], "argument --held-out: found '0'; expected a share between 0 and 100 %"),
        (["--held-out", "100%"], "found '100%'; expected a share"),
        (["--held-out", "2"], "found '2'; expected a share"),
        (["--held-out", "abc"], "found 'abc'; expected a share"),
        (
            ["--held-out", "a=2%,a=1%"],
            "expected shares with names, such as tuning=5%,report=10% ('a=1%' is no NAME=SHARE",
        ),
        (["--held-out", "train=2%"], "'train=2%' is no NAME=SHARE"),
        (["--held-out", "a=50%,b=50%"], "nothing is left to train on"),
        (["--held-out", "../a=5%"], "'../a=5%' is no NAME=SHARE"),
        (["--held-out", "a=5%,1%"], "'1%' is no NAME=SHARE"),
        (["--split-by", "repo"], "--split-by: found without --held-out"),
        (["--split-seed", "3"], "--split-seed: found without --held-out"),
        (["--held-out", "1%", "--split-by", ""], "--split-by: found an empty text; expected a name"),
        (
            ["--held-out", "1%", "--split-seed", "-1"],
            "--split-seed: found '-1'; expected a whole number from 0",
        ),
    ],
)
def test_wrong_values_are_named(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], parse: Callable[..., object]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse("--input", tmp_path, "--tokenizer", tmp_path, "--output", tmp_path / "out", *arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """Read a command line of the tool in this process."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    from build_shards import parse_arguments

    def read(*arguments: object) -> object:
        monkeypatch.setattr(sys, "argv", ["build_shards.py", *map(str, arguments)])
        return parse_arguments()

    return read

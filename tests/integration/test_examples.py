"""The examples of all seven kinds in a step on two ranks: one file each, of the package or beside a configuration."""

import filecmp
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ebft_mega.registry.kinds import ALL_REGISTRIES
from tests.distributed.runs import TEXT
from tests.integration.conftest import LAUNCH_TIMEOUT_SECONDS, REPOSITORY

EXAMPLES = REPOSITORY / "examples"
# The folder of each kind is that of its registry.
EXAMPLE_OF = {
    "reward term": "edit_distance",
    "advantage estimator": "early_tokens",
    "feature map": "one_layer",
    "learning-rate schedule": "inverse_square_root",
    "optimizer": "lion",
    "text format": "paragraphs",
    "store": "mirror",
}
NAMED = """
ebft: {stride: 4, context_length: 4, generate_max_len: 4, n_samples_per_prompt: 3, temperature: 0.8, ce_coef: 0.3,
       reward_terms: {edit_distance: 0.5}, advantage_estimator: early_tokens, embed_method: one_layer}
options: {early_tokens: {decay: 0.5}}
"""


def changed_files(copy: Path) -> list[str]:
    """Files of a copy of the package that are new or different, and those that are missing."""
    ours, theirs = (
        {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
        for root in (REPOSITORY / "ebft_mega", copy / "ebft_mega")
    )
    same = {name for name in ours.keys() & theirs.keys() if filecmp.cmp(ours[name], theirs[name], shallow=False)}
    return sorted((ours.keys() | theirs.keys()) - same)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A copy of the repository with each example as a file of the package."""
    copy = tmp_path_factory.mktemp("copy")
    for folder in ("ebft_mega", "launcher", "tools"):
        shutil.copytree(REPOSITORY / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for registry in ALL_REGISTRIES:
        name = EXAMPLE_OF[registry.kind]
        before = changed_files(copy)
        shutil.copy(EXAMPLES / f"{name}.py", copy / registry.folder.replace(".", "/"))
        added = [path for path in changed_files(copy) if path not in before]
        assert added == [f"{registry.folder.removeprefix('ebft_mega.').replace('.', '/')}/{name}.py"]
    return copy


def call(root: Path, *arguments: str, ranks: int | None = None) -> str:
    """What a command of a repository prints; it must end well."""
    launcher = () if ranks is None else ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}")
    result = subprocess.run(
        [sys.executable, *launcher, *arguments],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LAUNCH_TIMEOUT_SECONDS,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def folder(repository, tmp_path_factory):
    """Paragraphs, and a data set that was made of them by the format of the example."""
    folder = tmp_path_factory.mktemp("site")
    words = [f"{first}{second}" for first in ("ba", "do", "mi", "ku") for second in ("ra", "se", "ti")]
    paragraphs = [" ".join([str(i), *(words[(i * j + i) % len(words)] for j in range(30))]) for i in range(20)]
    (folder / "notes.paragraphs").write_text("\n\n".join(paragraphs) + "\n")
    (folder / "text").mkdir()
    (folder / "text" / "notes.py").write_text("\n".join(paragraphs))
    tokenizer, output = str(folder / "tokenizer"), str(folder / "team" / "notes")
    call(
        repository,
        "tools/train_tokenizer.py",
        "--input",
        str(folder / "text"),
        "--vocab-size",
        "300",
        "--output",
        tokenizer,
    )
    built = ("tools/build_shards.py", "--input", str(folder / "notes.paragraphs"), "--tokenizer", tokenizer)
    call(repository, *built, "--output", output)
    assert json.loads((folder / "team" / "notes" / "dataset.json").read_text())["documents"] == len(paragraphs)
    plugin = ("--plugin", str(EXAMPLES / "paragraphs.py"))
    call(REPOSITORY, *built, *plugin, "--output", str(folder / "by_plugin"))
    shards = [path.name for path in Path(output).glob("*.tar")]
    assert shards and filecmp.cmpfiles(output, folder / "by_plugin", shards, shallow=False)[0] == shards
    return folder


def configuration(folder: Path, name: str, plugins: str) -> Path:
    """A file with all examples by their names."""
    text = TEXT % ("llama", "true")
    kept = [line for line in text.splitlines() if not line.startswith(("ebft:", "evaluation:", "output_dir:"))]
    text = (
        "\n".join(kept)
        .replace("shards: unused", "shards: 'mirror://team/notes'")
        .replace("max_steps: 6", "max_steps: 1")
    )
    text = text.replace("lr: 3.0e-3", "lr: 3.0e-3, optimizer: lion, lr_scheduler: inverse_square_root")
    path = folder / f"{name}.yaml"
    path.write_text(f"output_dir: {folder / name}\n{plugins}{text}\n{NAMED}")
    return path


@pytest.fixture(scope="module")
def runs(repository, folder):
    """The run directories of one step on two ranks: with the copy of the package, and with plugins."""
    os.environ["MIRROR_FOLDER"] = str(folder)
    try:
        for root, name, plugins in (
            (repository, "own", ""),
            (REPOSITORY, "plugins", f"plugins: [{', '.join(map(str, sorted(EXAMPLES.glob('*.py'))))}]\n"),
        ):
            path = configuration(folder, name, plugins)
            cache = ("--set", f"data.cache={folder / f'cache-{name}'}", "zero.stage=2")
            call(root, "launcher/train.py", "--config", str(path), *cache, ranks=2)
    finally:
        del os.environ["MIRROR_FOLDER"]
    return folder / "own", folder / "plugins"


def test_each_kind_costs_one_file(repository):
    assert len(changed_files(repository)) == len(ALL_REGISTRIES) == len(EXAMPLE_OF)
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted(EXAMPLE_OF.values())


def test_a_step_has_them_all(runs):
    for run in runs:
        (line,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert -1 <= line["ebft/edit_distance"] < 0
        assert line["train/lr"] == 3e-3
        step = run / "checkpoints" / "step-00000001"
        assert {path.name for path in step.iterdir() if path.is_dir()} >= {"weights", "momentum"}
        assert not (step / "exp_avg").exists()
        moved = [load_file(path) for path in sorted((step / "momentum").glob("*.safetensors"))]
        assert any(tensor.abs().sum() > 0 for file in moved for tensor in file.values())


def test_plugins_do_the_same_as_files_of_the_package(runs):
    lines = [json.loads((run / "metrics.jsonl").read_text().splitlines()[0]) for run in runs]
    first, second = (
        {key: value for key, value in line.items() if not key.startswith(("perf/", "memory/"))} for line in lines
    )
    assert first == second
    own, plugins = (run / "checkpoints" / "step-00000001" / "weights" for run in runs)
    names = sorted(path.name for path in own.glob("*.safetensors"))
    assert names and filecmp.cmpfiles(own, plugins, names, shallow=False)[0] == names

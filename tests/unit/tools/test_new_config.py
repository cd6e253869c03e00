"""The starter configuration: a start accepts it, it fits the memory it was written for, and what is wrong is named."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from ebft_mega.apps.starter.starter_config import Request, write_starter_config
from ebft_mega.config.load import load_config
from ebft_mega.data.builder.build_options import BuildOptions
from ebft_mega.data.builder.dataset_build import build_dataset
from ebft_mega.data.tokenizers.tokenizer import load_tokenizer
from ebft_mega.data.tokenizers.tokenizer_training import train_tokenizer
from ebft_mega.planning.auto import needed_bytes, smallest_peak
from ebft_mega.planning.run_plan import check_run
from tests.unit.planning.stand_ins import MODELS, write_model

REPOSITORY = Path(__file__).resolve().parents[3]
TOOL = REPOSITORY / "tools" / "new_config.py"
VOCABULARY = 400
TOY = {
    "model_type": "llama",
    "vocab_size": 999,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "bos_token_id": 998,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A tokenizer, and datasets of much, little and next to no code."""
    root = tmp_path_factory.mktemp("data")
    package = sorted((REPOSITORY / "ebft_mega" / "config").glob("*.py"))
    texts = root / "texts"
    texts.mkdir()
    for number in range(4):
        for path in package:
            text = f"# {number}\n{path.read_text(encoding='utf-8')}"
            (texts / f"{number}-{path.name}").write_text(text, encoding="utf-8")
    train_tokenizer(texts, VOCABULARY, root / "tokenizer")
    tokenizer = load_tokenizer(root / "tokenizer")
    for name, pattern in (("train", "*"), ("held-out", "0-rules.py"), ("little", "0-f*.py")):
        build_dataset(texts, tokenizer, root / name, BuildOptions(pattern=pattern))
    train_tokenizer(texts, VOCABULARY - 1, root / "other-tokenizer")
    other = load_tokenizer(root / "other-tokenizer")
    build_dataset(texts, other, root / "other", BuildOptions(pattern="0-rules.py"))
    (root / "single.txt").write_text("x = 1\n", encoding="utf-8")
    (root / "short").mkdir()
    (root / "single.txt").rename(root / "short" / "single.txt")
    build_dataset(root / "short", tokenizer, root / "single")
    return root


@pytest.fixture
def new_config(run_tool, tmp_path):
    """The tool: exit code, standard output and standard error. It writes `my.yaml`."""

    def run(*arguments, output=tmp_path / "my.yaml"):
        return run_tool("new_config.py", *arguments, "--output", output)

    return run


@pytest.fixture
def toy(tmp_path):
    directory = tmp_path / "toy"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(TOY), encoding="utf-8")
    return directory


@pytest.mark.parametrize(
    ("name", "gpus", "gigabytes"),
    [("Qwen2.5-7B", 8, 80), ("Qwen2.5-7B", 8, 40), ("Qwen2.5-7B", 2, 141), ("Llama-3.1-8B", 4, 80)],
)
def test_what_is_written_fits(new_config, data, tmp_path, name, gpus, gigabytes):
    write_model(tmp_path / name, MODELS[name])
    arguments = ("--gpus", gpus, "--gpu-memory", gigabytes, "--held-out", data / "held-out")
    code, out, err = new_config("--model", tmp_path / name, "--data", data / "train", *arguments)
    assert code == 0, err
    config = load_config(tmp_path / "my.yaml")
    plan = check_run(config, gpus)
    assert config.learn.reuse_rollout != "auto"
    assert needed_bytes(smallest_peak(config, plan, config.learn.reuse_rollout)) <= gigabytes * 1e9
    assert config.model.init_from == tmp_path / name and config.train.dtype == "bfloat16"
    assert config.train.global_batch_size % (config.train.micro_batch_size * plan.data_parallel_size) == 0
    assert f"--world-size {gpus}" in out
    # Every choice says why.
    assert "Planned: " in (tmp_path / "my.yaml").read_text(encoding="utf-8")


def test_too_small_gpus_are_told_what_is_missing(new_config, data, tmp_path):
    write_model(tmp_path / "model", MODELS["Qwen2.5-7B"])
    code, _, err = new_config("--model", tmp_path / "model", "--data", data / "train", "--gpus", 1, "--gpu-memory", 24)
    assert code == 2 and not (tmp_path / "my.yaml").exists()
    needed = float(re.search(r"needs (\S+) GB on each", err)[1])
    assert 100 < needed < 300 and "1 GPU of 24 GB" in err


def test_more_communication_only_where_it_is_needed(new_config, data, tmp_path):
    """Memory for less and less: first whole layers on a GPU, then fewer rows or less saved, then slices."""
    write_model(tmp_path / "model", MODELS["Qwen2.5-7B"])
    tensor_sizes = []
    for gigabytes in (80, 30, 20, 16):
        code, _, err = new_config(
            *("--model", tmp_path / "model", "--data", data / "train", "--gpus", 16),
            *("--gpu-memory", gigabytes, "--overwrite"),
        )
        assert code == 0, err
        parallel = yaml.safe_load((tmp_path / "my.yaml").read_text(encoding="utf-8"))["parallel"]
        tensor_sizes.append(parallel["tensor_parallel_size"] * parallel["pipeline_parallel_size"])
    assert tensor_sizes[0] == 1 and tensor_sizes == sorted(tensor_sizes) and tensor_sizes[-1] > 1


def test_a_directory_without_weights_is_random_with_the_vocabulary_of_the_data(new_config, data, toy, tmp_path):
    code, _, err = new_config("--model", toy, "--data", data / "train")
    assert code == 0, err
    config = load_config(tmp_path / "my.yaml")
    assert config.model.init_from is None
    assert config.model.config["vocab_size"] == VOCABULARY and "bos_token_id" not in config.model.config
    assert (config.train.dtype, config.zero.stage, config.ebft.ce_coef) == ("float32", 0, 1.0)
    assert config.evaluation.shards is None
    assert config.data.sequence_length == TOY["max_position_embeddings"]
    assert check_run(config, 1).num_micro_batches >= 1


def test_rows_get_shorter_with_less_data(new_config, data, toy, tmp_path):
    lengths = []
    for dataset in ("train", "little"):
        code, _, err = new_config(
            *("--model", toy, "--data", data / dataset, "--held-out", data / "held-out", "--overwrite")
        )
        assert code == 0, err
        lengths.append(load_config(tmp_path / "my.yaml").data.sequence_length)
    assert lengths[0] > lengths[1] >= 32


def test_too_little_held_out_data_is_said(new_config, data, toy, tmp_path):
    (tmp_path / "texts").mkdir()
    source = (data / "texts" / "0-rules.py").read_text(encoding="utf-8")
    tokenizer = load_tokenizer(data / "tokenizer")
    worth = {}
    for characters in (250, 4_000, 20_000):
        (tmp_path / "texts" / "a.py").write_text((source * 2)[:characters], encoding="utf-8")
        held_out = tmp_path / f"held-out-{characters}"
        build_dataset(tmp_path / "texts", tokenizer, held_out)
        code, _, err = new_config("--model", toy, "--data", data / "train", "--held-out", held_out, "--overwrite")
        assert code == 0, err
        config = load_config(tmp_path / "my.yaml")
        rows, length = config.evaluation.rows, config.data.sequence_length
        words = f"note: {held_out}: it holds {rows} whole rows of {length} tokens"
        worth[characters] = (rows < 8, rows < 64, f"{words}, whose figures say next to nothing, where 64" in err)
        assert (f"{words}, " in err) == (rows < 64) and err.count("it holds") == (rows < 64)
    assert list(worth.values()) == [(True, True, True), (False, True, False), (False, False, False)]


def test_paths_within_the_repository_are_relative(new_config, data, toy, tmp_path, monkeypatch):
    monkeypatch.chdir(data)
    code, _, err = new_config("--model", toy, "--data", "train")
    assert code == 0, err
    written = yaml.safe_load((tmp_path / "my.yaml").read_text(encoding="utf-8"))
    assert written["data"]["shards"] == str(data / "train")  # relative ones would start at the repository root


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--data", "single"), "--data: tokens: found"),
        (("--data", "missing"), "--data"),
        (("--held-out", "single"), "--held-out: tokens: found"),
        (("--gpus", "2"), "--gpu-memory"),
        (("--gpus", "0", "--gpu-memory", "80"), "--gpus"),
        (("--gpus", "2", "--gpu-memory", "-1"), "--gpu-memory"),
        (("--gpus", "2", "--gpu-memory", "nan"), "--gpu-memory"),
        (("--model", "missing"), "no directory"),
        (("--held-out", "other"), "--held-out: evaluation.shards: found tokens of a tokenizer"),
    ],
)
def test_what_is_wrong_is_named(new_config, data, toy, tmp_path, monkeypatch, arguments, words):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    options = {"--model": toy, "--data": "train"} | dict(zip(arguments[::2], arguments[1::2], strict=True))
    for option in ("--data", "--held-out"):
        if option in options:
            options[option] = data / options[option]
    code, _, err = new_config(*(part for pair in options.items() for part in pair))
    assert code == 2 and words in err and "Traceback" not in err
    assert "starter.yaml" not in err, "the place of a file that no user has seen"
    assert not (tmp_path / "my.yaml").exists()


def test_a_file_that_is_there_stays(new_config, data, toy, tmp_path):
    (tmp_path / "my.yaml").write_text("mine", encoding="utf-8")
    code, _, err = new_config("--model", toy, "--data", data / "train")
    assert code == 2 and "--overwrite" in err
    assert (tmp_path / "my.yaml").read_text(encoding="utf-8") == "mine"


def test_names_that_yaml_or_a_configuration_would_read_as_something_else(new_config, data, toy, tmp_path):
    strange = tmp_path / " ".join(["$HOME: a #c", *["long"] * 40])
    shutil.copytree(data / "train", strange)
    code, _, err = new_config("--model", toy, "--data", strange, output=tmp_path / "12.yaml")
    assert code == 0, err
    config = load_config(tmp_path / "12.yaml")
    assert config.data.shards == strange and config.output_dir == REPOSITORY / "runs" / "12"


@pytest.mark.parametrize("name", ["new\nline.yaml", "\udcff.yaml", "\u2028.yaml"])
def test_names_that_a_configuration_cannot_hold(new_config, data, toy, tmp_path, name):
    code, _, err = new_config("--model", toy, "--data", data / "train", output=tmp_path / name)
    assert code == 2 and err.startswith("error: --output: path: found ") and err.count("\n") == 1
    assert not (tmp_path / name).exists()


def test_weights_in_another_format_are_not_taken_for_none(new_config, data, toy, tmp_path):
    (toy / "pytorch_model.bin").write_bytes(b"x")
    code, _, err = new_config("--model", toy, "--data", data / "train")
    assert code == 2 and "--model" in err and "pytorch_model.bin" in err


def test_a_random_model_is_said_to_be_one(new_config, data, toy):
    code, _, err = new_config("--model", toy, "--data", data / "train")
    assert code == 0 and f"note: {toy}: no weights: the model is random" in err


@pytest.mark.parametrize(
    ("gpus", "start"),
    [
        (7, "deepspeed --num_gpus 7 launcher/train.py"),
        (12, "sbatch --nodes=2 --ntasks-per-node=6 --gpus-per-node=6 launcher/slurm/many_nodes.sbatch"),
        (16, "sbatch --nodes=2 launcher/slurm/many_nodes.sbatch"),
        (17, "sbatch --nodes=17 --ntasks-per-node=1 --gpus-per-node=1 launcher/slurm/many_nodes.sbatch"),
    ],
)
def test_the_printed_commands_are_for_all_gpus_and_their_memory(new_config, data, toy, tmp_path, gpus, start):
    arguments = ("--gpus", gpus, "--gpu-memory", 80.3)
    code, out, err = new_config("--model", toy, "--data", data / "train", *arguments)
    assert code == 0, err
    text = (tmp_path / "my.yaml").read_text(encoding="utf-8")
    options = f"--dry-run --world-size {gpus} --gpu-memory 80.3\n"
    assert f"#   {start} --config " in text and options in text and out.endswith(options)


@pytest.mark.parametrize("name", ["new\nline", "\udcff"])
def test_the_place_of_the_repository_may_have_any_name(data, toy, tmp_path, monkeypatch, name):
    """What lies in the repository is written from its root on."""
    repository = tmp_path / name
    repository.mkdir()
    shutil.copytree(toy, repository / "toy")
    shutil.copytree(data / "train", repository / "train")
    for module in ("io.expanded_paths", "config.paths"):
        monkeypatch.setattr(f"ebft_mega.{module}.REPOSITORY", repository)
    request = Request(repository / "toy", repository / "train", None, repository / "my.yaml", None, None)
    write_starter_config(request, repository)
    text = (repository / "my.yaml").read_text(encoding="utf-8")
    assert "  shards: train  # " in text and "--config my.yaml" in text

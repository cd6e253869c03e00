"""The command line of the conversion: what it prints, its exit codes, and what it refuses."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.tensor_shapes import hf_shapes
from ebft_mega.checkpoint.describing_files import read_describing_files
from ebft_mega.data.tokenizers.tokenizer_training import train_tokenizer
from ebft_mega.model.weights.model_directory import write_model
from tests.conftest import tiny_config
from tests.unit.written_checkpoint import VariedWeights, write_checkpoint

REPOSITORY = Path(__file__).resolve().parents[3]
TOOL = REPOSITORY / "tools" / "convert_hf.py"
VOCABULARY = 400


@pytest.fixture
def convert(run_tool):
    """The tool: exit code, standard output and standard error."""
    return functools.partial(run_tool, TOOL.name)


@pytest.fixture
def model(tmp_path):
    architecture = Architecture.from_hf(
        tiny_config("mistral", tied=False, vocab_size=VOCABULARY, initializer_range=0.1), "test"
    )
    source = VariedWeights(architecture, 1)
    pairs = ((name, source.tensor(name)) for name in hf_shapes(architecture))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.py").write_text(Path(__file__).read_text())
    train_tokenizer(tmp_path / "text", VOCABULARY, tmp_path / "tokenizer")
    write_model(
        tmp_path / "hf", architecture, pairs, torch.float32, read_describing_files(tmp_path / "tokenizer").contents
    )
    write_checkpoint(tmp_path / "run" / "checkpoints", architecture, source, small_files=tmp_path / "tokenizer")
    return tmp_path


USAGE = re.compile(r"\d+\.\d s; peak memory \d+ MiB, \d+ MiB of it before the work began")


def test_import_and_export_say_what_they_wrote(convert, model):
    code, out, _ = convert(
        *("import", "--input", model / "hf", "--output", model / "in", "--dtype", "bfloat16"),
        *("--shard-gigabytes", "0.00004"),
    )
    assert code == 0, out
    files = len(list((model / "in").glob("*.safetensors")))
    assert files > 2 and f"in: 39 tensors in {files} file(s), 0.000 GB, bfloat16" in out
    assert USAGE.search(out)
    code, out, _ = convert("export", "--checkpoint", model / "run", "--output", model / "out")
    assert code == 0 and "39 tensors in 1 file(s), 0.000 GB, bfloat16" in out and USAGE.search(out)
    assert f"from {model / 'run' / 'checkpoints' / 'step-00000003'}" in out
    assert (model / "out" / "tokenizer.model").read_bytes() == (model / "tokenizer" / "tokenizer.model").read_bytes()


def test_what_is_there_is_replaced_only_on_demand(convert, model):
    arguments = ("export", "--checkpoint", model / "run", "--output", model / "out")
    assert convert(*arguments)[0] == 0
    code, _, err = convert(*arguments)
    assert code == 2 and "--overwrite" in err
    assert convert(*arguments, "--overwrite")[0] == 0
    (model / "thesis").mkdir()
    (model / "thesis" / "chapter.tex").touch()
    code, _, err = convert("export", "--checkpoint", model / "run", "--output", model / "thesis", "--overwrite")
    assert code == 2 and "other files" in err and (model / "thesis" / "chapter.tex").exists()


def test_problems_come_all_at_once_with_code_2(convert, model):
    weights = model / "hf" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (model / "hf" / "config.json").write_text('{"model_type": "gpt2", "auto_map": {"AutoModel": "x.Y"}}')
    code, out, err = convert("import", "--input", model / "hf", "--output", model / "in")
    assert code == 2 and out == "" and "Traceback" not in err
    for words in ("auto_map", "model_type: found 'gpt2'; expected one of llama, mistral", "hidden_size", "bytes"):
        assert words in err
    assert convert("export", "--checkpoint", model / "nowhere", "--output", model / "in")[0] == 2
    assert not (model / "in").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("import", "--input", "x"),
        ("import", "--input", "x", "--output", "y", "--shard-gigabytes", "0"),
        ("import", "--input", "x", "--output", "y", "--shard-gigabytes", "nan"),
        ("export", "--checkpoint", "x", "--output", "y", "--dtype", "int8"),
        ("verify", "--model", "x", "--text", "y", "--positions", "0"),
    ],
)
def test_wrong_arguments_end_with_code_2(convert, arguments):
    code, _, err = convert(*arguments)
    assert code == 2 and "usage" in err


def test_verify_judges_by_the_tolerance(model):
    """A checkpoint against the model that it was made of, in a process of its own, twice."""
    checkpoint = model / "run" / "checkpoints" / "step-00000003"
    command = [sys.executable, str(TOOL), "verify", "--model", str(checkpoint), "--reference", str(model / "hf")]
    command += ["--text", str(model / "text" / "a.py"), "--positions", "64", "--tolerance"]
    processes = [
        subprocess.Popen(
            [*command, tolerance], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for tolerance in ("1e-5", "1e-12")
    ]
    (good, good_err), (bad, _) = (process.communicate(timeout=250) for process in processes)
    assert processes[0].returncode == 0, good_err
    assert "64 positions of 400 logits, float32" in good and "within the tolerance of 1e-05" in good
    if processes[1].returncode:
        assert "ABOVE the tolerance of 1e-12" in bad and USAGE.search(bad)
    else:  # kernels of some CPUs give both sides the same bits
        assert "within the tolerance of 1e-12" in bad

"""The outcome of a run promises nothing that is not there."""

import errno
import json
import shutil

import pytest
import torch

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.tensor_shapes import hf_shapes
from ebft_mega.errors import DirectoryLostError, LockLostError, PeerLostError, ResultsLostError, ShortageError
from ebft_mega.lifecycle.outcome import Outcome
from ebft_mega.lifecycle.results import show_results
from ebft_mega.metrics.announcer import Announcer
from ebft_mega.model.weights.model_directory import write_model
from ebft_mega.model.weights.weight_sources import RandomWeights
from ebft_mega.train.progress import Progress
from tests.conftest import tiny_config
from tests.unit.written_checkpoint import write_checkpoint


@pytest.fixture
def architecture():
    return Architecture.from_hf(tiny_config("llama", num_hidden_layers=1), "test")


@pytest.fixture
def finished(tmp_path, architecture):
    """A run directory with a model and metrics, and the outcome that is to be recorded in it."""
    source = RandomWeights(architecture, 0)
    pairs = ((name, source.tensor(name)) for name in hf_shapes(architecture))
    output = tmp_path / "run"
    output.mkdir()
    write_model(output / "hf", architecture, pairs, torch.float32)
    (output / "metrics.jsonl").write_text("")
    return Outcome(output, progress=Progress(step=3))


def test_what_is_whole_is_done(finished):
    finished.require_results(stopped=False)


LOSSES = {
    "metrics removed": lambda run: (run / "metrics.jsonl").unlink(),
    "model removed": lambda run: shutil.rmtree(run / "hf"),
    "weights removed": lambda run: (run / "hf" / "model.safetensors").unlink(),
    "configuration removed": lambda run: (run / "hf" / "config.json").unlink(),
    "weights cut off": lambda run: (run / "hf" / "model.safetensors").write_bytes(
        (run / "hf" / "model.safetensors").read_bytes()[:-1]
    ),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_lost_result_is_no_done(finished, loss):
    LOSSES[loss](finished.output)
    with pytest.raises(ResultsLostError, match="hf|metrics.jsonl"):
        finished.require_results(stopped=False)


def test_a_lost_directory_is_said_to_be_lost(finished):
    shutil.rmtree(finished.output)
    for stopped in (True, False):
        with pytest.raises(DirectoryLostError):
            finished.require_results(stopped)
    cause = finished.of_error(FileNotFoundError(2, "No such file or directory", "something in it"))
    assert isinstance(cause, DirectoryLostError) and not finished.output.exists()
    error = LockLostError("of another run")
    assert finished.of_error(error) is error


def test_a_lost_connection_is_one_line_and_another_error_stays_itself(finished):
    (finished.output / "status.json").unlink(missing_ok=True)
    error = RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:40869. This is typically caused by")
    assert isinstance(finished.of_error(error), PeerLostError)
    assert json.loads((finished.output / "status.json").read_text())["exit_code"] == 1
    (finished.output / "status.json").unlink()
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("Connection closed by peer")):
        (finished.output / "status.json").unlink(missing_ok=True)
        assert finished.of_error(error) is error


def test_a_shortage_of_the_machine_is_one_line(finished):
    cause = finished.of_error(OSError(errno.EMFILE, "Too many open files"))
    assert isinstance(cause, ShortageError) and "ulimit -n" in str(cause) and cause.exit_code == 1
    (finished.output / "status.json").unlink()
    cause = finished.of_error(RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)"))
    assert isinstance(cause, ShortageError) and "/dev/shm is full" in str(cause)


def test_a_stop_promises_the_checkpoint_of_its_step(finished, architecture):
    with pytest.raises(ResultsLostError, match="found no checkpoint, not that of step 3"):
        finished.require_results(stopped=True)
    write_checkpoint(finished.output / "checkpoints", architecture, RandomWeights(architecture, 0), step=3)
    finished.require_results(stopped=True)
    finished.progress.step = 4
    with pytest.raises(ResultsLostError, match="found step-00000003, not that of step 4"):
        finished.require_results(stopped=True)
    finished.begin(Progress(step=4))  # from a checkpoint elsewhere, and stopped before the first step
    finished.require_results(stopped=True)


def test_a_report_that_cannot_be_made_is_a_warning(tmp_path, capsys):

    def fail(output):
        raise RuntimeError("no ink")

    show_results(tmp_path, fail, Announcer())
    assert capsys.readouterr().out == f"model:  {tmp_path / 'hf'}\n"
    show_results(tmp_path, lambda output: output / "report.html", Announcer())
    assert capsys.readouterr().out.startswith(f"report: {tmp_path / 'report.html'}\nmodel:  ")

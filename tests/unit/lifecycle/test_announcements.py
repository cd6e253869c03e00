"""Every phase of a start, and of an end, has its line before its work begins."""

import time

import pytest

from ebft_mega.checkpoint.saver import CheckpointSaver
from ebft_mega.config.load import load_config
from ebft_mega.lifecycle import build, connecting, inputs, model_identity, results, run, start, tracing, training
from ebft_mega.lifecycle.run import run_training
from ebft_mega.metrics.announcer import Announcer
from ebft_mega.model.weights import stage_weights
from ebft_mega.model.weights.weight_sources import RandomWeights
from ebft_mega.planning.run_plan import check_run
from ebft_mega.planning.short_plan import TraceRequest
from ebft_mega.runtime.stop_requests import Signals
from ebft_mega.train import hooks, loop
from tests.distributed.runs import TEXT, make_datasets

CONNECTING = (
    (connecting, "connect_ranks", "start: setting up this process's device"),
    (run, "make_loader", "start: opening the datasets, and comparing them"),
    (connecting, "require_same_inputs", "start: opening the datasets, and comparing them"),
)
BUILDING = (
    (build, "build_feature_network", "start: building the feature network, 3 of 4 layers"),
    (stage_weights, "load_weights", "start: filling the feature network with weights, 28 tensors"),
    (build, "build_engine", "start: building the policy, 40,608 parameters, and its optimizer, ZeRO stage 0"),
    (stage_weights, "load_weights", "start: filling the policy with weights, 38 tensors"),
)
TAKING = (
    (run, "make_run_directory", "start: taking the run directory "),
    (run, "take_directory", "start: taking the run directory "),
    (start, "candidates", "start: looking for checkpoints to resume from in "),
)
OPENING = (
    (inputs, "held_out_rows", "start: reading 3 held-out rows, and the tokenizer"),
    (training, "read_described", "start: reading 3 held-out rows, and the tokenizer"),
    (results, "open_observer", "start: opening metrics and tensorboard in "),
)
ENDING = (
    (hooks, "evaluate_chunk", "end: evaluating the model of step "),
    (CheckpointSaver, "settle", "end: waiting until the checkpoint of step "),
    (results, "write_model", "end: writing the final model to "),
)
HASHING = ((RandomWeights, "digest", "start: hashing the initial model, 38 tensors"),)
# By kind of start: where the work of each phase is called, and how the line begins that was printed last by then.
WORKS = {
    "new": (
        *(*CONNECTING, *TAKING, *HASHING, *BUILDING, *OPENING),
        (hooks, "evaluate_chunk", "start: evaluating the model of step 0 on 3 held-out rows"),
        (loop, "train_step", "start: step 1: the first one of this start also compiles kernels"),
        *ENDING,
    ),
    "resumed": (
        *(*CONNECTING, *TAKING),
        (model_identity, "file_problems", "start: reading and hashing "),
        *(*HASHING, *BUILDING),
        (build, "restore_engine", "start: restoring master weights and moments from "),
        *OPENING,
        (loop, "train_step", "start: step 2: the first one of this start also compiles kernels"),
        *ENDING,
    ),
    "traced": (
        *(*CONNECTING, *BUILDING),
        (tracing, "observe_step", "start: letting estimators learn"),
        (tracing, "trace_step", "start: one optimizer step, traced into "),
    ),
}


def configuration(directory, steps):
    names = {"output_dir": "out", "data.shards": "train", "evaluation.shards": "held_out", "data.cache": "cache"}
    places = [f"{key}={directory / name}" for key, name in names.items()]
    (directory / "run.yaml").write_text(TEXT % ("llama", "true"))
    return load_config(directory / "run.yaml", [*places, "zero.stage=0", f"train.max_steps={steps}"])


def begin(config, announcer, trace=None):
    """Run what a configuration says, with a page that says that it is drawn."""

    def write_report(output):
        announcer.note("DRAWN")
        return output / "report.html"

    plan = check_run(config, 1)
    run_training(config, plan, trace, Signals(), time.monotonic(), write_report, announcer=announcer)


def watch(monkeypatch, works, said):
    """Note, whenever the work of a phase is called, what was printed last; returns the notes."""
    begun = []

    def noted(work, name):
        def call(*arguments, **named):
            begun.append((name, said[-1]))
            return work(*arguments, **named)

        return call

    for place, name in dict.fromkeys((place, name) for place, name, _ in works):
        monkeypatch.setattr(place, name, noted(getattr(place, name), name))
    return begun


@pytest.fixture(scope="module")
def directory(tmp_path_factory, groups):
    """Datasets and, after the first start, a run."""
    directory = tmp_path_factory.mktemp("announced")
    make_datasets(directory)
    return directory


@pytest.mark.parametrize(("kind", "steps"), [("new", 1), ("resumed", 2), ("traced", 2)])
def test_each_phase_is_announced_before_its_work_begins(directory, kind, steps, monkeypatch):
    said = [""]
    announcer = Announcer(said.append)
    for place in (hooks, training):
        monkeypatch.setattr(place, "announcer_of", lambda observer: announcer)
    monkeypatch.setattr(run, "setup_rank_log", lambda output, rank: output / "rank.log")  # logging stays the tests' own
    if kind == "resumed" and not (directory / "out").exists():  # this case was chosen alone
        begin(configuration(directory, 1), Announcer())
    begun = watch(monkeypatch, WORKS[kind], said)
    begin(
        configuration(directory, steps),
        announcer,
        TraceRequest(directory / "trace", warmup=1) if kind == "traced" else None,
    )
    order = list(dict.fromkeys(begun))  # work within a phase may be called again
    assert [name for name, _ in order] == [name for _, name, _ in WORKS[kind]]
    for (name, line), (_, _, beginning) in zip(order, WORKS[kind], strict=True):
        assert line.startswith(beginning), name
    if kind != "traced":
        assert said[said.index("DRAWN") - 1] == "end: drawing report.html"

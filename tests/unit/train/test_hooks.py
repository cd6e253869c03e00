"""What happens around a step, in which order, and what is left for a resumed run when a stop request interrupts it."""

import json
import logging
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from ebft_mega.metrics.sinks import MetricsWriter
from ebft_mega.runtime.stop_requests import StopReason
from ebft_mega.train import hooks as hooks_module
from ebft_mega.train.hooks import (
    CheckpointHook,
    EvaluationHook,
    HeldOut,
    ReportHook,
    StepHook,
    StepHooks,
    is_due,
    step_hooks,
)
from ebft_mega.train.observer import Observer
from ebft_mega.train.progress import Progress

TOTAL_STEPS = 10


class Events:
    """Stands for boundary, writer and watchdog; keeps what happened."""

    def __init__(self, interrupted=False):
        self.happened, self.interrupted = [], interrupted

    def stop_requested(self, progress):
        return self.interrupted

    def cross(self, progress, is_due):
        self.happened.append(("cross", progress.step, is_due, progress.pending))
        return StopReason.SIGTERM if self.interrupted else StopReason.NONE

    def take_seconds(self):
        return 2.5

    def finish(self):
        self.happened.append("finish")

    def log(self, step, metrics):
        self.happened.append(("log", step, dict(metrics)))

    def note(self, text):
        self.happened.append(text)

    def beat(self, achievement):
        self.happened.append(achievement)


def hooks_of(events, monkeypatch, interval=4, checkpoint_interval=5, final=False):
    """The hooks of a run whose evaluations say 1.0 unless they are interrupted."""

    def evaluate_now(trainer, held_out, step, observer, is_interrupted, count):
        return None if is_interrupted() else {"eval/ce_loss": 1.0}

    monkeypatch.setattr(hooks_module, "evaluate_now", evaluate_now)
    observer, held_out = Observer(events, None, None), HeldOut(None, None, interval, 12)
    return StepHooks(
        (
            EvaluationHook(None, held_out, TOTAL_STEPS, events, observer, events),
            ReportHook(observer),
            CheckpointHook(events, checkpoint_interval, final, TOTAL_STEPS),
        )
    )


def after(step):
    return Progress(step=step, pending={"train/loss": 0.5}, evaluation_pending=False)


def test_a_new_run_evaluates_reports_and_saves_nothing(monkeypatch):
    events, progress = Events(), Progress()
    assert hooks_of(events, monkeypatch).at_start(progress) == StopReason.NONE
    assert events.happened == [
        "start: evaluating the model of step 0 on 12 held-out rows",
        "evaluation after step 0",
        ("log", 0, {"eval/ce_loss": 1.0}),
        ("cross", 0, False, None),
    ]
    assert [record.step for record in progress.evaluations] == [0]


def test_a_resumed_run_only_hears_requests(monkeypatch):
    events, progress = Events(), Progress(step=5, pending=None, evaluation_pending=False)
    hooks_of(events, monkeypatch).at_start(progress)
    assert events.happened == [("cross", 5, False, None)]


@pytest.mark.parametrize(("step", "evaluated", "saved"), [(3, False, False), (4, True, False), (5, False, True)])
def test_metrics_are_reported_after_the_evaluation_and_before_the_checkpoint(monkeypatch, step, evaluated, saved):
    events, progress = Events(), after(step)
    hooks_of(events, monkeypatch).after_step(progress)
    metrics = {"train/loss": 0.5} | ({"eval/ce_loss": 1.0} if evaluated else {})
    expected = [f"evaluation after step {step}"] * evaluated
    assert events.happened == [*expected, ("log", step, metrics), ("cross", step, saved, None)]


def test_the_last_step_is_evaluated_and_saved(monkeypatch):
    events = Events()
    hooks_of(events, monkeypatch, interval=None).after_step(after(TOTAL_STEPS))
    assert events.happened[:2] == [
        f"end: evaluating the model of step {TOTAL_STEPS} on 12 held-out rows",
        f"evaluation after step {TOTAL_STEPS}",
    ]
    assert events.happened[-1] == ("cross", TOTAL_STEPS, True, None)


def test_an_interrupted_evaluation_is_left_to_the_resumed_run(monkeypatch):
    events, progress = Events(interrupted=True), after(4)
    assert hooks_of(events, monkeypatch).after_step(progress) == StopReason.SIGTERM
    assert events.happened == [("cross", 4, False, {"train/loss": 0.5})], "nothing is reported without its evaluation"
    assert progress.evaluation_pending and progress.evaluations == []
    resumed = Events()
    assert hooks_of(resumed, monkeypatch, interval=100).at_start(progress) == StopReason.NONE
    assert resumed.happened == [
        "start: evaluating the model of step 4 on 12 held-out rows",
        "evaluation after step 4",
        ("log", 4, {"train/loss": 0.5, "eval/ce_loss": 1.0}),
        ("cross", 4, False, None),
    ]


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize(("interval", "due"), [(None, ()), (4, (4, 8)), (5, (5, TOTAL_STEPS)), (100, ())])
def test_checkpoints_are_due_at_the_interval_and_if_they_are_wanted_after_the_last_step(
    monkeypatch, interval, due, final
):
    events = Events()
    hooks = hooks_of(events, monkeypatch, checkpoint_interval=interval, final=final)
    for step in range(TOTAL_STEPS + 1):
        hooks.after_step(after(step))
    found = [step for word, step, is_due, *_ in (event for event in events.happened if event[0] == "cross") if is_due]
    assert found == sorted({*due, *([TOTAL_STEPS] if final else [])})


def test_contexts_metrics_and_ends_reach_every_hook():
    order = []

    class Named(StepHook):
        def __init__(self, name):
            self.name = name

        @contextmanager
        def around_step(self, step):
            order.append(f"{self.name} before {step}")
            yield
            order.append(f"{self.name} behind {step}")

        def metrics(self):
            return {self.name: 1.0}

        def finish(self):
            order.append(f"{self.name} finished")

        def close(self):
            order.append(f"{self.name} closed")

    hooks = StepHooks((Named("a"), Named("b")))
    with hooks.around_step(3):
        order.append("step")
    assert hooks.metrics() == {"a": 1.0, "b": 1.0}
    hooks.finish()
    hooks.close()
    assert order == [
        *("a before 3", "b before 3", "step", "b behind 3", "a behind 3"),
        *("a finished", "b finished", "a closed", "b closed"),
    ]


def test_the_order_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(hooks_module.dist, "get_rank", lambda: 0)
    config = SimpleNamespace(
        profile=SimpleNamespace(traced_steps=range(0)),
        output_dir=tmp_path,
        checkpoint=SimpleNamespace(interval=None, final=True),
    )
    trainer = SimpleNamespace(config=config, groups=SimpleNamespace(device=SimpleNamespace(type="cpu")), noise=None)
    found = step_hooks(trainer, None, TOTAL_STEPS, Events(), None, Events())
    names = [type(hook).__name__ for hook in found._hooks]
    assert names == ["ProfileHook", "FirstStepHook", "NoiseHook", "EvaluationHook", "ReportHook", "CheckpointHook"]


@pytest.mark.parametrize(("step", "interval", "due"), [(0, 4, True), (3, 4, False), (8, 4, True), (10, None, True)])
def test_due(step, interval, due):
    assert is_due(step, interval, TOTAL_STEPS) == due


class Shown:
    """A block that an evaluation shows."""

    row, block, context, target, rollouts, alignment = 3, 1, [1, 2], [3], [[4], [5]], [0.5, 0.25]


@pytest.mark.parametrize("obstacle", ["nothing", "tokenizer", "directory"])
def test_blocks_that_cannot_be_shown_are_a_warning(tmp_path, obstacle, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ebft_mega"), "propagate", True)

    class Broken:
        def decode(self, ids):
            if obstacle == "tokenizer":
                raise IndexError("id is out of range.")
            return " ".join(map(str, ids))

    samples = tmp_path / "samples.jsonl"
    if obstacle == "directory":
        samples.mkdir()
    writer = MetricsWriter(tmp_path, total_steps=2, console=False)
    observer = Observer(writer, samples, Broken())
    for step in (1, 2):
        observer.show_blocks(step, SimpleNamespace(shown=[Shown]))
    writer.close()
    expected = 0 if obstacle == "nothing" else 1
    assert sum("samples.jsonl" in record.message for record in caplog.records) == expected
    if obstacle == "nothing":
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2]
        assert lines[0]["rollouts"] == ["4", "5"]

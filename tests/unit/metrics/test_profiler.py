"""The trace that a person opens: which steps are in it, and what lies inside of what."""

import gzip
import json

import pytest
import torch

from ebft_mega.metrics.profiler import StepProfiler
from ebft_mega.metrics.timers import PhaseTimers

CPU = torch.device("cpu")


def steps_of(profiler: StepProfiler, count: int) -> None:
    """Steps of two phases, each with one product; the one of step i is `[i + 1, i + 1]`."""
    timers = PhaseTimers()
    for step in range(count):
        with profiler.step(step):
            with timers.phase("rollout"):
                torch.ones(2, 2).matmul(torch.ones(2, 2))
            with timers.phase("learn"):
                torch.ones(2, 2, requires_grad=True).exp().sum().backward()


def events_of(path) -> list[dict]:
    with gzip.open(path, "rt") as file:
        return [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]


def inside(inner: dict, outer: dict) -> bool:
    return (
        inner is not outer
        and inner["tid"] == outer["tid"]
        and outer["ts"] <= inner["ts"]
        and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]
    )


def test_trace_has_the_steps_asked_for_with_their_phases_and_kernels(tmp_path):
    said = []
    with StepProfiler(range(2, 4), tmp_path / "profile", rank=7, device=CPU, announce=said.append) as profiler:
        steps_of(profiler, 6)
    path = tmp_path / "profile" / "rank-0007.json.gz"
    assert said == [f"profile of steps 3 to 4: {tmp_path / 'profile'} (one file per rank)"]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    # A range is there once on the side of the host, as an annotation.
    events = events_of(path)
    steps = [event for event in events if event["name"].startswith("step ")]
    assert sorted(event["name"] for event in steps) == ["step 3", "step 4"]
    for step in steps:
        within = [event for event in events if inside(event, step)]
        for phase, kernel, stranger in (("rollout", "aten::mm", "aten::exp"), ("learn", "aten::exp", "aten::mm")):
            (found,) = [event for event in within if event["name"] == phase]
            kernels = {event["name"] for event in within if inside(event, found)}
            assert kernel in kernels and stranger not in kernels
    assert sum(event["name"] == "aten::mm" for event in events) == 2


def test_without_steps_nothing_happens(tmp_path):
    with StepProfiler(range(0), tmp_path / "profile", 0, CPU, announce=None) as profiler:
        steps_of(profiler, 2)
    assert not (tmp_path / "profile").exists()


def test_a_failing_step_ends_the_recording_without_a_file(tmp_path):
    with pytest.raises(RuntimeError, match="step"):
        with StepProfiler(range(0, 5), tmp_path / "profile", 0, CPU, announce=None) as profiler, profiler.step(0):
            raise RuntimeError("step")
    assert not (tmp_path / "profile").exists()
    assert not torch.autograd.profiler._is_profiler_enabled


def test_a_run_that_resumes_within_the_steps_traces_the_rest(tmp_path):
    with StepProfiler(range(1, 4), tmp_path, 0, CPU, announce=None) as profiler:
        for step in (2, 3, 4):
            with profiler.step(step):
                torch.ones(1)
    names = {event["name"] for event in events_of(tmp_path / "rank-0000.json.gz")}
    assert {"step 3", "step 4"} <= names and "step 5" not in names


def test_a_disk_that_refuses_the_file_does_not_stop_the_training(tmp_path, caplog):
    (tmp_path / "profile").write_text("in the way")
    with StepProfiler(range(0, 1), tmp_path / "profile", 0, CPU, announce=print) as profiler:
        steps_of(profiler, 2)
    assert "the profile could not be written" in caplog.text

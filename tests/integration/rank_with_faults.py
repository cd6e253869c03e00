"""A rank of the main job that fails or waits where a test wants it to; stands for `launcher/train.py`.

The environment says what: EBFT_FAULTS is a JSON object of the keys below, EBFT_FAULT_NOTES a directory. A rank that
waits makes a file `holding-RANK` there, and continues when there is a file `go`.

    stage   waits at this stage of the first checkpoint that it writes (see STAGES)
    phase   waits in this phase (see PHASES) for the `call`-th time
    clock   seconds that the run's own clock has jumped ahead when a wait in a phase ends
    full    the number of a rank whose disk is full while it writes its part of the first checkpoint
    room    bytes that the disk has free when the first checkpoint begins
    feature the number of a rank of whose features one is NaN in every pass
"""

import importlib
import json
import os
import resource
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ROOT / "launcher" / "train.py"
FULL_AT_BYTES = 20_000
# Where a checkpoint is when it waits: the function, whether it waits before or after it, and on which ranks.
STAGES = {
    "files half written": ("ebft_mega.model.weights.tensor_file:TensorFileWriter.write", "after", (0, 1)),
    "one rank's files missing": ("ebft_mega.checkpoint.saver:write_state_shards", "before", (1,)),
    "all files written": ("ebft_mega.checkpoint.saver:merge_indices", "before", (0,)),
    "no manifest": ("ebft_mega.checkpoint.saver:write_manifest", "before", (0,)),
    "manifest written": ("ebft_mega.checkpoint.saver:publish", "before", (0,)),
    "renamed": ("ebft_mega.checkpoint.saver:point_latest", "before", (0,)),
    "latest half replaced": ("ebft_mega.checkpoint.saver:point_latest", "half", (0,)),
    "complete": ("ebft_mega.checkpoint.saver:point_latest", "after", (0,)),
    "old one half deleted": ("ebft_mega.checkpoint.commit:shutil.rmtree", "half", (0,)),
}
PHASES = {
    "start": "ebft_mega.lifecycle.build:build_trainer",
    "rollout": "ebft_mega.train.step:generate_rollouts",
    "learning": "ebft_mega.train.step:learn",
    "evaluation": "ebft_mega.train.hooks:evaluate_chunk",
    "end": "ebft_mega.lifecycle.training:export",
}


def wrap(target: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace `module:name.of.function` by what `around` makes of it."""
    module, _, path = target.partition(":")
    *parents, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for parent in parents:
        owner = getattr(owner, parent)
    setattr(owner, name, around(getattr(owner, name)))


def hold() -> None:
    """Say that this rank waits, and wait."""
    notes = Path(os.environ["EBFT_FAULT_NOTES"])
    (notes / f"holding-{os.environ['RANK']}").touch()
    while not (notes / "go").exists():
        time.sleep(0.01)


def hold_at_stage(stage: str) -> None:
    target, where, ranks = STAGES[stage]
    if int(os.environ["RANK"]) not in ranks:
        return

    def around(function):
        def held(*arguments, **options):
            if where == "half" and is_meant(*arguments):
                half(*arguments)
            if where == "before":
                hold()
            result = function(*arguments, **options)
            if where == "after":
                hold()
            return result

        return held

    def is_meant(path, *more):
        return stage != "old one half deleted" or ".expired" in Path(path).name  # others are what a kill has left

    def half(path, *more):
        """What such an operation leaves when it is interrupted."""
        if stage == "old one half deleted":
            (Path(path) / "manifest.json").unlink()
        else:
            (Path(path) / ".latest.tmp").write_text(more[0][:3])
        hold()

    wrap(target, around)


def hold_in_phase(phase: str, call: int, clock: float) -> None:
    calls = 0

    def around(function):
        def held(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == call:
                hold()
                stop_requests = importlib.import_module("ebft_mega.runtime.stop_requests")
                stop_requests.time = SimpleNamespace(monotonic=lambda: time.monotonic() + clock)
            return function(*arguments, **options)

        return held

    wrap(PHASES[phase], around)


def once(target: str, first: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Let something else happen at the first call."""
    seen: list[None] = []

    def around(function):
        def replaced(*arguments, **options):
            chosen = function if seen else first(function)
            seen.append(None)
            return chosen(*arguments, **options)

        return replaced

    wrap(target, around)


def fill_disk(rank: int) -> None:
    """No file of this rank grows beyond a size while it writes its part: the system refuses it, as on a full disk."""
    if int(os.environ["RANK"]) != rank:
        return

    def first(function):
        def limited(*arguments, **options):
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_AT_BYTES, hard))
            try:
                return function(*arguments, **options)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

        return limited

    once("ebft_mega.checkpoint.saver:write_state_shards", first)


def spoil_a_feature(rank: int) -> None:
    """One number of one rollout's feature is NaN, in steps and in evaluations."""

    def around(function):
        def spoiled(taps, *others):
            taps[0][0, 0, 0, 0, 0] = float("nan")
            return function(taps, *others)

        return spoiled

    if int(os.environ["RANK"]) == rank:
        wrap("ebft_mega.features.network:block_grams", around)


def main(arguments: list[str]) -> None:
    """Be a rank; ends with `SystemExit`."""
    faults = json.loads(os.environ.get("EBFT_FAULTS", "{}"))
    if "stage" in faults:
        hold_at_stage(faults["stage"])
    if "phase" in faults:
        hold_in_phase(faults["phase"], faults["call"], faults.get("clock", 0.0))
    if "full" in faults:
        fill_disk(faults["full"])
    if "feature" in faults:
        spoil_a_feature(faults["feature"])
    if "room" in faults:
        usage = SimpleNamespace(free=faults["room"])
        once("ebft_mega.checkpoint.saver:shutil.disk_usage", lambda function: lambda path: usage)
    sys.argv = [str(LAUNCHER), *arguments]
    runpy.run_path(str(LAUNCHER), run_name="__main__")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(sys.argv[1:])

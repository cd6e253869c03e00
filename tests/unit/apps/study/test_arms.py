"""The commands of the quickstart: what is overridden, what is compared, what is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest

from ebft_mega.apps.study.arms import (
    CONFIGS,
    CROSS_ENTROPY,
    DATA_CODE,
    EBFT,
    WARM_START,
    WORKSPACE,
    Experiment,
    Scale,
)
from ebft_mega.apps.study.commands import free_port, thread_environment
from ebft_mega.apps.study.phases import PhaseRunner
from ebft_mega.errors import ConfigError

ROOT = Path(__file__).resolve().parents[4]


class RecordingRunner(PhaseRunner):
    """Notes commands instead of running them."""

    def run(self, name, command, status_of=None):
        self.commands = {**getattr(self, "commands", {}), name: list(command)}
        if status_of is not None:
            status_of.mkdir(parents=True, exist_ok=True)
            (status_of / "status.json").write_text(json.dumps({"state": "done"}))
        return 1.0


@pytest.fixture
def root(tmp_path):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "ebft_mega" / "data").mkdir(parents=True)
    (tmp_path / "ebft_mega" / "errors.py").touch()
    return tmp_path


def experiment(root, **changes):
    arguments = {"workspace": WORKSPACE, "data": WORKSPACE / "data", "num_ranks": 2} | changes
    return Experiment(RecordingRunner(root, say=lambda _: None), **arguments)


def overrides(command):
    return {text for flag, text in zip(command, command[1:], strict=False) if flag == "--set"}


def test_the_plain_quickstart_overrides_nothing(root):
    quickstart = experiment(root)
    quickstart.run_arms("validation")
    commands = quickstart.runner.commands
    assert list(commands) == [
        "corpus",
        "tokenizer",
        "shards train",
        "shards tuning",
        "shards validation",
        "warm start",
        "EBFT",
        "CE-only",
        "evaluate warm start",
        "evaluate CE-only",
        "evaluate EBFT",
    ]
    for arm in (WARM_START, CROSS_ENTROPY, EBFT):
        command = commands[arm]
        assert Path(command[0]).name == "deepspeed"
        assert command[-4:] == ["launcher/train.py", "--config", str(CONFIGS[arm]), "--fresh"]


def test_every_arm_is_evaluated_alike(root):
    quickstart = experiment(root, scale=Scale(1.0, 48))
    for arm in (WARM_START, CROSS_ENTROPY, EBFT):
        quickstart.evaluate(arm, "tuning")
    commands = list(quickstart.runner.commands.values())
    distinct = [index for index, parts in enumerate(zip(*commands, strict=True)) if len(set(parts)) > 1]
    assert [commands[0][index - 1] for index in distinct] == ["--model", "--output"]
    assert commands[0][commands[0].index("--data") + 1] == "runs/quickstart/data/tuning"
    assert commands[0][commands[0].index("--rows") + 1] == "48"


def test_a_study_moves_seeds_and_paths(root):
    study = experiment(root, workspace=Path("runs/study/seed-5"), seed=5, ebft_overrides=("ebft.ce_coef=0.1",))
    study.train(EBFT)
    assert overrides(study.runner.commands["EBFT (seed 5)"]) == {
        "ebft.ce_coef=0.1",
        "output_dir=runs/study/seed-5/ebft",
        "model.init_from=runs/study/seed-5/warmstart/hf",
        "seed=5",
    }
    assert study.config(EBFT).ebft.ce_coef == 0.1
    assert study.config(CROSS_ENTROPY).ebft.ce_coef == 1.0


def test_datasets_are_made_anew_when_any_code_that_builds_them_changes():
    rooms = [ROOT / "ebft_mega" / "data" / room for room in ("text", "store", "builder")]
    sources = [path.read_text() for room in rooms for path in room.glob("*.py")]
    imported = {name for source in sources for name in re.findall(r"from ebft_mega\.(\w+)", source)}
    assert imported == {name.removesuffix(".py") for name in DATA_CODE}


def test_a_small_budget_takes_fewer_steps_and_keeps_the_schedule_valid(root):
    small = experiment(root, scale=Scale(0.0))
    for arm in CONFIGS:
        config = small.config(arm)
        assert config.total_steps == 2
        assert config.train.warmup_steps < 2
    small.check_equal_steps()


def test_an_earlier_run_of_an_arm_is_set_aside_by_the_launcher_and_never_removed(root):
    quickstart = experiment(root)
    left = [root / WORKSPACE / name / "checkpoints" for name in ("ebft", "warmstart")]
    for folder in left:
        folder.mkdir(parents=True)
    quickstart.run_arms("validation")
    assert all(folder.exists() for folder in left)
    commands = quickstart.runner.commands
    assert all("--fresh" in commands[arm] for arm in (EBFT, CROSS_ENTROPY, WARM_START))


def test_arms_of_unequal_length_are_refused(root):
    path = root / CONFIGS[CROSS_ENTROPY]
    path.write_text(re.sub(r"max_steps: \d+", "max_steps: 90", path.read_text()))
    with pytest.raises(ConfigError, match=r"quickstart_ce.yaml: train.max_steps: found 90; expected 1\d\d"):
        experiment(root).run_arms("validation")


def test_both_arms_differ_only_in_the_objective():
    """What is compared is the objective: model, data, geometry and evaluation are the same in both files."""
    quickstart = Experiment(PhaseRunner(ROOT), WORKSPACE, WORKSPACE / "data", num_ranks=1)
    ebft, cross_entropy = (quickstart.config(arm).model_dump() for arm in (EBFT, CROSS_ENTROPY))
    differing = {
        f"{section}.{key}"
        for section, values in ebft.items()
        if isinstance(values, dict)
        for key, value in values.items()
        if cross_entropy[section][key] != value
    }
    assert differing == {"ebft.rl_coef", "ebft.ce_coef", "train.lr"}
    assert ebft["seed"] == cross_entropy["seed"], "the same rows in the same order"


@pytest.mark.parametrize("num_cpus, num_ranks, threads", [(2, 2, "1"), (2, 1, "2"), (1, 2, "1"), (64, 2, "4")])
def test_threads_are_shared_out(monkeypatch, num_cpus, num_ranks, threads):
    monkeypatch.setattr("ebft_mega.apps.study.commands.os.cpu_count", lambda: num_cpus)
    assert thread_environment(num_ranks) == {"OMP_NUM_THREADS": threads}


def test_free_ports_can_be_bound():
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", free_port()))


def test_a_parallel_layout_is_that_of_every_training_run(root):
    quickstart = experiment(root, overrides=("parallel.pipeline_parallel_size=2",))
    quickstart.run_arms("validation")
    trained = [command for command in quickstart.runner.commands.values() if "launcher/train.py" in command]
    assert len(trained) == 3
    assert all("parallel.pipeline_parallel_size=2" in overrides(command) for command in trained)

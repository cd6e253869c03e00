"""A whole experiment with commands that leave what real ones would; resumed, changed, failing."""

import json

import pytest

from ebft_mega.apps.experiment.running.experiment_directory import set_aside
from ebft_mega.apps.experiment.running.job_pool import JobFailed
from ebft_mega.errors import InputProblems

TRAINED = [
    *("train warm/seed-5", "train ce/train.lr-0.001/seed-1000", "train ce/train.lr-0.002/seed-1000"),
    *(f"train {arm}/train.lr-0.001/seed-{seed}" for arm in ("ce", "ebft") for seed in (0, 1)),
]


def test_a_whole_experiment(small, capsys):
    small.run(until="report")
    trained = [name for name in small.started if name.startswith("train")]
    assert sorted(trained) == sorted(TRAINED)
    assert trained[0] == TRAINED[0] and set(trained[1:3]) == set(TRAINED[1:3])  # what others need comes first
    evaluated = [name for name in small.started if name.endswith("on report")]
    models = [each for name in evaluated for each in name.removesuffix(" on report").split()[1::2]]
    # Each main run once, and none of the tuning; several in one process.
    assert sorted(models) == sorted(name.removeprefix("train ") for name in TRAINED if "1000" not in name)
    assert len(evaluated) == 2 and small.started[-2:] == evaluated
    results = json.loads((small.output / "results.json").read_text())
    assert results["chosen"] == {"ce": [["train.lr", 0.001]]}
    assert len(results["trials"]) == 7 and all(each["cost"]["cpu_seconds"] is not None for each in results["trials"])
    assert (small.output / "report.html").is_file()
    assert "7 of" not in capsys.readouterr().err


def test_what_is_done_is_not_done_again_and_what_is_added_is(small):
    small.run()
    small.run()
    assert small.started == []
    small.spec["arms"]["late"] = {"like": "ebft", "set": {"ebft.ce_coef": 0.5}, "seeds": [0]}
    small.spec["seeds"] = [0, 1, 2]
    small.spec["secondary"] = [{"arm": "late", "against": "ce"}]
    with pytest.raises(InputProblems, match="reported on before, with other settings, in .*one"):
        small.run()
    small.run(may_reuse_report_split=True)
    assert [name for name in small.started if name.startswith("train")] == [
        "train ce/train.lr-0.001/seed-2",
        "train ebft/train.lr-0.001/seed-2",
        "train late/train.lr-0.001/seed-0",
    ]


def test_stages_and_arms_can_be_named(small):
    small.run(until="tune")
    assert not any("on report" in name for name in small.started) and not (small.output / "results.json").exists()
    small.run(only=("ce",))
    assert not any("ebft" in name for name in small.started) and any("on report" in name for name in small.started)
    with pytest.raises(InputProblems, match="tune.*train"):
        small.run(until="tuning")
    with pytest.raises(InputProblems, match="Did you mean 'ebft'"):
        small.run(only=("ebtf",))


def test_a_failed_run_is_named_with_its_last_words_and_the_rest_stays(small):
    small.fails = {"ce/train.lr-0.002/seed-1000"}
    with pytest.raises(JobFailed, match=r"train ce train.lr=0.002 seed 1000: failed \(exit code 7\)") as caught:
        small.run()
    assert "this is why" in str(caught.value) and caught.value.exit_code == 7
    small.fails = set()
    small.run(until="tune")
    assert small.started[0] == "train ce/train.lr-0.002/seed-1000"
    assert len(small.started) == 3 and all(name.startswith("evaluate ce") for name in small.started[1:])


def test_evaluations_that_share_a_process_are_each_their_own(small):
    small.run(until="train")
    small.fails = {" on report"}
    with pytest.raises(JobFailed, match=r"evaluate on report: .*ce train.lr=0.001 seed 0.*exit code 7"):
        small.run()
    small.fails = set()
    assert not list((small.output / "evaluations" / "report").glob("ce"))
    small.run()
    places = sorted((small.output / "evaluations" / "report").rglob("evaluation.json"))
    assert len(places) == 5 and not list(small.output.rglob(".batch-*/*"))
    stamps = [json.loads((each.parent.parent / f".{each.parent.name}.json").read_text()) for each in places]
    assert all(stamp["is_done"] and stamp["starts"][-1]["exit_code"] == 0 for stamp in stamps)
    assert len({json.dumps(stamp["inputs"]["model"]) for stamp in stamps}) == 5
    (small.output / "evaluations" / "report" / "warm" / "seed-5" / "evaluation.json").unlink()
    small.run()
    assert small.started == ["evaluate warm/seed-5 on report"]


def test_a_changed_setting_is_named_and_nothing_starts(small):
    small.run(until="train")
    small.spec["arms"]["ebft"]["set"]["ebft.alignment_coef"] = 2.0
    with pytest.raises(InputProblems) as caught:
        small.run()
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("train ebft train.lr=0.001 seed 0: ebft.alignment_coef: found 2.0; expected 1.0")
    assert len(lines) == 3 and "--fresh" in lines[-1]
    assert small.started == []


def test_changed_data_is_named_by_the_runs_that_it_changes(small):
    small.run(until="train")
    small.write_split("train", [44, 45])
    with pytest.raises(InputProblems, match="train warm seed 5: training data: found"):
        small.run()
    assert small.started == []
    small.run(is_fresh=True, until="train")
    assert sorted(small.started)[-1] == TRAINED[0]
    aside = list((small.output / "previous").glob("*/runs/warm/seed-5"))
    assert len(aside) == 1  # nothing is deleted


def test_other_conditions_need_other_evaluations_alone(small):
    small.run()
    small.spec["tuning"]["rows"] = 20
    with pytest.raises(InputProblems, match="--fresh-evaluations"):
        small.run(may_reuse_report_split=True)
    small.run(may_reuse_report_split=True, has_fresh_evaluations=True)
    assert small.started and all(name.startswith("evaluate") for name in small.started)
    # The quickstart sets aside by itself what has changed, and no more.
    small.spec["tuning"]["rows"] = 24
    small.run(may_reuse_report_split=True, sets_changes_aside=True)
    assert small.started and all(name.startswith("evaluate") for name in small.started)
    small.spec["arms"]["ebft"]["set"]["ebft.alignment_coef"] = 2.0
    small.run(may_reuse_report_split=True, sets_changes_aside=True)
    assert sorted(name for name in small.started if name.startswith("train")) == sorted(TRAINED)


def test_what_is_set_aside_twice_within_a_second_lies_in_two_folders(tmp_path):
    for number in range(3):
        (tmp_path / "evaluations").mkdir()
        (tmp_path / "evaluations" / str(number)).touch()
        set_aside(tmp_path, lambda text: None)
    found = sorted(path.name for path in (tmp_path / "previous").glob("*/evaluations/*"))
    assert found == ["0", "1", "2"] and len(list((tmp_path / "previous").iterdir())) == 3


def test_keys_that_a_run_refuses_are_named_before_anything_starts(small):
    small.spec["arms"]["ebft"]["set"]["ebft.alignment_koef"] = 2.0
    small.spec["arms"]["ce"]["tune"]["train.lr"] = [0.001, -1]
    with pytest.raises(InputProblems) as caught:
        small.run()
    text = str(caught.value)
    assert "ebft.alignment_koef: found an unknown key" in text and "train.lr: found -1" in text
    assert f"{small.folder / 'spec.yaml'}:" in text and small.started == [] and not small.output.exists()


def test_overrides_hold_for_every_run(small):
    small.run(until="train-1", overrides=("train.max_steps=2",))
    stamp = json.loads((small.output / "runs" / "warm" / ".seed-5.json").read_text())
    assert stamp["inputs"]["settings"]["train.max_steps"] == 2
    with pytest.raises(InputProblems, match="train.max_steps: found 3; expected 2, as it was run"):
        small.run(until="train-1")


def test_one_process_at_a_time(small):
    from filelock import FileLock

    small.output.mkdir(parents=True)
    with FileLock(small.output / ".experiment.lock"), pytest.raises(InputProblems, match="another process"):
        small.run()

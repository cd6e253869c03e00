"""What is chosen on the tuning split: values, temperatures, ties, directions, and notes of edges."""

import dataclasses
import json

import pytest

from ebft_mega.apps.experiment.choosing import best_temperatures, choose, edge_notes
from ebft_mega.errors import InputError
from tests.unit.apps.experiment.written_experiment import Truth, spec_of, write_results

RATES = tuple((("optim.lr", rate),) for rate in (1e-4, 3e-4, 1e-3))
TUNED = {"a": {"tune": {"optim.lr": (1e-4, 3e-4, 1e-3)}}, "b": {}}
TWO = (1000, 1001)


def tried(*truths):
    return {"a": [(choice, dataclasses.replace(truth, seeds=TWO)) for choice, truth in zip(RATES, truths, strict=True)]}


def spec_with(**tuning):
    return spec_of(arms=TUNED, tuning={"seeds": TWO, "rows": 24, **tuning})


def test_the_lowest_at_each_runs_own_best_temperature_is_chosen(tmp_path):
    """The middle rate is best at T = .6, where the others are far from their best."""
    truths = tried(Truth(fm=0.21, best=1.0), Truth(fm=0.20, best=0.6), Truth(fm=0.23, best=0.8))
    results = write_results(tmp_path, {}, tried=truths)
    assert choose(spec_with(), results) == {"a": RATES[1]}


def test_only_the_tuning_runs_count(tmp_path):
    truths = tried(Truth(fm=0.21), Truth(fm=0.20), Truth(fm=0.23))
    mains = {"a": Truth(fm=0.01), "b": Truth()}
    assert choose(spec_with(), write_results(tmp_path, mains, {"a": RATES[2]}, truths)) == {"a": RATES[1]}


def test_where_higher_is_better_the_highest_is_chosen(tmp_path):
    results = write_results(tmp_path, {}, tried=tried(Truth(), Truth(), Truth()))
    for result in results.trials:
        path = result.tuning / "evaluation.json"
        content = json.loads(path.read_text())
        for condition in content["conditions"]:
            value = 0.5 if result.trial.choice == RATES[2] else 0.1
            condition["per_row"]["eval/alignment"] = [value] * content["rows"]
        path.write_text(json.dumps(content))
    assert choose(spec_with(metric="alignment"), results) == {"a": RATES[2]}


def test_the_mean_over_tuning_seeds_decides_and_ties_go_to_the_first(tmp_path):
    equal = Truth(fm=0.2, spread=0.0, noise=0.0)
    results = write_results(tmp_path, {}, tried=tried(equal, equal, equal))
    assert choose(spec_with(), results) == {"a": RATES[0]}


def test_values_that_lack_a_seed_are_not_chosen(tmp_path):
    results = write_results(tmp_path, {}, tried=tried(Truth(fm=0.1), Truth(fm=0.2), Truth(fm=0.3)))
    lacking = [
        dataclasses.replace(each, tuning=None) if each.trial.choice == RATES[0] and each.trial.seed == 1001 else each
        for each in results.trials
    ]
    assert choose(spec_with(), dataclasses.replace(results, trials=tuple(lacking))) == {"a": RATES[1]}
    none = tuple(dataclasses.replace(each, tuning=None) for each in results.trials)
    with pytest.raises(InputError, match=r"arms\.a: tune: found no evaluated values; expected runs with the seeds"):
        choose(spec_with(), dataclasses.replace(results, trials=none))


def test_values_may_be_lists(tmp_path):
    choices = [((("ebft.feature_layers", [0.5]),), Truth(fm=0.3)), ((("ebft.feature_layers", [0.5, 0.75]),), Truth())]
    truths = {"a": [(choice, dataclasses.replace(truth, seeds=TWO)) for choice, truth in choices]}
    assert choose(spec_with(), write_results(tmp_path, {}, tried=truths)) == {"a": choices[1][0]}


def test_a_metric_without_a_better_direction_chooses_nothing(tmp_path):
    results = write_results(tmp_path, {}, tried=tried(Truth(), Truth(), Truth()))
    with pytest.raises(InputError, match="duplicate_share; expected a metric of which lower or higher is better"):
        choose(spec_with(metric="duplicate_share"), results)


def test_one_temperature_an_arm_from_the_tuning_split(tmp_path):
    truths = {"a": Truth(best=0.6), "b": Truth(best=0.83), "start": Truth(best=1.0, seeds=())}
    results = write_results(tmp_path, truths)
    for arm in truths:  # the report split says something else, which nobody asks
        for result in results.trials:
            if result.trial.arm == arm:
                (result.report / "evaluation.json").write_text("{}")
    spec = spec_of(arms={name: {} for name in truths})
    assert best_temperatures(spec, results) == {"a": 0.6, "b": 0.8, "start": 1.0}
    assert best_temperatures(spec, results, "duplicate_share") == {"a": 0.6, "b": 0.8, "start": 1.0}
    assert best_temperatures(spec, results, "ce_loss") == dict.fromkeys(truths, 1.0)
    assert best_temperatures(spec, results, "alignment") == dict.fromkeys(truths, 0.6), "higher is better"
    assert best_temperatures(spec, results, "brier") == dict.fromkeys(truths, 1.0)
    assert best_temperatures(spec, results, features="not on this split") == best_temperatures(spec, results)


def test_equal_temperatures_give_the_lower_one(tmp_path):
    results = write_results(tmp_path, {"a": Truth(best=0.7, noise=0.0, spread=0.0)})
    for result in results.trials:
        path = result.tuning / "evaluation.json"
        content = json.loads(path.read_text())
        for condition in content["conditions"]:
            condition["per_row"]["eval/feature_matching_loss"] = [0.5] * content["rows"]
        path.write_text(json.dumps(content))
    assert best_temperatures(spec_of(arms={"a": {}}), results) == {"a": 0.6}


def test_what_is_chosen_at_an_edge_is_noted():
    spec = spec_with()
    notes = edge_notes(spec, {"a": RATES[2]}, {"a": 0.6, "b": 0.8})
    assert notes == [
        "a: optim.lr = 0.001 is at the edge of what was tried, the largest of 0.0001, 0.0003, 0.001.",
        "a: its best temperature for feature-matching loss, 0.6, is at the edge of what was tried: 0.6, 0.8, 1.",
    ]
    assert edge_notes(spec, {"a": RATES[1]}, {"a": 0.8, "b": 0.8}) == []
    assert "alignment, 1, is at the edge" in edge_notes(spec, {}, {"a": 1.0}, "alignment")[0]
    for metric in ("ce_loss", "duplicate_share"):  # whose temperature is not their own
        assert edge_notes(spec, {}, {"a": 1.0}, metric) == []


def test_temperatures_that_were_not_evaluated_are_named_for_all_files(tmp_path):
    results = write_results(tmp_path, {"a": Truth(seeds=(0, 1))})
    spec = spec_of(evaluation={"temperatures": [0.6, 1.2]})
    with pytest.raises(InputError) as caught:
        best_temperatures(spec, results)
    for seed, problem in zip((0, 1), caught.value.problems, strict=True):
        assert problem.where == f"{tmp_path}/a-{seed}-tuning/evaluation.json" and problem.key == "conditions"
        assert problem.expected.startswith("T=1.2 G=4 trained")

"""What may be said of a difference: repeated training, agreement of intervals, corrections, pairs of seeds."""

import dataclasses

import numpy as np
import pytest

from ebft_mega.apps.experiment import comparing
from ebft_mega.apps.experiment.arm_values import Measure, read_main_arms
from ebft_mega.apps.experiment.comparing import Evidence, compare, corrected
from ebft_mega.evaluation.bootstrap import Interval
from ebft_mega.evaluation.crossed_interval import CrossedInterval
from tests.unit.apps.experiment.written_experiment import TEMPERATURES, Truth, write_results

ABOVE, AROUND = Interval(1.0, 0.5, 1.5), Interval(1.0, -0.5, 2.5)
BEST = "best_temperature"


def evidence(seeds=(0, 1), combined=ABOVE, rows=ABOVE, documents=ABOVE, bootstrap=None):
    interval = CrossedInterval(rows, documents, None, combined, 0.2, 5.0, 0.01, (1.0,), 9, 3)
    return Evidence(interval, bootstrap, seeds)


@pytest.mark.parametrize(
    ("found", "corrected_p", "verdict"),
    [
        (evidence(), None, "shown"),
        (evidence(), 0.049, "shown"),
        (evidence(), 0.05, "suggested"),
        (evidence(seeds=(4,)), None, "suggested"),
        (evidence(seeds=()), None, "shown"),
        (evidence(combined=AROUND), 0.001, "not shown"),
        (evidence(rows=AROUND), 0.001, "not shown"),
        (evidence(documents=AROUND), 0.001, "not shown"),
        (evidence(bootstrap=AROUND), 0.001, "not shown"),
        (evidence(bootstrap=ABOVE), 0.001, "shown"),
    ],
)
def test_verdicts(found, corrected_p, verdict):
    assert found.verdict(corrected_p) == verdict


def test_the_widest_is_quoted_with_the_plain_mean():
    wide = Interval(1.1, -3.0, 3.0)
    assert evidence(bootstrap=wide).quoted == Interval(1.0, -3.0, 3.0)
    assert evidence(documents=AROUND, bootstrap=ABOVE).quoted == AROUND


@pytest.fixture
def arms(tmp_path):
    truths = {
        "a": Truth(fm=0.2, seeds=(0, 1, 2)),
        "b": Truth(fm=0.21, seeds=(2, 1, 7), overconfidence=0.2),
        "c": Truth(fm=0.21, seeds=(8,)),
        "as it is": Truth(fm=0.25, seeds=()),
    }
    return read_main_arms(write_results(tmp_path, truths).trials, "report", TEMPERATURES, lambda _: True)


def fm(temperature):
    return Measure("feature_matching_loss", temperature)


def test_seeds_are_pairs_whatever_their_order(arms):
    found = compare(arms["b"], arms["a"], (fm(0.8), fm(0.6)), BEST)
    assert found.evidence.seeds == (2, 1)
    by_hand = [
        arms["b"].by_seed[seed].condition(0.8).per_row["eval/feature_matching_loss"].mean()
        - arms["a"].by_seed[seed].condition(0.6).per_row["eval/feature_matching_loss"].mean()
        for seed in (2, 1)
    ]
    assert found.evidence.interval.seed_means == pytest.approx(by_hand)
    assert found.values[0] - found.values[1] == pytest.approx(found.evidence.interval.mean)
    assert (found.direction, found.is_better) == ("higher", False)


def test_what_has_no_seed_in_common_is_not_compared_and_a_model_as_it_is_with_all(arms):
    assert compare(arms["c"], arms["a"], (fm(0.8), fm(0.8)), BEST) is None
    assert compare(arms["a"], arms["as it is"], (fm(0.8), fm(0.8)), BEST).evidence.seeds == (0, 1, 2)
    assert compare(arms["as it is"], arms["c"], (fm(0.8), fm(0.8)), BEST).evidence.seeds == (8,)
    alone = compare(arms["as it is"], arms["as it is"], (fm(0.6), fm(0.8)), BEST)
    assert alone.evidence.seeds == () and alone.evidence.interval.by_seeds is None


def test_rows_that_one_lacks_are_left_out_of_all(arms):
    measure = arms["a"].by_seed[1].condition(0.8).per_row["eval/feature_matching_loss"]
    measure[3] = np.nan
    found = compare(arms["b"], arms["a"], (fm(0.8), fm(0.8)), BEST)
    assert (found.evidence.interval.rows, found.evidence.interval.documents) == (23, 12)


def test_calibration_errors_are_of_all_rows_together(arms):
    measure = Measure("calibration_error", 0.8)
    found = compare(arms["b"], arms["a"], (measure, measure), BEST)

    def error(evaluation):
        bins = evaluation.calibration[0.8]
        gaps = abs(bins.confidence.sum(0) - bins.correct.sum(0)) / bins.tokens.sum(0).clip(1)
        return float((gaps * bins.tokens.sum(0)).sum() / bins.tokens.sum())

    by_hand = [error(arms["b"].by_seed[seed]) - error(arms["a"].by_seed[seed]) for seed in (2, 1)]
    assert found.evidence.interval.seed_means == pytest.approx(by_hand)
    assert found.evidence.bootstrap.mean == pytest.approx(np.mean(by_hand))
    assert found.evidence.bootstrap.low <= np.mean(by_hand) <= found.evidence.bootstrap.high
    assert found.evidence.verdict() == "shown"


def test_corrections_are_for_all_of_them(arms, monkeypatch):
    monkeypatch.setattr(comparing, "LEVEL", 0.05)
    finding = compare(arms["b"], arms["a"], (fm(0.8), fm(0.8)), BEST)
    p = finding.evidence.interval.p
    unlikely, likely = corrected([finding, dataclasses.replace(finding)])
    assert unlikely.corrected_p == pytest.approx(2 * p) and likely.corrected_p == pytest.approx(2 * p)
    assert unlikely.simultaneous == finding.evidence.interval.at(0.975)
    assert corrected([]) == []

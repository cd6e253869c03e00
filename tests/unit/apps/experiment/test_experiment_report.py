"""A report from evaluations that never ran: what is shown, suggested and not shown, and that every number is theirs."""

import dataclasses
import json

import pytest

from ebft_mega.apps.experiment.experiment_report import write_report
from ebft_mega.errors import InputError
from tests.unit.apps.experiment.written_experiment import TEMPERATURES, Truth, spec_of, write_results
from tests.unit.apps.report.page_reader import PageReader

TRUTHS = {
    "start": Truth(ce=2.3, fm=0.22, best=1.0, seeds=(), overconfidence=0.2),
    "ce": Truth(ce=2.0, fm=0.21, best=1.0),
    "mix": Truth(ce=2.1, fm=0.20, best=0.8),
    "ebft": Truth(ce=2.2, fm=0.206, best=0.6),
    "same": Truth(ce=2.0, fm=0.21, best=1.0),
    "single": Truth(ce=2.15, fm=0.19, best=0.8, seeds=(0,)),
}
RATES = ((("optim.lr", 1e-4),), (("optim.lr", 1e-3),))


def spec_with(**keys):
    base = {
        "arms": {name: {} for name in TRUTHS}
        | {"ebft": {"tune": {"optim.lr": [1e-4, 1e-3]}, "about": "EBFT <alone>."}},
        "primary": [
            {"arm": "mix", "against": "ce"},
            {"arm": "same", "against": "ce"},
            {"arm": "single", "against": "ce"},
            {"arm": "ebft", "against": "ce", "at": "equal_temperature"},
        ],
        "secondary": [{"arm": "ebft", "against": "ce", "metric": "ce_loss"}],
        "fronts": {"mixtures": ["ce", "mix", "ebft"]},
        "evaluation": {
            "temperatures": TEMPERATURES,
            "feature_maps": {"deep": {}},
            "completion_lengths": [8],
        },
        "limits": ["A small | one."],
    }
    return spec_of(**{**base, **keys})


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The report of one experiment: its directory and `findings.json`."""
    folder = tmp_path_factory.mktemp("experiment")
    tried = {"ebft": [(rate, Truth(seeds=(1000,))) for rate in RATES]}
    chosen = {"ebft": RATES[1]}
    results = write_results(folder / "runs", TRUTHS, chosen, tried, maps=("deep",), lengths=(8,))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ebft_mega.apps.experiment.comparing.STATISTIC_RESAMPLES", 50)
        page = write_report(spec_with(), results, folder / "report")
    return page, json.loads((folder / "report" / "findings.json").read_text())


def test_sentences_are_sorted_by_what_the_intervals_show(written):
    _, found = written
    shown, suggested, not_shown = (found["verdicts"][key] for key in ("Shown", "Suggested", "Not shown"))
    assert [text.split(":")[0] for text in shown] == [
        "mix has a lower feature-matching loss than ce, which is better",
        "ebft has a higher feature-matching loss than ce, which is worse",
    ]
    assert "at each arm's best temperature (0.8 and 1); 3 seeds, 24 rows" in shown[0]
    assert "at equal temperature 1" in shown[1] and "At each arm's best temperature (0.6 and 1): -0.00" in shown[1]
    assert suggested[0].startswith("single has a lower") and "(one seed)" in suggested[0]
    assert not_shown[0].startswith("No difference in feature-matching loss between same and ce is shown: ")


def test_the_correction_is_over_the_primary_comparisons_alone(written):
    _, found = written
    findings = [each["finding"] for each in found["primary"]]
    p_values = [each["evidence"]["interval"]["p"] for each in findings]
    smallest = min(range(4), key=lambda place: p_values[place])
    assert findings[smallest]["corrected_p"] == pytest.approx(min(1, 4 * p_values[smallest]))
    assert all(each["corrected_p"] is None for each in found["table"])
    assert found["secondary"][0]["finding"]["corrected_p"] is None
    for each in findings:
        own, wide = each["evidence"]["interval"]["combined"], each["simultaneous"]
        assert wide["low"] <= own["low"] <= own["high"] <= wide["high"]


def test_the_page_holds_everything_within_itself(written):
    page, found = written
    reader = PageReader(page.read_text())
    assert not reader.links and len(reader.pictures) == 7
    for words in ("Is <b> lower than a?", "EBFT <alone>", "1234abc", "A small | one.", "Holm's correction"):
        assert words in reader.text
    for each in found["primary"]:
        quoted = each["finding"]["evidence"]["quoted"]
        assert f"{quoted['mean']:+.5f} [{quoted['low']:+.5f}, {quoted['high']:+.5f}]" in reader.text
    assert "single: one seed (0)" in reader.text
    assert "ebft: optim.lr = 0.001 is at the edge of what was tried, the largest of 0.0001, 0.001." in reader.text
    assert "its best temperature for feature-matching loss, 0.6, is at the edge" in reader.text


def test_tables_are_markdown_with_their_set_up(written):
    page, _ = written
    text = page.with_name("tables.md").read_text()
    sections = text.split("### ")[1:]
    assert len(sections) == 11
    for section in sections:
        lines = section.strip().split("\n")
        assert lines[2] and "|" not in lines[2].replace("\\|", ""), "what it was measured on"
        rows = [line.replace("\\|", "") for line in lines[4:]]
        assert len({row.count("|") for row in rows}) == 1 and len(rows) > 2
    assert "on 24 rows of 12 documents" in text


def test_numbers_are_those_of_the_files(written, tmp_path):
    """The mean of a difference, by hand from the evaluations."""
    page, found = written
    runs = page.parents[1] / "runs"

    def mean(arm, seed, temperature):
        content = json.loads((runs / f"{arm}-{seed}-report" / "evaluation.json").read_text())
        (condition,) = [
            each
            for each in content["conditions"]
            if (each["temperature"], each["completion_length"], each["features"]) == (temperature, 4, "trained")
        ]
        return condition["means"]["eval/feature_matching_loss"]

    by_hand = [mean("mix", seed, 0.8) - mean("ce", seed, 1.0) for seed in (0, 1, 2)]
    interval = found["primary"][0]["finding"]["evidence"]["interval"]
    assert interval["seed_means"] == pytest.approx(by_hand)
    assert interval["combined"]["mean"] == pytest.approx(sum(by_hand) / 3)


def test_costs_lines_and_matched_cross_entropy(written):
    _, found = written
    assert [(each["arm"], each["cpu_seconds"], each["tuning_runs"]) for each in found["costs"]][:4] == [
        ("start", None, 0),
        ("ce", 25.0, 0),
        ("mix", 25.0, 0),
        ("ebft", 25.0, 2),
    ]
    assert [point["arm"] for point in found["fronts"]["mixtures"]] == ["ce", "mix", "ebft"]
    matched = {each["arm"]: each for each in found["matched"]}
    assert matched["start"]["on_line"] is None, "no arm of the line has so high a cross-entropy"
    assert matched["single"]["on_line"] == pytest.approx(0.2, abs=0.02)
    assert matched["single"]["evidence"]["quoted"]["high"] < 0


def test_secondary_comparisons_speak_for_themselves_alone(written):
    page, found = written
    text = PageReader(page.read_text()).text
    assert "Shown by its own intervals: ebft has a higher cross-entropy than ce, which is worse: +0.2" in text
    assert "Secondary comparisons and tables are not corrected" in text


def test_bands_are_of_the_difference_from_the_first_arm(written):
    """What rows share is not in them: the first arm's own band at its best temperature has no width."""
    _, found = written
    start, ce = found["arms"][0], found["arms"][1]
    low, high = start["curve_beside_first"]["1.0"]["low"], start["curve_beside_first"]["1.0"]["high"]
    assert low == pytest.approx(high) and start["curve"]["1.0"]["combined"]["high"] - low > 0.01
    band, own = ce["curve_beside_first"]["0.8"], ce["curve"]["0.8"]["combined"]
    assert band["mean"] == own["mean"] and band["high"] - band["low"] < 0.2 * (own["high"] - own["low"])


def test_an_experiment_without_anything_to_compare_has_a_report(tmp_path):
    results = write_results(tmp_path / "runs", {"a": Truth(seeds=(0, 1))})
    spec = spec_of(arms={"a": {}}, seeds=[0, 1])
    page = PageReader(write_report(spec, results, tmp_path / "report").read_text())
    assert "No primary comparison was named beforehand" in page.text


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"primary": [{"arm": "a", "against": "c"}]}, "primary[0]: found 'c', which was not evaluated; expected a, b"),
        (
            {"primary": [{"arm": "a", "against": "b"}]},
            "primary[0]: found the seeds 0, 1 and 5; expected arms with a seed",
        ),
        (
            {"primary": [], "evaluation": {"temperatures": TEMPERATURES, "equal_temperature": 0.9}},
            "expected T=0.9 G=4 trained",
        ),
    ],
)
def test_what_cannot_be_compared_is_named(tmp_path, keys, words):
    truths = {"a": Truth(seeds=(0, 1)), "b": Truth(seeds=(5,))}
    results = write_results(tmp_path, truths)
    spec = spec_of(arms={name: {} for name in "abc"}, **keys)
    with pytest.raises(InputError) as caught:
        write_report(spec, results, tmp_path / "report")
    assert words in str(caught.value) and not (tmp_path / "report").exists()


def test_runs_without_an_evaluation_are_named(tmp_path):
    results = write_results(tmp_path, {"a": Truth(seeds=(0,))})
    trials = tuple(dataclasses.replace(each, tuning=None) for each in results.trials)
    with pytest.raises(InputError, match="no evaluation on the tuning split"):
        write_report(spec_of(arms={"a": {}}), dataclasses.replace(results, trials=trials), tmp_path / "report")

"""A report split is used once: what the ledger refuses, by hand-written histories."""

import pytest

from ebft_mega.apps.experiment.declared.split_ledger import (
    Ledger,
    SplitUse,
    identity,
    read_ledger,
    record_uses,
    refused_uses,
    reuse_notes,
)
from ebft_mega.errors import InputProblems
from tests.unit.apps.experiment.written_experiment import spec_of

REPORT, OTHER = "a" * 64, "b" * 64
ME, THEM = "1" * 64, "2" * 64


def use(role, spec=THEM, fingerprint=REPORT, day=1, experiment="runs/theirs"):
    date = f"2026-01-{day:02d}T00:00:00+00:00"
    return SplitUse(fingerprint=fingerprint, role=role, experiment=experiment, spec=spec, place="data/x", date=date)


@pytest.mark.parametrize(
    "uses, words",
    [
        ([], []),
        ([use("train", fingerprint=OTHER), use("report", fingerprint=OTHER)], []),
        ([use("train")], ["trained on"]),
        ([use("tuning")], ["chosen on"]),
        ([use("tuning", spec=ME)], ["chosen on"]),  # by this very experiment, under another name
        ([use("report")], ["reported on before"]),
        ([use("report", spec=ME)], []),  # the same again
        ([use("report", spec=ME, day=1), use("tuning", day=2)], []),  # what came later decided nothing
        ([use("tuning", day=1), use("report", spec=ME, day=2)], ["chosen on"]),
        ([use("train"), use("report")], ["trained on", "reported on before"]),
    ],
)
def test_what_is_refused(uses, words):
    found = refused_uses(Ledger(uses=tuple(uses)), REPORT, ME, may_reuse=False)
    assert len(found) == len(words)
    assert all(
        word in problem.found and "runs/theirs" in problem.found for word, problem in zip(words, found, strict=True)
    )


def test_knowingly_a_split_may_be_reported_on_again_but_never_after_training():
    ledger = Ledger(uses=(use("report"), use("train")))
    (left,) = refused_uses(ledger, REPORT, ME, may_reuse=True)
    assert "trained on" in left.found
    assert "runs/theirs on 2026-01-01" in reuse_notes(ledger, REPORT, ME)["report split"]
    assert (
        reuse_notes(ledger, OTHER, ME) == {} and reuse_notes(Ledger(uses=(use("report", spec=ME),)), REPORT, ME) == {}
    )


def test_uses_are_recorded_once_and_keep_their_first_date(tmp_path):
    path = tmp_path / "new" / "split_uses.json"
    assert read_ledger(path) == Ledger()
    record_uses(path, [use("train", day=1), use("report", day=1)])
    record_uses(path, [use("train", day=2), use("report", spec=ME, day=2)])
    assert [(each.role, each.date[8:10]) for each in read_ledger(path).uses] == [
        ("train", "01"),
        ("report", "01"),
        ("report", "02"),
    ]
    path.write_text("{")
    with pytest.raises(InputProblems):
        record_uses(path, [use("train")])


def test_what_makes_another_experiment():
    base = identity(spec_of(), ())
    for same in ({"question": "Other words?"}, {"output_dir": "elsewhere"}, {"arms": {"a": {"about": "x"}, "b": {}}}):
        assert identity(spec_of(**same), ()) == base
    others = [
        {"arms": {"a": {}, "b": {}, "c": {}}},
        {"arms": {"a": {"set": {"train.lr": 1.0}}, "b": {}}},
        {"seeds": (0,)},
        {"primary": ({"arm": "a", "against": "b"},)},
        {"tuning": {"rows": 4}},
    ]
    assert (
        len({base, identity(spec_of(), ("train.max_steps=2",)), *(identity(spec_of(**each), ()) for each in others)})
        == 7
    )

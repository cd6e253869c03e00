"""No text has two roles, whatever directory it lies in, and an experiment records what it has used."""

import json
import shutil

import pytest

from ebft_mega.errors import InputProblems


def refusal(small, **options):
    with pytest.raises(InputProblems) as caught:
        small.run(**options)
    assert small.started == []
    return str(caught.value)


def test_a_copy_of_a_split_is_that_split(small):
    shutil.rmtree(small.folder / "data" / "report")
    shutil.copytree(small.folder / "data" / "tuning", small.folder / "data" / "report")
    assert "splits.report: found" in (text := refusal(small)) and "with the contents of splits.tuning" in text


def test_an_arm_trains_on_no_held_out_text_and_looks_at_the_report_split_once(small):
    places = {split: str(small.folder / "data" / split) for split in ("tuning", "report")}
    small.spec["arms"]["ce"]["set"] = {"data.shards": places["tuning"]}
    small.spec["arms"]["ebft"]["set"] = {"evaluation.shards": places["report"], "data.shards": places["report"]}
    text = refusal(small)
    assert "arms.ce: found" in text and "to train on, which is splits.tuning" in text
    assert "evaluation.shards" in text and "to train on, which is splits.report" in text


def test_a_document_in_two_splits(small):
    small.write_split("report", [60, 41])
    text = refusal(small)
    assert "splits.report: found 1 documents of splits.train, such as number 1 (1 there)" in text


def test_short_documents_may_be_alike(small):
    small.write_split("train", [40, 41, 3, 200])
    small.write_split("report", [60, 61, 3])
    small.run(until="prepare")


def test_a_split_that_another_experiment_has_used(small):
    small.run(until="tune")
    uses = json.loads((small.output.parent / "split_uses.json").read_text())["uses"]
    assert {each["role"] for each in uses} == {"train", "tuning"}  # it was not reported on yet
    small.run()
    small.spec["output_dir"] += "-two"
    small.spec["splits"] = {**small.spec["splits"], "report": small.spec["splits"]["tuning"]}
    small.spec["splits"]["tuning"] = str(small.folder / "data" / "own")
    small.write_split("own", [70, 71])
    text = refusal(small)
    assert "splits.report: found a split that" in text and "has chosen on" in text


def test_the_same_experiment_elsewhere_is_no_second_look(small):
    small.run()
    small.run(output=small.output.parent / "again")
    assert any(name.endswith("on report") for name in small.started)


def test_a_split_that_no_preparation_has_made(small):
    made, tool = small.folder / "made", small.folder / "copy_tree.py"
    tool.write_text("import shutil, sys\nshutil.copytree(sys.argv[1], sys.argv[2])\n")
    small.spec["prepare"] = [{"makes": str(made), "run": [str(tool), str(small.folder / "data"), str(made)]}]
    small.spec["splits"] = {split: str(made / split) for split in small.spec["splits"]}
    small.run()  # as it should be
    small.spec["splits"]["report"] = str(made / "reprot")
    assert "splits.report: found" in (text := refusal(small)) and "no preparation has made" in text

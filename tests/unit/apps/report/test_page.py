"""Report pages show every text as text: none becomes markup, whatever it says."""

import json
import os
from dataclasses import replace
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest

from ebft_mega.apps.experiment.experiment_report import write_report
from ebft_mega.apps.report import page, plots
from ebft_mega.apps.report.arm_comparison import write_comparison
from ebft_mega.apps.report.evaluation_plot import plot_evaluation
from ebft_mega.apps.report.run_report import write_run_report
from ebft_mega.evaluation.bootstrap import Interval
from ebft_mega.shown_text import escaped
from tests.unit.apps.experiment.written_experiment import TEMPERATURES, Truth, spec_of, write_results
from tests.unit.apps.report.page_reader import PageReader
from tests.unit.hostile import dangers

# Closes what it may stand in (an attribute, a span, the style sheet), then would run. No slash: it is a file name, too.
# Then: what a terminal or a reader of lines obeys, half a formula of a plot, and a byte of a name that is not UTF-8.
MARKUP = "\"'><script>alert(1)<img src=x onerror=alert(1)>&lt;b&gt; {{ 7 * 7 }} %41 #? ]]>"
TEXT = f"{MARKUP}\x1b[31m\x9b2J\x07\x08\r\x7f\u202eabc\u2066\u200b\u2028$x^2$ \\frac{{1}}{{$ $\\undefined$"
HOSTILE = f"{TEXT}\udcff"


def hostile_run(directory):
    """Write the files of a run in which every text is hostile."""
    run = directory / HOSTILE
    run.mkdir()
    metrics = [{"step": step, "train/loss": 1.0, "eval/ce_loss": 2.0} for step in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics))
    sample = {"step": 1, "row": 0, "block": 0, "context": HOSTILE, "target": HOSTILE, "alignment": [0.5]}
    (run / "samples.jsonl").write_text(json.dumps(sample | {"rollouts": [f"{HOSTILE}\n{HOSTILE}"]}) + "\n")
    (run / "config.resolved.yaml").write_text(f"output_dir: {TEXT}\n", encoding="utf-8", newline="")
    described = {"started": HOSTILE, "run": {"model": HOSTILE, "data": HOSTILE, "tokens": [HOSTILE]}}
    (run / "environment.json").write_text(json.dumps({HOSTILE: HOSTILE} | described))
    (run / "notes.jsonl").write_text(json.dumps({"step": 1, "time": HOSTILE, "text": HOSTILE}) + "\n")
    (run / "status.json").write_text(json.dumps({"state": HOSTILE, HOSTILE: 1}))
    return write_run_report(run)


def hostile_arms(directory):
    """Write the evaluations of two arms of hostile names."""
    arms = {}
    for number, name in enumerate((HOSTILE, f"other {HOSTILE}")):
        values = np.random.default_rng(number).normal(size=8)
        content = {"rows": 8, "temperature": HOSTILE, "eval/ce_loss": float(values.mean())}
        content |= {"per_row": {"eval/ce_loss": values.tolist()}, "row_groups": [HOSTILE, "b"] * 4}
        arms[name] = directory / f"evaluation-{number}.json"
        arms[name].write_text(json.dumps(content))
    return arms


def hostile_comparison(directory):
    arms, output = hostile_arms(directory), directory / f"comparison {HOSTILE}"
    facts = {name: {HOSTILE: HOSTILE} for name in arms}
    links = {HOSTILE: directory / HOSTILE / "report.html"}
    return write_comparison(arms, output, arm_facts=facts, links=links, notes=[HOSTILE])


def hostile_experiment(directory):
    """Write the report of an experiment whose file and evaluations are hostile."""
    other = f"other {TEXT}"
    truths = {TEXT: Truth(seeds=(0, 1)), other: Truth(seeds=(0, 1), ce=2.1), "c": Truth(seeds=(0,), ce=2.05)}
    results = write_results(directory, truths, chosen={TEXT: ((TEXT, TEXT),)}, maps=(TEXT,))
    pair = {"arm": other, "against": TEXT}
    spec = spec_of(
        question=TEXT,
        arms={name: {"about": TEXT, "set": {TEXT: TEXT}, "start": TEXT} for name in truths},
        primary=[pair],
        secondary=[{**pair, "metric": "ce_loss"}],
        fronts={TEXT: [TEXT, other]},
        evaluation={"temperatures": TEMPERATURES, "feature_maps": {TEXT: {}}},
        limits=[TEXT],
    )
    results = replace(results, facts={HOSTILE: HOSTILE})
    return write_report(spec, results, directory / f"experiment {HOSTILE}")


def place(address):
    """The path that a relative address leads to."""
    return os.fsdecode(unquote_to_bytes(address))


PAGES = {
    "run": (hostile_run, 11),
    "comparison": (hostile_comparison, 16),
    "experiment": (hostile_experiment, 40),
}


@pytest.mark.parametrize("name", PAGES)
def test_hostile_text_is_shown_as_it_is(tmp_path, name):
    write, times = PAGES[name]
    report = write(tmp_path)
    found = PageReader(report.read_text(encoding="utf-8"))
    assert found.tags & {"script", "iframe", "b"} == set()
    assert found.policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert found.attributes <= {"charset", "class", "lang", "name", "content", "src", "alt", "href", "http-equiv"}
    assert found.text.count(MARKUP) >= times and escaped(TEXT) in found.text
    assert dangers(found.text, "\n\t") == set()
    assert found.images and len(found.names(report.parent)) == len(found.images)


@pytest.mark.parametrize("name", PAGES)
def test_the_check_for_hostile_text_can_fail(tmp_path, name, monkeypatch):
    page._environment.cache_clear()
    monkeypatch.setattr(page._environment(), "autoescape", False)
    html = PAGES[name][0](tmp_path).read_text(encoding="utf-8")
    page._environment.cache_clear()
    assert "<script>" in html


def test_nothing_that_lies_in_a_run_directory_is_written_through(tmp_path):
    run = hostile_run(tmp_path).parent
    (run / "evaluation.json").write_text(json.dumps({"a": 1.0, "per_row": {"a": [0.0, 2.0]}}))
    plot_evaluation(run / "evaluation.json")
    made = [path for path in run.rglob("*") if path.suffix in (".html", ".png")]
    victim = tmp_path / "victim"
    victim.write_text("keep")
    for path in made:
        path.unlink()
        path.symlink_to(victim)
    write_run_report(run)
    plot_evaluation(run / "evaluation.json")
    assert victim.read_text() == "keep" and len(made) >= 3
    assert not [path for path in made if path.is_symlink()]


def test_links_lead_to_files_of_any_name(tmp_path):
    report = hostile_run(tmp_path)
    html = hostile_comparison(tmp_path).read_text(encoding="utf-8")
    (link,) = PageReader(html).links
    assert not set("\"'<>#? ") & set(link)
    assert (tmp_path / f"comparison {HOSTILE}" / place(link)).resolve() == report


@pytest.mark.parametrize("text", ["$\\frac{1}{$", "a\x1b[31m\n$b$"])
def test_a_name_in_a_plot_is_no_formula(tmp_path, text):
    plots.draw_intervals({text: {text: Interval(0.0, -1.0, 1.0)}}, tmp_path / "a.png")
    assert plots.draw_chart(
        plots.Chart("a", text, text, (("a", text), ("b", text))), {"a": ([1], [1.0])}, tmp_path / "b.png"
    )
    (tmp_path / "evaluation.json").write_text(json.dumps({text: 1.0, "per_row": {text: [0.0, 2.0]}}))
    plot_evaluation(tmp_path / "evaluation.json")


def test_a_value_that_a_template_lacks_is_an_error(tmp_path):
    from jinja2 import UndefinedError

    with pytest.raises(UndefinedError, match="'statements' is undefined"):
        page.write_page(tmp_path / "report.html", "comparison.html", title="", subtitle="")
    assert not (tmp_path / "report.html").exists()

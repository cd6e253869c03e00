"""Inputs of an experiment are made once, and again when what they are made from has changed."""

from ebft_mega.apps.experiment.running.phases import PhaseRunner
from ebft_mega.apps.experiment.running.preparing import prepare
from ebft_mega.apps.experiment.spec import Preparation
from ebft_mega.io.expanded_paths import REPOSITORY


def test_a_changed_text_makes_what_is_made_of_it_anew(tmp_path):
    text, copy, later = tmp_path / "text", tmp_path / "copy", tmp_path / "later"
    (text / "a").mkdir(parents=True)
    (text / "a" / "one.txt").write_text("one")
    tool = tmp_path / "copy_tree.py"
    tool.write_text("import shutil, sys\nshutil.copytree(sys.argv[1], sys.argv[2])\n")
    said = []

    def run():
        said.clear()
        makes = ((copy, text), (later, copy))
        steps = [Preparation(makes=str(place), run=[str(tool), str(source), str(place)]) for place, source in makes]
        prepare(steps, PhaseRunner(REPOSITORY, said.append))
        return ["reused" in line for line in said if " prepare " in line and "copy_tree" not in line]

    assert run() == [False, False]
    assert run() == [True, True]
    (text / "a" / "two.txt").write_text("two")
    assert run() == [False, False]  # and what is made of that
    assert (later / "a" / "two.txt").read_text() == "two"
    assert run() == [True, True]
    (text / "a" / "one.txt").write_text("eno")
    assert run() == [False, False] and (later / "a" / "one.txt").read_text() == "eno"

"""What is wrong with an experiment's file is said all at once, with file and line, before anything starts."""

import pytest
import yaml

from ebft_mega.apps.experiment.declared.spec_file import read_spec
from ebft_mega.apps.experiment.declared.spec_rules import spec_problems
from ebft_mega.errors import InputProblems

TEXT = """\
question: Does it?
output_dir: runs/exp
config: {folder}/base.yaml
splits:
  train: {folder}/train
  tuning: {folder}/tuning
  report: {folder}/made/report
prepare:
- makes: {folder}/made
  run: [tools/build_shards.py, --output, {folder}/made]
start: warm
arms:
  warm:
    seeds: [0]
  ce:
    tune: {{train.lr: [0.001, 0.002]}}
  ebft:
    like: ce
    set: {{ebft.rl_coef: 1.0}}
  as it is:
    model: {folder}
primary:
- {{arm: ebft, against: ce}}
fronts:
  mixtures: [ce, ebft]
"""


@pytest.fixture
def text(tmp_path):
    (tmp_path / "base.yaml").write_text("")
    for name in ("train", "tuning"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dataset.json").write_text("{}")
    return TEXT.format(folder=tmp_path)


@pytest.fixture
def read(tmp_path):
    def read(text):
        (tmp_path / "spec.yaml").write_text(text)
        return read_spec(tmp_path / "spec.yaml", spec_problems)

    return read


@pytest.fixture
def problems(read):
    def problems(text):
        with pytest.raises(InputProblems) as caught:
            read(text)
        return caught.value.problems

    return problems


def test_a_valid_file_is_read(read, text):
    spec = read(text).spec
    assert spec.arms["ce"].tune == {"train.lr": (0.001, 0.002)} and spec.arms["warm"].seeds == (0,)
    assert spec.prepare[0].run[0] == "tools/build_shards.py" and spec.fronts == {"mixtures": ("ce", "ebft")}


@pytest.mark.parametrize(
    "old, new, key, words",
    [
        ("like: ce", "like: ec", "arms.ebft.like", "an arm: warm, ce, ebft, as it is"),
        ("start: warm", "start: warn", "start", "an arm"),
        ("arm: ebft,", "arm: ebtf,", "primary.0.arm", "an arm"),
        ("against: ce", "against: ebft", "primary.0.against", "another arm"),
        ("[ce, ebft]", "[ce, ebbft]", "fronts.mixtures.1", "an arm"),
        ("seeds: [0]", "seeds: [3, 3]", "arms.warm.seeds", "each once"),
        ("seeds: [0]", "seeds: []", "arms.warm.seeds", "at least one"),
        ("seeds: [0]", "like: ebft", "arms.warm.like", "a circle: warm -> ce -> warm"),
        ("seeds: [0]", "start: warm", "arms.warm.start", "a circle: warm -> warm"),
        ("seeds: [0]", "start: ebft", "arms.warm.start", "a circle: warm -> ebft -> ce -> warm"),
        ("tune: {train.lr: [0.001, 0.002]}", "like: ebft", "arms.ce.like", "arms that end"),
        ("tune: {train.lr: [0.001, 0.002]}", "tune: {train.lr: [0.001]}", "arms.ce.tune.train.lr", "two values"),
        ("set: {ebft.rl_coef: 1.0}", "set: {train: {lr: 1}}", "arms.ebft.set.train", "single keys"),
        ("set: {ebft.rl_coef: 1.0}", "set: {seed: 1}", "arms.ebft.set.seed", "`seeds`"),
        ("set: {ebft.rl_coef: 1.0}", "sett: {}", "arms.ebft.sett", "one of the keys of arms.ebft"),
        ("like: ce", "model: .", "arms.ebft.set", "`model` alone"),
        ("/tuning", "/nothing", "splits.tuning", "a dataset directory, or a command of `prepare`"),
        ("/tuning", "/train", "splits.tuning", "no text may have two roles"),
        ("/base.yaml", "/other.yaml", "config", "a run configuration"),
        ("tools/build_shards.py", "rm", "prepare.0.run", "a tool of this repository"),
        ("question: Does it?", "evaluation: {equal_temperature: 0.7}", "evaluation.equal_temperature", "0.4, 0.6"),
        ("question: Does it?", "evaluation: {rows: 1}", "evaluation.rows", ">= 2"),
        ("question: Does it?", "qestion: Does it?", "question", "required"),
        ("  as it is:", "  lonely: {reported: false}\n  as it is:", "arms.lonely.reported", "of use"),
        ("config:", "config: $NOT_SET_ANYWHERE/", "config", "a variable that is set"),
    ],
)
def test_what_a_file_may_not_say(problems, text, old, new, key, words):
    assert text.count(old) == 1 or old.startswith("/")
    found = {problem.key: problem for problem in problems(text.replace(old, new, 1))}
    assert key in found and words in str(found[key])


def test_everything_is_said_at_once_with_its_lines_and_what_may_have_been_meant(problems, text):
    wrong = (
        text.replace("like: ce", "like: cee").replace("arm: ebft", "arm: abft").replace("rl_coef: 1.0", "rl_coef: [")
    )
    assert len(problems(wrong)) == 1  # not YAML
    wrong = text.replace("like: ce", "like: cee").replace("arm: ebft", "arm: abft").replace("seeds: [0]", "seeds: zero")
    found = problems(wrong)
    lines = [int(problem.where.rpartition(":")[2]) for problem in found]
    assert lines == sorted(lines)
    for problem in found:
        assert problem.key.rpartition(".")[2] in wrong.splitlines()[lines[found.index(problem)] - 1]
    assert {problem.suggestion for problem in found} == {"ce", "ebft", ""}


@pytest.mark.parametrize("content", ["", "[]", "5", "question: [", "a: 1\na: 2", "\xff\xfe", "arms: {1: 2}", "arms: 7"])
def test_no_file_at_all(problems, content):
    assert problems(content)


def test_a_missing_file(tmp_path):
    with pytest.raises(InputProblems, match="no such file"):
        read_spec(tmp_path / "none.yaml", spec_problems)


def test_what_yaml_says_is_what_is_read(read, text):
    tree = yaml.safe_load(text)
    tree["arms"]["ebft"]["set"] = {"ebft.feature_layers": [0.5, 1.0], "ebft.reward_terms": {"x": 1}}
    spec = read(yaml.safe_dump(tree)).spec
    assert spec.arms["ebft"].set == {"ebft.feature_layers": (0.5, 1.0), "ebft.reward_terms": {"x": 1}}

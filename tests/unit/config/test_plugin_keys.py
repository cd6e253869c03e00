"""`plugins` and `options` of a configuration: names of entries, options, their places, and what is written down."""

import pytest

from ebft_mega.config.entries import entry_of, idle_options, learning_rates
from ebft_mega.config.load import load_config, resolved_yaml
from ebft_mega.config.schema import path_keys
from ebft_mega.errors import ConfigError
from ebft_mega.registry.kinds import FEATURE_MAPS, REWARD_TERMS
from ebft_mega.registry.plugins import use_plugins

BASE = """\
output_dir: runs/a
model: {init_from: runs/init}
data: {shards: data/train, sequence_length: 128}
train: {max_steps: 5}
"""
PLUGIN = """\
from typing import Literal

from pydantic import field_validator, model_validator

from ebft_mega.extension.feature_map import FeatureMap
from ebft_mega.extension.options import Section, key
from ebft_mega.extension.reward_term import RewardTerm


class LengthOptions(Section):
    weights: tuple[float, ...] = key((1.0, 2.0), "Weights.", allowed="a list of numbers")
    scale: float = key(1.0, "Scale.", gt=0)
    kind: Literal["words", "tokens"] = key("words", "Kind.")
    plain: bool = False

    @field_validator("weights")
    @classmethod
    def ascend(cls, value):
        if list(value) != sorted(value):
            raise ValueError("weights must ascend")
        return value

    @model_validator(mode="after")
    def fit(self):
        if self.scale > 100 and self.kind == "words":
            raise ValueError("words need a small scale")
        return self


class Length(RewardTerm):
    name = "length"
    Options = LengthOptions

    def __init__(self, options=None):
        super().__init__(options)
        if self.options.scale == 7:
            raise LookupError("seven")

    def values(self, inputs):
        return inputs.gram


class Quiet(RewardTerm):
    name = "quiet"

    def values(self, inputs):
        return inputs.gram


class Pooled(FeatureMap):
    name = "length"
    Options = LengthOptions

    def positions(self, generate_length):
        return range(generate_length)

    def pool(self, rows):
        return rows
"""
WITH = BASE + "plugins: [rewards/mine.py]\nebft: {reward_terms: {length: 0.5, quiet: -1}}\n"


@pytest.fixture(autouse=True)
def no_plugins_afterwards():
    yield
    use_plugins([], None, {})


@pytest.fixture
def load(tmp_path):
    """Load a text as `c.yaml`, beside which a plugin lies."""
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "mine.py").write_text(PLUGIN)

    def load_text(text, *overrides, path=tmp_path / "c.yaml"):
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides)

    return load_text


@pytest.fixture
def problems(load, tmp_path):
    """The problems of a text, as lines without the folder."""

    def lines(text, *overrides):
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides)
        return [str(problem).replace(f"{tmp_path}/", "") for problem in caught.value.problems]

    return lines


def test_an_entry_of_a_plugin_gets_its_options(load):
    config = load(WITH + "options:\n  length:\n    weights: [1, 3]\n")
    assert config.ebft.reward_terms == {"length": 0.5, "quiet": -1}
    options = entry_of(config, REWARD_TERMS, "length").options
    assert (options.weights, options.scale, options.kind, options.plain) == ((1.0, 3.0), 1.0, "words", False)
    (plugin,) = config.loaded_plugins
    assert [entry.name for entry in plugin.entries] == ["length", "length", "quiet"]
    assert list(idle_options(config)) == []


def test_overrides_set_plugins_and_options(load):
    texts = ("plugins=[rewards/mine.py]", "ebft.reward_terms={length: 1}", "options.length.scale=3", "options.quiet={}")
    with pytest.raises(
        ConfigError, match="--set: options.quiet: found options of the reward term quiet, which has none"
    ):
        load(BASE, *texts)
    assert entry_of(load(BASE, *texts[:3]), REWARD_TERMS, "length").options.scale == 3


def test_the_resolved_configuration_is_read_back_unchanged_from_anywhere(load, tmp_path):
    config = load(WITH + "options: {length: {scale: 3}}\n")
    text = resolved_yaml(config)
    assert f"plugins:\n- {tmp_path}/rewards/mine.py\n" in text
    (tmp_path / "run").mkdir()
    again = load(text, path=tmp_path / "run" / "config.resolved.yaml")
    assert resolved_yaml(again) == text and again.options == {
        "length": {"weights": [1.0, 2.0], "scale": 3.0, "kind": "words", "plain": False}
    }


def test_a_run_directory_is_no_place_for_plugins(load, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.py").write_text(PLUGIN)
    with pytest.raises(ConfigError, match=r"mine\.py, which lies in .*/run, output_dir of this configuration"):
        load(BASE.replace("runs/a", str(tmp_path / "run")) + "plugins: [run/mine.py]\n")
    with pytest.raises(ConfigError, match=r"which lies in .*/run, a run or a checkpoint"):
        load(BASE + "plugins: [mine.py]\n", path=tmp_path / "run" / "config.resolved.yaml")


@pytest.mark.parametrize(
    "key",
    [
        *("output_dir", "model.init_from", "data.shards", "data.sources.a.shards", "data.tokenizer", "data.cache"),
        *("evaluation.shards", "ebft.feature_model", "checkpoint.resume"),
    ],
)
def test_no_place_that_another_key_names_holds_plugins(problems, tmp_path, key):
    lines = problems(BASE + "plugins: [rewards/mine.py]\n", f"{key}={tmp_path}/rewards")
    assert (
        f"rewards/mine.py, which lies in rewards, {key} of this configuration; expected a file of your own" in lines[0]
    )


def test_every_key_of_a_path_is_tried_above():
    (mark,) = test_no_place_that_another_key_names_holds_plugins.pytestmark
    assert {each.replace("*", "a") for each in path_keys()} == set(mark.args[1])


def test_the_next_configuration_knows_only_its_own_plugins(load, problems):
    load(WITH)
    (line,) = problems(BASE + "ebft: {reward_terms: {lenght: 0.5}}\n")
    assert line == (
        "c.yaml:5: ebft.reward_terms.lenght: found 'lenght'; expected the name of a reward term: alignment, diversity"
    )


def test_names_are_suggested_from_plugins_too(problems):
    (line,) = problems(WITH.replace("{length:", "{lenght:"))
    assert line.endswith(
        "expected the name of a reward term: alignment, diversity, length, quiet. Did you mean 'length'?"
    )


def test_where_a_plugin_fails_names_are_not_called_wrong(problems):
    text = "plugins:\n- rewards/mine.py\n- rewards/mime.py\n" + WITH.replace("plugins: [rewards/mine.py]\n", "")
    lines = problems(text.replace("quiet: -1", "other: -1") + "options: {other: {x: 1}, length: {scal: 1}}\n", "seed=x")
    assert [line.split(": found")[0] for line in lines] == ["c.yaml:3: plugins", "--set: seed"]
    assert lines[0].endswith("Did you mean 'rewards/mine.py'?")


def test_plugins_that_are_no_list_of_texts(problems):
    allowed = "expected a list of module names and of paths that end in .py"
    for value in ("rewards/mine.py", "[7]", "{a: 1}"):
        (line,) = problems(BASE + f"plugins: {value}\n")
        assert line.startswith("c.yaml:5: plugins") and allowed in line


# Options of `length`, and the line about them.
WRONG = [
    ("{scal: 1}", "options.length.scal: found an unknown option (value 1); expected one of the keys of options.length: "
     "weights, scale, kind, plain. Did you mean 'options.length.scale'?"),
    ("{scale: 0}", "options.length.scale: found 0; expected a number > 0"),
    ("{scale: fast}", "options.length.scale: found 'fast'; expected a number > 0"),
    ("{kind: wordz}", "options.length.kind: found 'wordz'; expected words or tokens. Did you mean 'words'?"),
    ("{weights: [1, x]}", "options.length.weights: found [1, 'x']; expected a list of numbers"),
    ("{weights: [2, 1]}", "options.length.weights: found [2, 1]; expected Value error, weights must ascend"),
    ("{plain: 1}", "options.length.plain: found 1; expected true or false"),
    ("{scale: 200}", "options.length: found {'scale': 200}; expected Value error, words need a small scale"),
    ("5", "options.length: found 5; expected a section with the options of length: weights, scale, kind, plain"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "words"), WRONG)
def test_wrong_options_are_named_with_their_line(problems, value, words):
    assert problems(WITH + f"options:\n  length: {value}\n") == [f"c.yaml:8: {words}"]


def test_all_wrong_options_are_named_at_once(problems):
    lines = problems(WITH + "options:\n  length:\n    scale: 0\n    weight: 1\n  absent: {a: 1}\n  quiet: {a: 1}\n")
    assert [line.split(": found")[0] for line in lines] == [
        "c.yaml:9: options.length.scale",
        "c.yaml:10: options.length.weight",
        "c.yaml:11: options.absent",
        "c.yaml:12: options.quiet",
    ]
    assert "options of 'absent', which is no entry; expected those of an entry in use that has any: length" in lines[2]
    assert "options of the reward term quiet, which has none" in lines[3]


def test_a_near_name_of_an_entry_is_suggested(problems):
    (line,) = problems(WITH + "options: {lenght: {scale: 2}}\n")
    assert line.endswith("Did you mean 'options.length'?")
    (line,) = problems(BASE + "options: {lenght: {scale: 2}}\n")
    assert line.endswith("which is no entry; expected no options: no entry in use has any")


def test_options_that_no_key_asks_for_are_said_and_checked(load, problems):
    config = load(BASE + "options: {warmup_stable_decay: {decay_share: 0.5}}\n")
    assert list(idle_options(config)) == [
        "options.warmup_stable_decay changes nothing: no key names the learning-rate schedule warmup_stable_decay."
    ]
    (line,) = problems(BASE + "options: {warmup_stable_decay: {decay_share: 2}}\n")
    assert line.startswith("c.yaml:5: options.warmup_stable_decay.decay_share: found 2; expected a number > 0 and <= 1")


def test_an_entry_of_the_package_has_its_defaults_written_down(load):
    config = load(BASE + "options: {warmup_stable_decay: }\n", "train.lr_scheduler=warmup_stable_decay")
    assert config.options == {"warmup_stable_decay": {"decay_share": 0.2}}
    assert learning_rates(config).schedule.options.decay_share == 0.2


def test_entries_of_two_kinds_with_one_name_cannot_both_have_options(load, problems):
    config = load(WITH.replace("quiet: -1}", "quiet: -1}, embed_method: last_token"))
    assert entry_of(config, REWARD_TERMS, "length").options.scale == 1
    (line,) = problems(WITH.replace("quiet: -1}", "quiet: -1}, embed_method: length"))
    assert "found options of the feature map and of the reward term length; expected entries of different names" in line
    assert FEATURE_MAPS.names()[-1] == "length"


def test_what_an_entry_refuses_when_it_is_made_is_a_problem(problems):
    (line,) = problems(WITH + "options:\n  length: {scale: 7}\n")
    assert line.startswith("c.yaml:8: options.length: found {'scale': 7}, at which Length (rewards/mine.py:")
    assert "ends with LookupError: seven; expected options that it takes" in line


def test_a_required_option_is_missed_where_the_entry_is_named(problems, load, tmp_path):
    path = tmp_path / "rewards" / "mine.py"
    path.write_text(PLUGIN.replace('key(1.0, "Scale."', 'key(..., "Scale."'))
    (line,) = problems(WITH)
    assert line == "c.yaml:6: options.length.scale: found nothing; expected a number > 0 (this key is required)"


def test_a_plugin_without_brackets_is_the_only_problem(problems):
    (line,) = problems(WITH.replace("[rewards/mine.py]", "rewards/mine.py") + "options: {length: {}}\n")
    assert "plugins: found 'rewards/mine.py'; expected a list of module names" in line

"""Reading a configuration: texts of errors, overrides, YAML's traps, axolotl's block."""

import re

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from ebft_mega.config.fields import PATH
from ebft_mega.config.load import load_config, resolved_yaml
from ebft_mega.config.schema import all_keys
from ebft_mega.config.section_values import nearest_key
from ebft_mega.config.yaml_source import MAX_INTEGER, plain_scalar, read_yaml, write_value, write_yaml
from ebft_mega.errors import ConfigError
from ebft_mega.extension.entry import place_of_entry
from ebft_mega.io.expanded_paths import REPOSITORY
from ebft_mega.registry.store_addresses import schemes_in_words
from tests.own_entries import Matches, in_registries

DATASET_PLACE = f"{PATH} or an address that begins with {schemes_in_words()}"
NO_DATASET_PLACES = (
    "pipe:cat x",
    "http://host/data",
    "file:///data",
    "s4://bucket/data",
    "https://user:secret@host/data",
    "https://host/data?token=secret",
    "https://host/a b",
    "https://",
)
SOURCES = """\
output_dir: runs/a
model: {init_from: runs/init}
data:
  sequence_length: 128
  sources:
    python:
      shards: data/python
      weight: 0.7
    mixed: {shards: "https://host:8443/data/mixed", weight: 0.3, max_epochs: 2.5}
train: {max_steps: 5}
"""
BASE = """\
output_dir: runs/a
model: {init_from: runs/init}
data: {shards: data/train, sequence_length: 128}
train: {max_steps: 5}
"""
AXOLOTL_BLOCK = """\
ebft:
  mode: strided                       # strided block-parallel generation
  stride: 8                           # tokens between anchor points
  context_length: 8
  generate_max_len: 8
  n_samples_per_prompt: 4
  temperature: 0.6
  top_p: 1.0
  feature_layers: [0.25, 0.5, 0.75]
  embed_method: last_token
  use_whitening: true
  alignment_coef: 1.0
  diversity_coef: 1.0
  rl_coef: 1.0
  ce_coef: 0.03
  advantage_estimator: rloo
"""


@pytest.fixture
def load(tmp_path):
    """Load a text as `c.yaml`."""

    def load_text(text, *overrides):
        path = tmp_path / "c.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides)

    return load_text


@pytest.fixture
def problems(load, tmp_path):
    """The problems of a text, as lines without the folder."""

    def lines(text, *overrides):
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides)
        assert caught.value.exit_code == 2
        return [str(problem).replace(f"{tmp_path}/", "") for problem in caught.value.problems]

    return lines


def test_axolotl_block_is_accepted_as_it_is(load):
    config = load(BASE + AXOLOTL_BLOCK)
    assert config.ebft.ce_coef == 0.03
    assert config.ebft.feature_layers == (0.25, 0.5, 0.75)
    assert config.block_plan.num_blocks == (128 - 8 - 8) // 8 + 1


def test_exponent_without_a_point_is_a_number(load):
    assert load(BASE + "zero: {}\n", "train.lr=1e-5").train.lr == 1e-5
    assert load(BASE.replace("max_steps: 5", "max_tokens: 1e6, lr: 3E-4")).train.lr == 3e-4


def test_words_that_yaml_1_1_takes_for_booleans(load):
    assert load(BASE + "learn: {reuse_rollout: off}").learn.reuse_rollout == "off"


def test_unknown_key_text(problems):
    assert problems(BASE + "ebft:\n  strde: 8\n") == [
        "c.yaml:6: ebft.strde: found an unknown key (value 8); expected one of the keys of ebft: mode, "
        "stride, context_length, generate_max_len, n_samples_per_prompt, temperature, top_p, "
        "merge_equal_prefixes, feature_layers, embed_method, layer_weights, feature_norm, use_whitening, whitening, "
        "alignment, alignment_coef, diversity_coef, "
        "reward_terms, rl_coef, ce_coef, entropy_coef, advantage_estimator, feature_model, noise_interval. "
        "Did you mean 'ebft.stride'?"
    ]


def test_key_in_the_wrong_section_finds_its_own(problems):
    (line,) = problems("stride: 4\n" + BASE)
    assert line.startswith("c.yaml:1: stride: ") and line.endswith("Did you mean 'ebft.stride'?")


def test_every_problem_is_reported_at_once(problems):
    text = """\
output_dir: runs/a
model: {init_from: a, config: {model_type: gpt2}}
data:
  shards: d
  sequence_length: 131
train:
  global_batch_size: 10
  micro_batch_size: 4
  lr: fast
  max_tokens: 50
ebft:
  embed_method: last_tokn
  n_samples_per_prompt: 4.5
  temperature: 0
  rl_coef: 0
trian: {lr: 1}
"""
    lines = problems(text, "train.dtype=float16")
    heads = [line.split(": found")[0] for line in lines]
    assert heads == [
        "c.yaml:2: model.config",
        *[f"c.yaml:2: model.config.{name}" for name in ("model_type", "vocab_size", "hidden_size")],
        *["c.yaml:2: model.config." + name for name in ("intermediate_size", "num_hidden_layers")],
        "c.yaml:2: model.config.num_attention_heads",
        "c.yaml:5: data.sequence_length",
        "c.yaml:7: train.global_batch_size",
        "c.yaml:9: train.lr",
        "c.yaml:10: train.max_tokens",
        "c.yaml:12: ebft.embed_method",
        "c.yaml:13: ebft.n_samples_per_prompt",
        "c.yaml:14: ebft.temperature",
        "c.yaml:15: ebft.rl_coef",
        "c.yaml:16: trian",
        "--set: train.dtype",
    ]
    text = "\n".join(lines)
    assert "found 'fast'; expected a number > 0" in text
    assert (
        "found 'last_tokn'; expected completion_mean, concat, last_token or mean_pooling. Did you mean 'last_token'?"
        in text
    )
    assert "Did you mean 'train'?" in text and "Did you mean 'bfloat16'?" in text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("zero.offload_optimizer", "cpu"),
    ],
)
def test_what_is_not_built_is_refused_by_name(problems, key, value):
    (line,) = problems(BASE, f"{key}={value}")
    assert line.startswith(f"--set: {key}: found {value}, which is not yet supported; expected none")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("parallel.context_parallel_size", "context parallelism"),
        ("model.num_experts", "mixture of experts"),
        ("parallel.expert_parallel_size", "mixture of experts"),
        ("lora", "LoRA"),
        ("model.adapter", "LoRA"),
        ("train.lora_r", "LoRA"),
        ("ebft.qa_masking", "question/answer masks"),
        ("data.train_on_inputs", "question/answer masks"),
        ("ebft.min_completion_prefix", "prompt and completion"),
    ],
)
def test_what_is_left_out_on_purpose_is_refused_with_the_reason(problems, key, words):
    (line,) = problems(BASE, f"{key}=2")
    assert line.startswith(f"--set: {key}: found 2; expected no such key: ") and words in line


def test_experts_inside_the_model_section(problems):
    fields = "{model_type: llama, vocab_size: 9, hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1, "
    text = BASE.replace("{init_from: runs/init}", "{config: " + fields + "num_attention_heads: 2}}")
    (line,) = problems(text, "model.config.num_local_experts=8")
    assert line.startswith("--set: model.config.num_local_experts: ") and "mixture of experts" in line


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("ebft.mode=structured", "strided"),
        ("ebft.top_p=0", "a number > 0 and <= 1"),
        ("ebft.top_p=1.5", "a number > 0 and <= 1"),
        ("ebft.temperature=.inf", "a number > 0"),
        ("ebft.n_samples_per_prompt=0", "an integer >= 1"),
        ("ebft.stride=8.5", "an integer >= 1, tokens"),
        ("ebft.stride=true", "an integer >= 1, tokens"),
        ("ebft.feature_layers=[]", "a list of numbers > 0 and <= 1"),
        ("ebft.feature_layers=[0.5, 1.5]", "a list of numbers > 0 and <= 1"),
        ("ebft.use_whitening=yes", "true or false"),
        ("train.betas=[0.9]", "a list of two numbers >= 0 and < 1"),
        ("train.lr='1e-5'", "a number > 0"),
        ("train.max_tokens=1e6", "exactly one of the two"),
        ("train.step_timeout_minutes=0", "a number > 0, minutes"),
        ("zero.stage=4", "0, 1, 2 or 3"),
        ("zero.feature_network=split", "auto, resident or sharded"),
        ("parallel.tensor_parallel_size=0", "an integer >= 1"),
        ("seed=-1", "an integer from 0 to 2**63 - 1"),
        *(
            (f"data.skip_rows={value}", "a list of pairs [first, last] of row numbers, each an integer >= 0")
            for value in ("3", "[3]", "[[3]]", "[[1, 2, 3]]", "[[-1, 3]]", "[[0, 1.5]]", "[[a, b]]", "{a: 1}", "null")
        ),
        ("data.skip_rows=[[4, 3]]", "[first, last], such as [3, 4]"),
        ("data.skip_rows=[[0, 3], [3, 9]]", "ranges in ascending order without a common row"),
        ("data.skip_rows=[[8, 9], [0, 3]]", "ranges in ascending order without a common row"),
        *((f"data.shards={place}", DATASET_PLACE) for place in NO_DATASET_PLACES),
        *((f"evaluation.shards={place}", DATASET_PLACE) for place in NO_DATASET_PLACES),
        (
            "data.sources={}",
            "a mapping of names (letters, digits, _ and -) to sections with shards, weight and max_epochs",
        ),
        ("output_dir=''", "a local path (relative paths start at the repository root)"),
        ("output_dir=null", "a local path (relative paths start at the repository root)"),
        ("zero=3", "a section with the keys stage, hold_parameters, feature_network, offload_optimizer"),
    ],
)
def test_wrong_values(problems, override, expected):
    (line,) = problems(BASE, override)
    assert line.startswith("--set: ") and line.endswith(f"; expected {expected}")


@pytest.mark.parametrize(
    ("override", "text"),
    [
        (
            "seed=" + "1" * 5000,
            "11...'; expected an integer from 0 to",
        ),
        ("seed=9223372036854775808", "an integer from 0 to 2**63 - 1"),
        ("train.max_tokens=1e300", "an integer >= 1, tokens"),
        ("train.step_timeout_minutes=1e300", "at most 525600"),
        ("data.cache_gigabytes=1e300", "at most 1e+09"),
        ("data.workers=1000000", "at most 1024"),
        ("train.lr=1e39", "at most 1e+06"),
        ("train.weight_decay=1e39", "at most 1 / train.lr"),
        ("output_dir=" + "x" * 5000, "a local path"),
        ("checkpoint.resume=" + "x" * 256, "auto, never or the path of a checkpoint"),
        ("model=" + "[" * 5000 + "]" * 5000, "more than 50 levels"),
    ],
)
def test_values_beyond_all_bounds(problems, override, text):
    (line,) = problems(BASE, override)
    assert line.startswith("--set: ") and text in line and len(line) < 500


def test_weight_decay_takes_no_more_of_a_weight_than_there_is(load, problems):
    load(BASE, "train.lr=0.5", "train.weight_decay=2")
    (line,) = problems(BASE, "train.lr=0.5", "train.weight_decay=2.1")
    assert "train.weight_decay: found 2.1, with train.lr 0.5; expected at most 1 / train.lr" in line


REDIRECT_HOSTS = "a list of host, host:port or *.domain"


def test_redirect_hosts_are_read_and_written_back(load, tmp_path):
    hosts = ("cdn.example", "Cdn.example:8443", "*.cdn.example", "*.a.b.example:1", "localhost:65535", "[::1]:443")
    config = load(BASE, f"data.redirect_hosts={list(hosts)}".replace("'", '"'))
    assert config.data.redirect_hosts == hosts
    (tmp_path / "again.yaml").write_text(resolved_yaml(config))
    assert load_config(tmp_path / "again.yaml").data == config.data


@pytest.mark.parametrize(
    "value",
    [
        "cdn.example",
        "['https://cdn.example']",
        "['*']",
        "['*.com']",
        "['a.*.com']",
        "[cdn.example/x]",
        "[443]",
        "['a b']",
    ]
    + ["['user@cdn.example']", "['cdn.example:0']", "['cdn.example:65536']", "['cdn..example']", "['']", "['::1']"],
)
def test_what_is_no_redirect_host_is_refused(problems, value):
    (line,) = problems(BASE.replace("data: {", f"data: {{redirect_hosts: {value}, "))
    assert line.startswith("c.yaml:3: data.redirect_hosts: found ")
    assert line.endswith(f"; expected {REDIRECT_HOSTS}")


@pytest.mark.parametrize(
    "override",
    [
        "data.shards=https://user:s3cret@host/data",
        "data.shards=https://user:" + 30 * "s3cret" + "@host/data",
        "data.shards=https://host/data?signature=s3cret",
        "data.shards=[https://user:s3cret@host/data]",
        "model.init_from=https://user:s3cret@host/model",
        "data.sahrds=https://user:s3cret@host/data",
        "https://user:s3cret@host/data",
        "output_dir=https://user:s3cret@host/data",
        "train=https://user:s3cret@host/data",
    ],
)
def test_secrets_of_a_refused_address_are_not_shown(problems, override):
    text = "\n".join(problems(BASE, override))
    assert "***" in text and "s3cret" not in text and "user" not in text


def test_strides_of_a_huge_row_are_found_at_once(problems):
    (line,) = problems(BASE, f"data.sequence_length={2**62 + 1}")
    assert "a stride such as" in line


def test_sources_are_read_and_written_back(load, tmp_path):
    data = load(SOURCES).data
    assert {name: (str(source.shards), source.weight, source.max_epochs) for name, source in data.sources.items()} == {
        "python": (str(REPOSITORY / "data/python"), 0.7, None),
        "mixed": ("https://host:8443/data/mixed", 0.3, 2.5),
    }
    assert data.source_key("mixed") == "data.sources.mixed.shards" and data.named_sources == data.sources
    (tmp_path / "again.yaml").write_text(resolved_yaml(load(SOURCES)))
    assert load_config(tmp_path / "again.yaml").data == data
    assert load(SOURCES, "data.sources.python.weight=2").data.sources["python"].weight == 2
    alone = load(BASE).data
    assert [source.shards for source in alone.named_sources.values()] == [REPOSITORY / "data/train"]
    assert alone.source_key("shards") == "data.shards"


def test_everything_wrong_with_sources_is_named_with_its_line(problems):
    text = SOURCES.replace("weight: 0.7", "wieght: 0.7").replace("max_epochs: 2.5", "max_epochs: 0")
    text = text.replace("train:", "    'no name': {shards: a}\n    three: 3\n    d: {}\ntrain:")
    assert problems(text, "data.shards=a") == [
        "c.yaml:8: data.sources.python.wieght: found an unknown key (value 0.7); expected one of the keys of "
        "data.sources.python: shards, weight, max_epochs. Did you mean 'data.sources.python.weight'?",
        "c.yaml:9: data.sources.mixed.max_epochs: found 0; expected a number > 0, epochs",
        "c.yaml:10: data.sources.no name: found 'no name'; expected a name of letters, digits, _ and -, a letter first",
        "c.yaml:11: data.sources.three: found 3; expected a section with the keys shards, weight, max_epochs",
        f"c.yaml:12: data.sources.d.shards: found nothing; expected {DATASET_PLACE} (this key is required)",
    ]


def test_exactly_one_kind_of_data(problems):
    assert problems(SOURCES, "data.shards=a") == [
        "c.yaml:5: data.sources: found both data.shards and data.sources; expected exactly one of the two"
    ]
    assert "found neither data.shards nor data.sources" in problems(BASE, "data.shards=null")[0]


def test_sequence_too_short_for_context_and_generation(problems):
    (line,) = problems(BASE, "data.sequence_length=15")
    assert line == (
        "--set: data.sequence_length: found 15; expected at least 16 (ebft.context_length 8 + ebft.generate_max_len 8)"
    )


def test_sequence_not_divisible_names_neighbours_that_are(problems, load):
    (line,) = problems(BASE, "data.sequence_length=126", "ebft.stride=20")
    assert "= 110 is not divisible by ebft.stride 20" in line
    lengths = re.search(r"a sequence length such as (\d+) or (\d+)", line).groups()
    strides = re.search(r"a stride such as (\d+) or (\d+)", line).groups()
    assert (lengths, strides) == (("116", "136"), ("11", "22"))
    for length in lengths:
        load(BASE, f"data.sequence_length={length}", "ebft.stride=20")
    for stride in strides:
        load(BASE, "data.sequence_length=126", f"ebft.stride={stride}")


def test_length_of_the_run_is_required(problems):
    (line,) = problems(BASE, "train.max_steps=null")
    assert line == "c.yaml:4: train: found neither max_steps nor max_tokens; expected exactly one of the two"


def test_layouts_and_zero_stages_are_built(load):
    config = load(
        BASE,
        "parallel.tensor_parallel_size=2",
        "parallel.pipeline_parallel_size=2",
        "parallel.sequence_parallel=true",
        "zero.feature_network=sharded",
    )
    assert config.parallel.sequence_parallel and config.zero.feature_network == "sharded"
    for stage in (0, 1, 2, 3):
        for hold in ("rollout", "step", "none"):
            assert load(BASE, f"zero.stage={stage}", f"zero.hold_parameters={hold}").zero.stage == stage


def test_sequence_parallel_needs_tensor_parallel(problems):
    assert problems(BASE, "parallel.sequence_parallel=true") == [
        "--set: parallel.sequence_parallel: found true, with parallel.tensor_parallel_size 1; expected false, or a "
        "tensor-parallel size above 1"
    ]


def test_neither_loss_or_no_reward(problems, load):
    assert "ebft.ce_coef is 0 too" in problems(BASE, "ebft.rl_coef=0")[0]
    assert "ebft.ce_coef is 0 too" in problems(BASE, "ebft.rl_coef=0", "ebft.entropy_coef=0.1")[0]
    assert "ebft.entropy_coef" in problems(BASE, "ebft.entropy_coef=-0.1")[0]
    none = ("ebft.alignment_coef=0", "ebft.diversity_coef=0")
    assert "ebft.diversity_coef is 0 too; expected" in problems(BASE, *none)[0]
    with in_registries():
        assert load(BASE, *none, "ebft.reward_terms={matches: -0.5}").ebft.reward_terms == {"matches": -0.5}
        assert "too and so is all of ebft.reward_terms" in problems(BASE, *none, "ebft.reward_terms={matches: 0}")[0]


def test_terms_have_names_of_their_own(problems):
    class Reward(Matches):
        name = "reward"

    with in_registries(Reward, Matches):
        found = problems(BASE, "ebft.reward_terms={alignment: 0.5, matches: 1, reward: 2}")
    assert found == [
        "--set: ebft.reward_terms.alignment: found 0.5, beside ebft.alignment_coef 1.0; expected ebft.alignment_coef "
        "alone, which weighs that term",
        f"--set: ebft.reward_terms.reward: found a term that is called reward ({place_of_entry(Reward)}); expected "
        "another name: a metric or a traced tensor has this one",
    ]
    (unknown,) = problems(BASE, "ebft.reward_terms={diversty: 1}")
    assert "ebft.reward_terms" in unknown and "diversity" in unknown


@pytest.mark.parametrize(
    ("overrides", "found", "expected"),
    [
        ((), "zero.stage 3 and zero.hold_parameters rollout", "zero.hold_parameters step, or zero.stage 0, 1 or 2"),
        (("zero.hold_parameters=none",), "hold_parameters none", "zero.hold_parameters step"),
        (("zero.stage=1", "train.activation_checkpointing=full"), "which keeps none", "activation_checkpointing none"),
    ],
)
def test_activations_cannot_be_saved_of_parameters_that_are_released(problems, overrides, found, expected):
    (line,) = problems(BASE, "learn.reuse_rollout=activations", *overrides)
    assert line.startswith("--set: learn.reuse_rollout: found activations, with ")
    assert found in line.partition("; expected ")[0] and expected in line.partition("; expected ")[2]


@pytest.mark.parametrize(
    "overrides",
    [("zero.hold_parameters=step",), ("zero.stage=2",), ("zero.stage=0",), ("ebft.rl_coef=0", "ebft.ce_coef=1")],
)
def test_activations_can_be_saved_of_parameters_that_stay_whole(load, overrides):
    assert load(BASE, "learn.reuse_rollout=activations", *overrides).learn.reuse_rollout == "activations"


def test_flex_attention_does_not_repeat_its_bits(problems, load):
    (line,) = problems(BASE, "train.attention=flex", "deterministic=true")
    assert line.startswith("--set: train.attention: found flex, with deterministic true: ")
    assert line.endswith("; expected auto, two_part or dense, or deterministic false")
    assert load(BASE, "train.attention=flex").train.attention == "flex"
    assert load(BASE, "train.attention=two_part", "deterministic=true").deterministic


def test_profile_needs_both_keys_and_lies_within_the_run(problems, load):
    run = "train.max_steps=10"
    assert list(load(BASE, run, "profile.start=8", "profile.steps=2").profile.traced_steps) == [8, 9]
    assert not load(BASE, run).profile.traced_steps
    assert problems(BASE, run, "profile.start=3") == [
        "--set: profile.steps: found not set, with profile.start given; expected both or neither"
    ]
    assert problems(BASE, run, "profile.steps=3") == [
        "--set: profile.start: found not set, with profile.steps given; expected both or neither"
    ]
    assert problems(BASE, run, "profile.start=8", "profile.steps=3") == [
        "--set: profile.start: found 8 + profile.steps 3; expected together at most the 10 steps of the run"
    ]
    assert "train: found neither" in "".join(
        problems(BASE, "train.max_steps=null", "profile.start=0", "profile.steps=1")
    )


def test_missing_file_sections_and_keys(problems, load, tmp_path):
    lines = problems("seed: 1\n")
    assert [line.split(": found")[0] for line in lines] == [
        "c.yaml: data.sequence_length",
        "c.yaml: output_dir",
        "c.yaml: model",
        "c.yaml: data",
        "c.yaml: train",
    ]
    with pytest.raises(ConfigError, match="absent.yaml.*no such file"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [1\nb: 2", "c.yaml:2: "),
        ("a: 1\nb: &x 3\nc: *x", "c.yaml:2: (text): found an anchor or alias"),
        (
            "a: !!python/object/apply:os.system [id]",
            "c.yaml:1: (text): found the tag tag:yaml.org,2002:python",
        ),
        ("- 1\n- 2", "c.yaml:1: (file): found [1, 2]"),
    ],
)
def test_text_that_is_no_plain_yaml(problems, text, line):
    (found,) = problems(text)
    assert found.startswith(line)


def test_repeated_key(problems):
    text = BASE + "ebft:\n  stride: 8\n  stride: 4\n"
    (line,) = problems(text)
    assert line.startswith("c.yaml:7: ebft.stride: found this key a second time (the first is in line 6)")


def test_overrides_are_applied_and_checked(load, problems):
    config = load(BASE, "train.max_steps=9", "train.betas=[0.8, 0.9]")
    assert (config.train.max_steps, config.train.betas) == (9, (0.8, 0.9))
    assert config.place("train.max_steps") == "--set"
    assert config.place("data.sequence_length").endswith("c.yaml:3")
    assert problems(BASE, "train.max_steps")[0].startswith("--set: train.max_steps: found no key=value")
    assert "holding a value, not a section" in problems(BASE, "output_dir.x=3")[0]


def test_a_corrected_key_is_blamed_no_more(load):
    assert load(BASE + "ebft: {stride: 0}\n", "ebft.stride=4").ebft.stride == 4


def test_rows_that_are_left_out_are_read_as_the_end_of_a_run_names_them(load):
    assert load(BASE, "data.skip_rows=[[0,15],[160,319]]").data.skip_rows == ((0, 15), (160, 319))


def test_resolved_yaml_reads_back_unchanged(load):
    config = load(BASE + AXOLOTL_BLOCK + "learn: {reuse_rollout: off}\n", "train.lr=1e-5")
    again = load(resolved_yaml(config))
    assert again.model_dump() == config.model_dump()
    assert set(yaml.safe_load(resolved_yaml(config))) == {key.partition(".")[0] for key in all_keys()}


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_way_of_writing_a_float(value):
    for text in (repr(value), f"{value:.17e}", f"{value:+.17E}"):
        assert plain_scalar(text) == value
    assert read_yaml(yaml.safe_dump({"x": value}), "f").value == {"x": value}


INTEGERS = st.integers(-MAX_INTEGER, MAX_INTEGER)


@given(INTEGERS)
def test_any_integer(value):
    assert plain_scalar(str(value)) == value and isinstance(plain_scalar(str(value)), int)


@pytest.mark.parametrize("text", [str(MAX_INTEGER + 1), str(-MAX_INTEGER - 1), "1" * 5000, "-" + "9" * 5000])
def test_an_integer_that_no_key_takes_is_text(text):
    assert plain_scalar(text) == text


json_values = st.recursive(
    st.none() | st.booleans() | INTEGERS | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values, max_size=4))
@example({"": "0E0", "x": ["1e5", "off", "~", "1_0", "yes"]})
def test_whatever_is_written_is_read_back(tree):
    assert read_yaml(write_yaml(tree), "f").value == tree


@given(st.text())
@example("long words " * 40)
@example("a\n b\n")
def test_a_scalar_is_one_line_that_may_stand_anywhere(text):
    written = write_value(text)
    source = read_yaml(f"a:\n  b: {written}  # a comment\n  c: 1\n", "f")
    assert written.count("\n") == 0 and (source.value, source.problems) == ({"a": {"b": text, "c": 1}}, [])


@given(st.sampled_from(sorted(all_keys())), st.data())
def test_a_typing_slip_finds_the_key(key, data):
    """One letter missing in the last part of a key of some length still leads to it."""
    section, dot, leaf = key.rpartition(".")
    if len(leaf) < 6:
        return
    gap = data.draw(st.integers(1, len(leaf) - 2))
    wrong = section + dot + leaf[:gap] + leaf[gap + 1 :]
    assert nearest_key(wrong) == key


@pytest.mark.parametrize("text", ["runs/a #2", "#2", "[1, 2] # two", "'a' #b"])
def test_an_override_is_not_cut_at_a_comment(tmp_path, text):
    (tmp_path / "c.yaml").write_text(BASE)
    with pytest.raises(ConfigError) as refused:
        load_config(tmp_path / "c.yaml", [f"output_dir={text}"])
    assert [str(problem).partition(", where")[0] for problem in refused.value.problems] == [
        f"--set: output_dir: found {text!r}"
    ]


@pytest.mark.parametrize("text", ["'runs/a #2'", '"runs/a #2"'])
def test_quotes_keep_what_would_be_a_comment(tmp_path, text):
    (tmp_path / "c.yaml").write_text(BASE)
    assert load_config(tmp_path / "c.yaml", [f"output_dir={text}"]).output_dir == REPOSITORY / "runs" / "a #2"
    assert load_config(tmp_path / "c.yaml", ["output_dir=runs/a#2"]).output_dir == REPOSITORY / "runs" / "a#2"

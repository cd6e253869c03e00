"""A whole axolotl file: every key has a fate, values are translated, and the loader accepts what comes out."""

from pathlib import Path

import pytest
import yaml

from ebft_mega.config.axolotl.axolotl_keys import AXOLOTL_KEYS, Fate, foreign_key
from ebft_mega.config.load import load_config
from ebft_mega.config.schema import all_keys
from ebft_mega.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[3]
TOOL = REPOSITORY / "tools" / "import_axolotl.py"
LONG = "outputs/" + "long name " * 12 + "x"
FULL = """\
base_model: Someone/Coder-1B
rl: ebft
ebft:
  mode: strided
  stride: 4
  context_length: 8
  generate_max_len: 8
  n_samples_per_prompt: 3
  temperature: 0.7
  feature_layers: [0.5, 0.75]
  embed_method: mean_pooling
  use_whitening: true
  ce_coef: 0.1
  min_completion_prefix: 8
datasets:
  - path: someone/code-of-all
    type: ebft_pretrain.transform
    split: train[:1%]
    text_column: content
dataset_prepared_path: prepared
val_set_size: 0.02
output_dir: ./outputs/strided
sequence_len: 256
sample_packing: false
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 1
max_steps: 1000
learning_rate: "2e-5"
optimizer: adamw_torch_fused
adam_beta2: 0.95
lr_scheduler: constant_with_warmup
warmup_ratio: 0.0305
weight_decay: 0.1
max_grad_norm: 0.5
bf16: auto
flex_attention: true
torch_compile: true
gradient_checkpointing: true
wandb_project: p
logging_steps: 1
save_steps: 0.05
save_total_limit: 3
special_tokens: {pad_token: "<|pad|>"}
deepspeed: deepspeed_configs/zero2.json
seed: 7
"""
LORA = (
    FULL
    + """\
adapter: lora
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_linear: true
"""
)
WRITTEN = {
    "seed": 7,
    "ebft.stride": 4,
    "ebft.n_samples_per_prompt": 3,
    "ebft.embed_method": "mean_pooling",
    "ebft.use_whitening": True,
    "ebft.whitening": "feature",
    "ebft.feature_norm": "per_layer",
    "ebft.ce_coef": 0.1,
    "data.sequence_length": 256,
    "data.document_masking": True,
    "train.global_batch_size": 2 * 4 * 8,
    "train.micro_batch_size": 2,
    "train.max_steps": 1000,
    "train.lr": 2e-5,
    "train.lr_scheduler": "constant",
    "train.optimizer": "adamw",
    "train.warmup_steps": 31,
    "train.betas": (0.9, 0.95),
    "train.weight_decay": 0.1,
    "train.grad_clip": 0.5,
    "train.dtype": "bfloat16",
    "train.activation_checkpointing": "full",
    "zero.stage": 2,
    "checkpoint.interval": 50,
    "checkpoint.keep_last": 3,
    "evaluation.interval": 50,
}


@pytest.fixture
def imported(run_tool, tmp_path):
    """The tool: exit code, standard error, and the text that it wrote."""

    def run(text, *arguments):
        (tmp_path / "axolotl.yaml").write_text(text, encoding="utf-8")
        output = tmp_path / "ours.yaml"
        code, _, err = run_tool(
            "import_axolotl.py", "--input", tmp_path / "axolotl.yaml", "--output", output, *arguments
        )
        return code, err, output.read_text(encoding="utf-8") if output.exists() else ""

    return run


def value(config, dotted):
    for name in dotted.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize("text", [FULL, LORA], ids=["full", "lora"])
def test_a_whole_file_becomes_ours(imported, tmp_path, text):
    code, err, written = imported(text, "--gpus", 8)
    assert code == 0, err
    config = load_config(tmp_path / "ours.yaml")
    assert {key: value(config, key) for key in WRITTEN} == WRITTEN
    assert config.model.init_from.name == "Coder-1B" and config.evaluation.shards.name == "held-out"
    assert config.data.shards.parts[-2:] == ("code-of-all", "train") and config.output_dir.name == "strided"
    # What is no key here is said with its value and the reason, in the file and on the console.
    left_out = ["ebft.min_completion_prefix: 8: refused", "wandb_project: p: without", "torch_compile: true: without"]
    left_out += ["lora_r: 16: refused: LoRA", "lora_dropout: 0.05: refused: dropout is 0 here"] * (text is LORA)
    for line in left_out:
        assert f"#   {line}" in written and f"not here: {line}" in err
    assert "to be supplied: Someone/Coder-1B" in written
    assert "--text-key content --held-out 2% --split-by document --output data/code-of-all" in written


def test_every_key_of_the_file_has_one_fate(imported):
    """Nothing is lost in silence: taken over, translated, or listed."""
    _, err, written = imported(LORA, "--gpus", 8)
    tree = yaml.safe_load(LORA)
    for name in tree:
        key = foreign_key(name)
        assert key is not None, name
        if key.fate in (Fate.REFUSED, Fate.MEANINGLESS) and name != "ebft":
            assert f"not here: {name}" in err


def test_what_stands_in_the_table_are_keys_of_this_trainer():
    ours = {name for key in AXOLOTL_KEYS for name in key.ours} - {"ebft.*"}
    assert ours - set(all_keys()) == set()
    names = [name for key in AXOLOTL_KEYS for name in key.names]
    assert len(names) == len(set(names))


def test_defaults_of_axolotl_are_written_out(imported, tmp_path):
    minimal = "base_model: m\nebft: {mode: strided}\ndatasets: [{path: d}]\nlearning_rate: 1e-5\nmax_steps: 10\n"
    code, err, _ = imported(minimal)
    assert code == 0, err
    config = load_config(tmp_path / "ours.yaml")
    assert (config.seed, config.train.lr_scheduler, config.train.betas) == (42, "cosine", (0.9, 0.999))
    assert (config.ebft.use_whitening, config.data.sequence_length) == (False, 512)
    assert (config.ebft.whitening, config.ebft.feature_norm) == ("feature", "per_layer")


@pytest.mark.parametrize("method", ["concat", "completion_mean"])
def test_ways_of_pooling_that_the_strided_mode_does_not_have_become_what_it_computes(imported, tmp_path, method):
    code, err, written = imported(FULL.replace("mean_pooling", method))
    assert code == 0, err
    assert load_config(tmp_path / "ours.yaml").ebft.embed_method == "last_token"
    assert f"what axolotl's strided mode computes where {method} is asked for" in written


def test_the_lowest_rate_is_a_share_of_the_highest_and_only_of_a_cosine(imported, tmp_path):
    text = FULL + "cosine_min_lr_ratio: 0.1\n"
    code, err, written = imported(text.replace("lr_scheduler: constant_with_warmup", "lr_scheduler: cosine"))
    assert code == 0, err
    config = load_config(tmp_path / "ours.yaml")
    assert (config.train.lr, config.train.min_lr) == (2e-5, 2e-6)
    (tmp_path / "ours.yaml").unlink()
    code, err, written = imported(text)
    assert code == 0, err
    assert load_config(tmp_path / "ours.yaml").train.min_lr == 0
    assert "#   cosine_min_lr_ratio: 0.1: without meaning here: the schedule is constant_with_warmup" in written


def test_epochs_need_the_number_of_tokens(imported, tmp_path):
    text = FULL.replace("max_steps: 1000\n", "").replace("num_epochs: 1", "num_epochs: 2")
    code, err, written = imported(text)
    assert code == 2 and "--data-tokens" in err and not written
    code, err, _ = imported(text, "--data-tokens", 1_024_000)
    assert code == 0, err
    assert load_config(tmp_path / "ours.yaml").train.max_steps == 2 * 1_024_000 // (8 * 256)


def test_several_datasets_are_sources(imported, tmp_path):
    text = FULL.replace("datasets:\n", "datasets:\n  - path: other/code-of-all\n  - path: a/3rd set\n")
    code, err, _ = imported(text)
    assert code == 0, err
    assert list(load_config(tmp_path / "ours.yaml").data.sources) == ["code-of-all", "data-3rd-set", "code-of-all-3"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("rl: ebft", "rl: grpo", "rl: found grpo; expected ebft"),
        ("  mode: strided\n", "  mode: structured\n", "ebft.mode"),
        ("  mode: strided\n", "", "ebft.mode: found nothing"),
        ("  stride: 4", "  strid: 4", "ebft.strid: found 4"),
        ("wandb_project", "wanbd_project", "wanbd_project: found p; expected a key of axolotl that is known here"),
        ("lr_scheduler: constant_with_warmup", "lr_scheduler: rex", "lr_scheduler: found rex"),
        ('learning_rate: "2e-5"', "learning_rate: fast", "learning_rate: found fast; expected a number"),
        ("sequence_len: 256", "sequence_len: 257", "data.sequence_length"),
        ("micro_batch_size: 2", "micro_batch_size: 2.5", "micro_batch_size: found 2.5; expected a whole number"),
        ("base_model: Someone/Coder-1B\n", "", "base_model: found nothing"),
        ("val_set_size: 0.02", "val_set_size: 2000", "val_set_size: found 2000; expected a share"),
        ("warmup_ratio: 0.0305", "warmup_ratio: 1e308", "warmup_ratio: found 1e+308; expected a number"),
        (
            "val_set_size: 0.02",
            "test_datasets: 7",
            "test_datasets: found {'path': 7}; expected datasets",
        ),
        ("rl: ebft", "rl: [", "axolotl.yaml"),
        ("rl: ebft", "rl: &anchor ebft", "an anchor or alias"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_written(imported, old, new, words):
    assert old in FULL
    code, err, written = imported(FULL.replace(old, new, 1))
    assert code == 2 and words in err and "axolotl.yaml" in err and "Traceback" not in err
    assert not written


@pytest.mark.parametrize(
    ("old", "new", "key", "expected"),
    [
        ("bf16: auto", "bfloat16: false", "train.dtype", "float32"),
        ("deepspeed: deepspeed_configs/zero2.json", "fsdp: [full_shard]", "zero.stage", 3),
        ("deepspeed: deepspeed_configs/zero2.json", "fsdp_version: 2", "zero.stage", 3),
        ("base_model: Someone/Coder-1B", "base_model: /models/a $b", "model.init_from", Path("/models/a $b")),
        ("val_set_size: 0.02", "test_datasets: [{path: a/tests}]", "evaluation.shards", REPOSITORY / "data" / "tests"),
        ("./outputs/strided", LONG, "output_dir", REPOSITORY / LONG),
    ],
)
def test_a_key_is_not_lost_in_silence(imported, tmp_path, old, new, key, expected):
    assert old in FULL
    code, err, _ = imported(FULL.replace(old, new, 1))
    assert code == 0, err
    assert value(load_config(tmp_path / "ours.yaml"), key) == expected


def test_a_file_of_deepspeed_whose_name_says_no_stage(imported):
    code, err, _ = imported(FULL.replace("deepspeed_configs/zero2.json", "my.json"))
    assert code == 0 and "not here: deepspeed: my.json: refused: its name says no stage: write zero.stage" in err


def test_which_part_of_a_dataset_is_to_be_supplied(imported):
    found = "    name: python\n    revision: abc\n    split: train[:1%]\n"
    code, err, _ = imported(FULL.replace("    split: train[:1%]\n", found))
    assert code == 0 and "download someone/code-of-all, name python, revision abc, train[:1%], then" in err
    code, err, _ = imported(FULL.replace("someone/code-of-all", "/here/my code"), "--overwrite")
    assert code == 0 and "data.shards: python tools/build_shards.py --input '/here/my code' --tokenizer" in err


@pytest.mark.parametrize("separator", ["\n", "\r", "\x85", "\u2028"])
def test_no_text_of_the_file_ends_a_comment(imported, tmp_path, separator):
    texts = {"base_model": f"a{separator}seed: 8", "output_dir": f"b{separator}#", "wandb_project": f"{separator}d: 1"}
    tree = yaml.safe_load(FULL) | texts
    code, err, _ = imported(yaml.safe_dump(tree))
    assert code == 0, err
    config = load_config(tmp_path / "ours.yaml")
    assert config.seed == WRITTEN["seed"] and config.output_dir == REPOSITORY / f"b{separator}#"


def problems_of(tmp_path, text):
    (tmp_path / "axolotl.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "axolotl.yaml")
    return [str(problem).replace(f"{tmp_path}/", "") for problem in caught.value.problems]


def test_the_loader_names_each_foreign_key_once_with_its_translation(tmp_path):
    lines = problems_of(tmp_path, LORA)
    for name in set(yaml.safe_load(LORA)) - {"ebft", "output_dir", "seed"}:
        (line,) = (line for line in lines if f": {name}: found" in line)
        assert "one of the keys of the file" not in line and "Did you mean" not in line
    assert any("deepspeed: found a key of axolotl" in line and "expected zero.stage" in line for line in lines)
    assert "tools/import_axolotl.py" in lines[0]
    # What is missing comes last.
    assert [": found nothing" in line or ": found neither" in line for line in lines][-4:] == [True] * 4
    assert not any(": found nothing" in line or ": found neither" in line for line in lines[:-4])


def test_the_keys_of_a_section_are_listed_once(tmp_path):
    lines = problems_of(tmp_path, "zzz: 1\nyyy: 2\nxxx: 3\ntrain:\n  zzz: 1\n  yyy: 2\n")
    assert sum("output_dir, permissions" in line for line in lines) == 1
    assert sum("global_batch_size, micro_batch_size" in line for line in lines) == 1
    assert sum("see above" in line for line in lines) == 3


def test_a_key_of_ours_in_the_wrong_place_is_led_to_its_own(tmp_path):
    lines = problems_of(tmp_path, "rl_coef: 0\n")
    assert any("rl_coef: found an unknown key" in line and "'ebft.rl_coef'" in line for line in lines)

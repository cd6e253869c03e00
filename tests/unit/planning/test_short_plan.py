"""What a start says before it begins."""

from pathlib import Path

from ebft_mega.config.load import load_config
from ebft_mega.planning.run_plan import check_run
from ebft_mega.planning.short_plan import TraceRequest, short_plan


def lines_of(inputs, world_size=1, trace=None, **changes):
    config = load_config(inputs.write(**changes))
    lines = short_plan(config, check_run(config, world_size), trace)
    return [" ".join(line.split()).replace(f"{inputs.root}/", "") for line in lines]


def test_a_run(inputs):
    assert lines_of(inputs, 2) == [
        "The run in short:",
        "model llama, 9,424 parameters, from model",
        "layout 2 processes: tensor 1 x data 2 x pipeline 1; ZeRO stage 3, bfloat16; "
        "8 rows a step in micro-batches of 2",
        "data train: 4 documents, 660 tokens; held out: held_out",
        "tokens 2,560 in 80 rows of 32: 3.88 epochs",
        "steps 10, of 256 tokens each",
        "place run",
        "checkpoints after the last step; 0.000 GB each, in run/checkpoints",
    ]


def test_a_mixture_without_held_out_data(inputs):
    sources = {"code": {"shards": str(inputs.root / "train")}, "other": {"shards": str(inputs.root / "held_out")}}
    lines = lines_of(inputs, data__shards=None, data__sources=sources, evaluation={})
    assert lines[3] == "data 2 sources (code, other): 6 documents, 939 tokens; nothing held out"
    assert lines[4] == "tokens 2,560 in 80 rows of 32: 1.94 epochs of code, 4.59 epochs of other"


def test_random_weights_and_a_feature_model(inputs):
    model = {"config": inputs.model_fields}
    lines = lines_of(inputs, model=model, ebft__feature_model=str(inputs.root / "model"), train__max_steps=1)
    assert lines[1] == "model llama, 9,424 parameters, from random weights; features of model"


def test_a_trace(inputs):
    lines = lines_of(inputs, trace=TraceRequest(Path("/somewhere/trace")))
    assert lines[-2:] == [
        "steps one, of 256 tokens; it is traced, and nothing else is written",
        "place /somewhere/trace",
    ]
    assert not any(line.startswith(("tokens", "checkpoints")) for line in lines)
    lines = lines_of(inputs, trace=TraceRequest(Path("/somewhere/trace"), warmup=20))
    assert lines[-2].startswith("steps one, of 256 tokens, after 20 that estimators learn from and the weights do not;")


def test_no_line_is_taken_for_one_of_those_that_scripts_read(inputs):
    config = load_config(inputs.write(output_dir=str(inputs.root / "a\nmodel:  b")))
    for line in short_plan(config, check_run(config, 1)):
        assert "\n" not in line and not line.startswith(("model:", "report:", "step "))

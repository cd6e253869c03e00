"""The recipes for published models: the dry run accepts each at its size, and it fits an 80 GB accelerator."""

import json
import re
import runpy
from pathlib import Path

import pytest

from ebft_mega.config.load import load_config
from ebft_mega.errors import InputError
from ebft_mega.planning.absent_inputs import MODEL_CONFIGS
from ebft_mega.planning.auto import choices
from ebft_mega.planning.dry_run import GIB_BYTES, describe_run
from ebft_mega.planning.memory import Choices, peak_bytes, plan_memory
from ebft_mega.planning.run_plan import check_run
from tests.unit.conftest import write_dataset, write_tokenizer
from tests.unit.planning.stand_ins import MODELS, PARAMETERS, count, tensor_shapes, write_model

CONFIGS = Path(__file__).parents[3] / "configs"
# Recipe: (model, world size, (tensor, pipeline, data)).
RECIPES = {
    "qwen2.5-7b-8gpu": ("Qwen2.5-7B", 8, (1, 1, 8)),
    "qwen2.5-7b-4nodes": ("Qwen2.5-7B", 32, (2, 1, 16)),
    "llama-3.1-8b-8gpu": ("Llama-3.1-8B", 8, (1, 1, 8)),
    "qwen2.5-32b-16nodes": ("Qwen2.5-32B", 128, (8, 2, 8)),
}
# What learning takes over from the rollouts on 80 GB.
REUSE = {
    "qwen2.5-7b-8gpu": "checkpoints",
    "qwen2.5-7b-4nodes": "activations",
    "llama-3.1-8b-8gpu": "checkpoints",
    "qwen2.5-32b-16nodes": "activations",
}
DEVICE_BYTES = 80 * 10**9
# Less a fifth for what the table leaves out: allocator slack, communication buffers, libraries.
ROOM_BYTES = 0.8 * DEVICE_BYTES
CHECKPOINTS = Choices("checkpoints", feature_network_is_sharded=False)
# Production rows: 127 blocks of 8 tokens and 4 samples in 1024 tokens.
BLOCKS, ROLLOUTS = 127, 4 * 127


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Models and datasets with the sizes of the true ones."""
    root = tmp_path_factory.mktemp("published")
    for name, fields in MODELS.items():
        write_model(root / name, fields)
        write_tokenizer(root / name, '{"model": {}}')
    write_dataset(root / "train", root / "Qwen2.5-7B", [70_000])
    write_dataset(root / "held_out", root / "Qwen2.5-7B", [69_000])
    return root


def planned(stand_ins, recipe, *overrides):
    """A recipe's configuration and plan, with stand-ins for the paths that users have."""
    model, world_size, _ = RECIPES[recipe]
    config = load_config(
        CONFIGS / f"{recipe}.yaml",
        [
            f"model.init_from={stand_ins / model}",
            f"data.shards={stand_ins / 'train'}",
            f"evaluation.shards={stand_ins / 'held_out'}",
            *overrides,
        ],
    )
    return config, check_run(config, world_size)


@pytest.mark.parametrize("model", MODELS)
def test_parameters_are_those_of_the_published_model(stand_ins, model):
    assert sum(map(count, tensor_shapes(MODELS[model]).values())) == PARAMETERS[model]
    recipe = next(name for name, (of, *_) in RECIPES.items() if of == model)
    _, plan = planned(stand_ins, recipe)
    assert plan.architecture.num_parameters == PARAMETERS[model]


@pytest.mark.parametrize("recipe", RECIPES)
def test_layout_and_memory(stand_ins, recipe):
    _, world_size, (tensor, pipeline, data) = RECIPES[recipe]
    config, plan = planned(stand_ins, recipe)
    sizes = plan.parallel
    assert (sizes.tensor_parallel, sizes.pipeline_parallel, sizes.data_parallel) == (tensor, pipeline, data)
    assert plan.notes == ()
    chosen = choices(config, plan, DEVICE_BYTES)
    assert chosen == Choices(REUSE[recipe], feature_network_is_sharded=False)
    assert peak_bytes(config, plan, chosen) < ROOM_BYTES
    peak = peak_bytes(config, plan, CHECKPOINTS)
    lines = [" ".join(line.split()) for line in describe_run(config, plan).splitlines()]
    assert f"peak (states and the largest phase) {peak / GIB_BYTES:.3f}" in lines
    assert f"processes {world_size}" in lines


def test_the_configuration_page_shows_what_the_dry_run_prints(stand_ins):
    page = (CONFIGS.parent / "docs" / "configuration.md").read_text(encoding="utf-8")
    for recipe, (_, world_size, (tensor, pipeline, data)) in RECIPES.items():
        config, plan = planned(stand_ins, recipe)
        text = describe_run(config, plan, DEVICE_BYTES)
        peak = peak_bytes(config, plan, choices(config, plan, DEVICE_BYTES)) / GIB_BYTES
        assert re.search(rf"^peak \(states and the largest phase\) +{peak:.3f}$", text, re.MULTILINE)
        assert re.search(rf"^peak of the ranks that need the most, GiB +{peak:.3f}$", text, re.MULTILINE)
        assert re.search(r"^it fits +yes: [0-9.]+ GiB left$", text, re.MULTILINE)
        layout = f"{tensor} x {pipeline} x {data}"
        assert f"| `{recipe}.yaml` | {world_size} | {layout} | {REUSE[recipe]}, resident | {peak:.1f} |" in page
    text = describe_run(*planned(stand_ins, "qwen2.5-32b-16nodes"))
    shown = page.partition("```text\nranks ")[2].partition("```")[0].splitlines()
    assert len(shown) == 4
    assert all(line == "..." or line in text for line in shown)


@pytest.mark.parametrize("recipe", RECIPES)
def test_hyper_parameters_are_the_authors(stand_ins, recipe):
    config, _ = planned(stand_ins, recipe)
    ebft, train = config.ebft, config.train
    assert (ebft.stride, ebft.context_length, ebft.generate_max_len, config.data.sequence_length) == (8, 8, 8, 1024)
    assert (train.global_batch_size, ebft.n_samples_per_prompt, ebft.temperature) == (16, 4, 0.6)
    assert (train.lr, train.betas, train.lr_scheduler, train.dtype) == (1e-6, (0.9, 0.95), "constant", "bfloat16")
    assert train.warmup_steps == round(0.03 * config.total_steps)


def test_memory_of_the_7b_recipe_recomputed(stand_ins):
    """Numbers from the model card's sizes, without the planner's functions."""
    memory = plan_memory(*planned(stand_ins, "qwen2.5-7b-8gpu"), CHECKPOINTS)
    share = PARAMETERS["Qwen2.5-7B"] // 8  # divisible
    layer = 2 * 3584 * 3584 + 2 * 3584 * 512 + (3584 + 1024) + 3 * 3584 * 18944 + 2 * 3584
    assert memory.states == {
        "parameters": 2 * share,
        "gradients (float32)": 4 * share,
        "optimizer moments (float32)": 8 * share,
        "master parameters (float32)": 4 * share,
        "frozen feature network": 2 * (152064 * 3584 + 21 * layer),  # the deepest tap is at 3/4 of 28 layers
    }
    # ce_coef wants the targets of all 1024 tokens, so the document ends at 1023; two rows.
    positions, gathered = 2 * (1023 + ROLLOUTS * 7), 2 * PARAMETERS["Qwen2.5-7B"]
    kept = positions * 29 * 3584 * 2
    assert memory.phases["rollout"] == {
        "saved checkpoints of the rollouts": kept,
        "gathered parameters": gathered,
        "keys and values": positions * 28 * (2 * 512) * 2,
        "a chunk of logits": 512 * 152064 * 12,
    }
    keeps = positions * (6 * 3584 + 4 * 3584 + 3 * 512 + 3 * 18944) + positions * 4 * 128
    assert memory.phases["learn"] == {
        "saved checkpoints of the rollouts": kept,
        "gathered parameters": gathered,
        "one layer, recomputed": keeps * 2 + positions * 28 * 4,
        "gradients of one layer": (positions * (2 * 3584 + 3 * 18944) + 2 * 18944 * 3584) * 2,
        "gradients being reduced": (2 + 4) * 152064 * 3584,  # the head's matrix alone: as it came and in float32
    }
    packed = 2 * (1024 + ROLLOUTS * 8)
    assert memory.phases["features"] == {
        "saved checkpoints of the rollouts": kept,
        "gathered parameters": gathered,
        "one layer": packed * (3 * 3584 + 3 * 18944) * 2,
        "rows of the tapped layers": 3 * 2 * BLOCKS * 5 * 3584 * 2,
    }
    assert memory.phases["update"] == {"a gradient in float64": 8 * 152064 * 3584 // 8}
    assert memory.peak_bytes == sum(memory.states.values()) + sum(memory.phases["learn"].values())


def test_memory_of_the_32b_recipe_recomputed(stand_ins):
    """Eight slices, two stages, sequence parallel, two micro-batches: both stages from the model card's sizes."""
    config, plan = planned(stand_ins, "qwen2.5-32b-16nodes")
    kept = Choices("activations", feature_network_is_sharded=False)
    first, last = (plan_memory(config, plan, kept, stage) for stage in (0, 1))
    matrices = 2 * 5120 * 5120 + 2 * 5120 * 1024 + 5120 + 2048 + 3 * 5120 * 27648
    layer = matrices // 8 + 2 * 5120
    embedding = 152064 * 5120 // 8  # 64 blocks of 2376 ids: no padding
    on_first, on_last = 32 * layer + embedding, 32 * layer + embedding + 5120
    assert first.states["parameters"] == 2 * on_first // 8
    assert last.states["optimizer moments (float32)"] == 8 * on_last // 8
    # The feature network: 48 layers, 24 on each stage, and no head; it is whole on each replica.
    assert first.states["frozen feature network"] == 2 * (embedding + 24 * layer)
    assert last.states["frozen feature network"] == 2 * 24 * layer
    for memory, parameters in ((first, on_first), (last, on_last)):
        assert all(memory.phases[phase]["gathered parameters"] == 2 * parameters for phase in ("rollout", "learn"))
    # Saved for both micro-batches, on either stage; what is between the layers is an eighth.
    document, learned = 1023, 1023 + ROLLOUTS * 7
    shard = -(-learned // 8)
    values = shard * 6 * 5120 + learned * (4 * 640 + 3 * 128 + 3 * 3456) + learned * 4 * 128
    grown = sum(2 * token * 128 - (640 + 3 * 128) for token in range(1, 8))
    layer_keeps = 2 * (values + 2 * 128 * document + ROLLOUTS * grown) + learned * 5 * 4
    for memory in (first, last):
        for phase in ("rollout", "features", "learn"):
            assert memory.phases[phase]["saved activations of the rollouts"] == 2 * 32 * layer_keeps
    assert "a chunk of logits" not in first.phases["rollout"] | first.phases["learn"]
    assert last.phases["rollout"]["a chunk of logits"] == ROLLOUTS * (152064 // 8) * 12  # fewer than 512

    # Two micro-batches decode in turn; one key-value head of 128 per slice.
    first, last = (plan_memory(config, plan, CHECKPOINTS, stage) for stage in (0, 1))
    assert first.phases["rollout"]["keys and values"] == 2 * learned * 32 * (2 * 128) * 2
    for memory, inputs in ((first, 32), (last, 33)):  # the last stage keeps its output, too
        assert memory.phases["features"]["saved checkpoints of the rollouts"] == 2 * inputs * shard * 5120 * 2

    # 1F1B without anything kept: two micro-batches in flight on the first stage, one on the last.
    off = Choices("off", feature_network_is_sharded=False)
    layer_keeps = 2 * values + learned * 5 * 4
    for stage, in_flight in ((0, 2), (1, 1)):
        learn = plan_memory(config, plan, off, stage).phases["learn"]
        assert learn["activations"] == in_flight * 32 * layer_keeps
    config, plan = planned(stand_ins, "qwen2.5-32b-16nodes", "train.activation_checkpointing=full")
    learn = plan_memory(config, plan, off, 0).phases["learn"]
    assert learn["activations"] == 2 * 32 * shard * 5120 * 2
    assert learn["one layer, recomputed"] == layer_keeps


def test_more_replicas_than_rows_are_refused_with_layouts_that_work(stand_ins):
    with pytest.raises(InputError) as caught:
        planned(stand_ins, "qwen2.5-7b-4nodes", "parallel.tensor_parallel_size=1")
    (problem,) = caught.value.problems
    # 28 heads and 4 key-value heads leave slices of 1, 2 and 4; at most 16 replicas, and at most 28 stages.
    assert problem.expected == (
        "a multiple of 32 (train.micro_batch_size 1 x data-parallel size 32), or tensor 1 with pipeline 2, 4, 8 or "
        "16; tensor 2 with pipeline 1, 2, 4, 8 or 16; tensor 4 with pipeline 1, 2, 4 or 8"
    )


def test_the_page_has_a_row_for_every_recipe():
    tool = runpy.run_path(str(CONFIGS.parent / "tools" / "docs_tables.py"))
    assert tool["RECIPES"] == {recipe: world_size for recipe, (_, world_size, _) in RECIPES.items()}
    assert tool["GPU_BYTES"] == DEVICE_BYTES


@pytest.mark.parametrize("model", MODELS)
def test_the_configurations_of_published_models_lie_beside_the_recipes(model):
    fields = json.loads((MODEL_CONFIGS / model / "config.json").read_text(encoding="utf-8"))
    assert {name: fields[name] for name in MODELS[model]} == MODELS[model]
    base = 500_000.0 if model.startswith("Llama") else 1_000_000.0
    assert (fields["rope_theta"], fields["torch_dtype"], fields["hidden_act"]) == (base, "bfloat16", "silu")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_plan_without_data_is_that_of_the_true_model(stand_ins, recipe):
    """From the repository alone, as in a fresh clone."""
    config = load_config(CONFIGS / f"{recipe}.yaml", [f"model.init_from={stand_ins}/nowhere/{RECIPES[recipe][0]}"])
    plan = check_run(config, RECIPES[recipe][1], without_data=True)
    assert plan.architecture.num_parameters == PARAMETERS[RECIPES[recipe][0]]
    assert {entry.key for entry in plan.to_be_supplied} >= {"model.init_from"}
    whole = describe_run(*planned(stand_ins, recipe), DEVICE_BYTES)
    bare = describe_run(config, plan, DEVICE_BYTES)
    layouts = [text.partition("\nLayout\n")[2].partition("\nNotes\n")[0] for text in (whole, bare)]
    assert layouts[0] == layouts[1] != ""

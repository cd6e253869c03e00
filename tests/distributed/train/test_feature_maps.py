"""Every feature map over two slices and over two stages gives the inner products of explicit vectors of one process.

A map that breaks its contract on one rank ends the step on both, with one message.

One start of two ranks: the layouts are made one after another in the same processes, and a network is built once for
all maps, norms and weights.
"""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ebft_mega.architecture.hf_config import Architecture, tapped_layers
from ebft_mega.architecture.partition import StageShape
from ebft_mega.errors import EntryError
from ebft_mega.extension.feature_map import FeatureMap
from ebft_mega.features.factory import FeatureSettings, build_feature_network
from ebft_mega.features.gram import FeatureRecipe
from ebft_mega.features.network import FeatureNetwork
from ebft_mega.forest import Forest
from ebft_mega.model.stage import Stage
from ebft_mega.model.strided_attention import StridedLayout
from ebft_mega.model.weights.stage_weights import load_weights
from ebft_mega.model.weights.weight_sources import RandomWeights
from ebft_mega.parallel.groups import ProcessGroups, connect, make_process_groups
from ebft_mega.registry.kinds import FEATURE_MAPS
from ebft_mega.rollout.packed_order import packed_sequence
from ebft_mega.types import Rollout
from tests.distributed.ranks import run_ranks
from tests.distributed.steps import Case, config_of, rows_of_step
from tests.explicit_features import NORMS, explicit_gram

LAYOUTS = {"tp2": (2, 1), "pp2": (1, 2)}
# With 1.0 alone the first of two stages has no layer that is read.
DEPTHS = {(0.25, 0.5, 0.75): (0.5, 0.0, 3.0), (1.0,): (2.0,)}
CASES = [
    (method, norm, depths, weights)
    for depths, of_layers in DEPTHS.items()
    for method in FEATURE_MAPS.own_names()
    for norm in NORMS
    for weights in (None, of_layers)
]


def inputs(directory: str, groups: ProcessGroups):
    """Configuration, rows (of one replica) and made-up rollouts, of which two are equal."""
    config = config_of(Case("maps"), directory)
    plan, rows = config.block_plan, rows_of_step(0, groups)
    shape = (len(rows.tokens), plan.num_samples, plan.num_blocks, plan.generate_length)
    tokens = torch.randint(0, 131, shape, generator=torch.Generator().manual_seed(9))
    tokens[:, 1, 0] = tokens[:, 0, 0]
    tokens[0, 2, 1:, :2] = tokens[0, 0, 1:, :2]  # and others begin alike
    return config, rows, Rollout(tokens, Forest.of(tokens, merges=True))


def network_of(config, depths, groups: ProcessGroups) -> FeatureNetwork:
    architecture = Architecture.from_hf(config.model.config, "test")
    recipe = FeatureRecipe.of(config)
    settings = FeatureSettings(depths, recipe, torch.float32)
    return build_feature_network(architecture, RandomWeights(architecture, config.seed), settings, groups)


class Faulty(FeatureMap):
    """The mean of the tokens, but for one rank that does what it is told to."""

    name = "faulty"
    told = None

    def positions(self, generate_length):
        return range(generate_length)

    def pool(self, rows):
        vectors = rows.mean(dim=-2)
        return self.told(vectors) if dist.get_rank() == 1 and self.told else vectors


def raises(vectors):
    raise ValueError("no word for\nthis \x1b[2J")


FAULTS = {
    "shape": (lambda vectors: vectors[..., :-1], "found a float64 tensor [4, 5, 4, "),
    "dtype": (lambda vectors: vectors.float(), "found a float32 tensor [4, 5, 4, "),
    "finite": (lambda vectors: vectors / 0, "found a vector that is not finite at row 0, block 0, feature 0"),
    "raises": (raises, "found ValueError: no word for"),
}


def messages_of_faults(network: FeatureNetwork, batch, rollout, config) -> dict[str, str]:
    """What each fault of the second rank raises on this one, by its name; what follows is whole again."""
    found = {}
    for norm in NORMS:
        recipe = FeatureRecipe(Faulty(), config.ebft.generate_max_len, norm, None, "c.yaml:7")
        for normalises in ("tokens", "pooled"):
            for name, (told, _) in FAULTS.items():
                Faulty.told, Faulty.normalises = staticmethod(told), normalises
                with pytest.raises(EntryError) as raised:
                    replace(network, recipe=recipe).grams([batch], [rollout], config.block_plan)
                found[f"{name} {norm} {normalises}"] = str(raised.value)
    Faulty.told = None
    replace(network, recipe=recipe).grams([batch], [rollout], config.block_plan)
    return found


def grams_of_each_layout(directory: str) -> tuple[dict[str, list[Tensor]], dict[str, dict[str, str]]]:
    device, found, messages = connect(), {}, {}
    for name, (tensor, pipeline) in LAYOUTS.items():
        groups = make_process_groups(device, tensor, pipeline)
        config, rows, rollout = inputs(directory, groups)
        networks = {depths: network_of(config, depths, groups) for depths in DEPTHS}
        found[name], messages[name] = [], messages_of_faults(networks[1.0,], rows, rollout, config)
        for method, norm, depths, weights in CASES:
            recipe = FeatureRecipe(FEATURE_MAPS.entry(method)(), config.ebft.generate_max_len, norm, weights)
            network = replace(networks[depths], recipe=recipe)
            found[name] += network.grams([rows], [rollout], config.block_plan)
    return found, messages


def hidden_states(config, rows, rollout, depths, groups: ProcessGroups) -> Tensor:
    """[B, K, n + 1, G, L, H] of all tokens of all windows, from a whole model whose every position is kept."""
    plan, architecture = config.block_plan, Architecture.from_hf(config.model.config, "test")
    stage = Stage(architecture, StageShape.whole(architecture), groups, torch.float32)
    load_weights(stage, RandomWeights(architecture, config.seed))
    num_rows, forest = len(rows.tokens), Forest.of(rollout.tokens, merges=False)
    sequence, positions = packed_sequence(rows.tokens, forest, plan, None)
    layout = StridedLayout.of(
        plan, stage.attention, num_rows=num_rows, document_length=plan.sequence_length, forest=forest
    )
    hidden, states = stage.embed(sequence), []
    for layer in stage.layers:
        hidden, _ = layer(hidden, layout, rotary_pos_emb=stage.angles(positions))
        states.append(hidden[:, 0])
    states[-1] = stage.final_norm(states[-1])
    layers = torch.stack([states[depth - 1] for depth in tapped_layers(depths, len(stage.layers))], dim=1)
    documents, own = layers.tensor_split([num_rows * plan.sequence_length])  # [S, L, H]
    own = own.unflatten(0, (plan.generate_length, num_rows, plan.num_blocks, plan.num_samples))
    windows = torch.tensor([[anchor + t for t in range(plan.generate_length)] for anchor in plan.anchors])
    targets = documents.unflatten(0, (num_rows, -1))[:, windows]  # [B, K, G, L, H]
    return torch.cat((own.permute(1, 2, 3, 0, 4, 5), targets[:, :, None]), dim=2)


@torch.no_grad()
def test_slices_and_stages_give_the_products_of_explicit_vectors(groups, tmp_path):
    (first_found, first_messages), (second_found, second_messages) = run_ranks(2, grams_of_each_layout, str(tmp_path))
    by_rank = (first_found, second_found)
    assert first_messages == second_messages and list(first_messages) == list(LAYOUTS)
    for messages in first_messages.values():
        assert len(messages) == 4 * len(FAULTS)
        for name, message in messages.items():
            words = FAULTS[name.split()[0]][1]
            assert message.startswith(f"c.yaml:7: {__file__}:") and "\n" not in message and "\x1b" not in message
            assert f": ebft.embed_method: {words}" in message, message
    config, rows, rollout = inputs(str(tmp_path), groups)
    hidden = {depths: hidden_states(config, rows, rollout, depths, groups) for depths in DEPTHS}
    for number, (method, norm, depths, weights) in enumerate(CASES):
        expected = explicit_gram(hidden[depths], method, norm, weights)
        for layout in LAYOUTS:
            first, second = (found[layout][number] for found in by_rank)
            assert torch.equal(first, second)
            scale = expected.diagonal(dim1=-2, dim2=-1).max()
            difference = (first - expected).abs().max() / scale
            assert difference <= 2e-5, (layout, method, norm, weights, difference)
            assert torch.equal(first[:, 0, 0], first[:, 0, 1])  # equal rollouts
    products = [found.flatten() for found in by_rank[0]["tp2"][: len(CASES) // 2]]
    apart = [(a - b).abs().max() for i, a in enumerate(products) for b in products[:i]]
    assert min(apart) > 1e-3  # no two of the settings give the same

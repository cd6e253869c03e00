"""What a token critic has learned, written at one layout and read at another: the same numbers, bit for bit."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.checkpoint.snapshot import critic_shards, write_state_shards
from ebft_mega.checkpoint.tensor_index import TensorIndex, coverage_problems, merge_indices
from ebft_mega.checkpoint.tensors import CheckpointTensors, SavedState, check_state, restore_critic
from ebft_mega.critic.critic_record import CRITIC_STATE, CriticRecord, critic_record
from ebft_mega.critic.critic_terms import Objective
from ebft_mega.critic.fitted_critic import CriticState, FittedCritic
from ebft_mega.critic.own_channels import OwnChannels
from ebft_mega.critic.ridge import Statistics
from ebft_mega.errors import BrokenCheckpointError, InputError
from ebft_mega.extension.critic_settings import CriticSettings
from tests.unit.checkpoint.folder_stand_ins import MODEL, run_config

# Five layers read, one depth twice; three vectors each.
RECORD = CriticRecord(
    feature_map="concat",
    feature_norm="joint",
    layers=(1, 2, 2, 3, 5),
    layer_weights=None,
    vectors=3,
    hidden_size=8,
    generate_length=3,
    rank=2,
    vocabulary=11,
    batches=7,
)
SETTINGS = CriticSettings(rank=RECORD.rank)
PLAN = SimpleNamespace(generate_length=RECORD.generate_length)


@dataclass(frozen=True)
class Layout:
    """Ranks, and which of the tapped layers each stage has; one may have none."""

    data: int
    tensor: int
    stages: tuple[tuple[int, ...], ...]

    def ranks(self) -> list[tuple[SimpleNamespace, OwnChannels]]:
        width = RECORD.hidden_size // self.tensor
        found = []
        for layers in self.stages:
            for data in range(self.data):
                for tensor in range(self.tensor):
                    own = slice(tensor * width, (tensor + 1) * width)
                    groups = SimpleNamespace(
                        is_world_first=not found,
                        data_parallel_rank=data,
                        data_parallel_size=self.data,
                        device=torch.device("cpu"),
                    )
                    found.append((groups, OwnChannels(layers, RECORD.vectors, own, RECORD.hidden_size)))
        return found


ALONE = Layout(1, 1, ((0, 1, 2, 3, 4),))
LAYOUTS = {
    "one rank": ALONE,
    "tensor": Layout(1, 4, ALONE.stages),
    "pipeline": Layout(1, 1, ((0,), (1, 2, 3), (4,), ())),
    "data": Layout(3, 1, ALONE.stages),
    "all": Layout(2, 2, ((0, 1, 2), (3, 4), ())),
}


def whole_state(seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """A table, and sums of x x^T and x F^T over made-up rollouts: [G, 4 r + 1, layers, vectors, H]."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(RECORD.vocabulary, RECORD.rank, generator=generator)
    rows = torch.randn(RECORD.generate_length, 40, 4 * RECORD.rank + 1, generator=generator, dtype=torch.float64)
    size = len(RECORD.layers), RECORD.vectors, RECORD.hidden_size
    features = torch.randn(RECORD.generate_length, 40, *size, generator=generator, dtype=torch.float64)
    squares = rows.transpose(1, 2) @ rows
    return table, squares, torch.einsum("gnx,gnlvh->gxlvh", rows, features)


def critic_of(groups: SimpleNamespace, channels: OwnChannels, state: tuple[Tensor, ...] | None = None) -> FittedCritic:
    """A rank's critic: with its channels of a whole state, or with a table and nothing learned."""
    table, squares, products = whole_state() if state is None else state
    critic = FittedCritic(table, channels.count, SETTINGS, Objective(1.0, 1.0, 0.0), PLAN, groups)
    if state is not None:
        own = products[:, :, list(channels.layers), :, channels.hidden].flatten(2).contiguous()
        critic.restore(CriticState(table, Statistics(squares, own), RECORD.batches, None))
    return critic


def write(folder: Path, layout: Layout) -> CheckpointTensors:
    """A checkpoint of the whole state, as the ranks of a layout write it."""
    written = []
    for rank, (groups, channels) in enumerate(layout.ranks()):
        shards = critic_shards(critic_of(groups, channels, whole_state()).state, channels, groups)
        written.append(write_state_shards(folder, rank, shards))
    index = merge_indices(part.index for part in written)
    assert coverage_problems(index) == []
    (folder / "tensors.json").write_text(index.to_json())
    return CheckpointTensors(folder, TensorIndex.from_json(index.to_json()))


@pytest.mark.parametrize("name", LAYOUTS)
def test_whatever_layout_has_written_it_all_layouts_read_it(groups, tmp_path, name):
    tensors = write(tmp_path, LAYOUTS[name])
    shapes = {key: tensor.shape for key, tensor in tensors.index.kinds[CRITIC_STATE].items()}
    assert shapes == RECORD.shapes
    on_disk = sum(path.stat().st_size for path in (tmp_path / CRITIC_STATE).iterdir())
    assert RECORD.num_bytes < on_disk < RECORD.num_bytes + 2000 * len(LAYOUTS[name].ranks())  # and headers
    saved = SavedState(tensors, 3, RECORD)
    table, squares, products = whole_state()
    assert saved.token_table().dtype == torch.float32 and torch.equal(saved.token_table(), table)
    for layout in LAYOUTS.values():
        for of_rank, channels in layout.ranks():
            critic, expected = critic_of(of_rank, channels), critic_of(of_rank, channels, (table, squares, products))
            restore_critic(critic, channels, saved)
            found, whole = critic.state, expected.state
            assert found.batches == 7
            assert torch.equal(found.statistics.squares, whole.statistics.squares)
            assert torch.equal(found.statistics.products, whole.statistics.products)
            assert torch.equal(found.weights.prefix, whole.weights.prefix)
            assert torch.equal(found.weights.token, whole.weights.token)
            assert found.weights.token.any() == bool(channels.layers)


def test_data_parallel_ranks_share_the_layers():
    state = critic_of(*ALONE.ranks()[0], whole_state()).state
    names = [[shard.name for shard in critic_shards(state, own, groups)] for groups, own in LAYOUTS["data"].ranks()]
    assert names == [["table", "squares", "products.0", "products.3"], ["products.1", "products.4"], ["products.2"]]


def test_a_critic_that_has_learned_nothing_is_written_and_read(groups, tmp_path):
    of_rank, channels = ALONE.ranks()[0]
    nothing = critic_of(of_rank, channels)
    written = write_state_shards(tmp_path, 0, critic_shards(nothing.state, channels, of_rank))
    record = RECORD.model_copy(update={"batches": 0})
    critic = critic_of(of_rank, channels)
    restore_critic(critic, channels, SavedState(CheckpointTensors(tmp_path, written.index), 0, record))
    assert critic.state.batches == 0 and critic.state.weights is None
    assert not critic.state.statistics.squares.any() and not critic.state.statistics.products.any()


def spoiled(folder: Path, name: str, change) -> SavedState:
    """A checkpoint in which something else was written for one tensor."""
    of_rank, channels = ALONE.ranks()[0]
    shards = critic_shards(critic_of(of_rank, channels, whole_state()).state, channels, of_rank)
    for shard in shards:
        if shard.name == name:
            change(shard.tensor)
    return SavedState(CheckpointTensors(folder, write_state_shards(folder, 0, shards).index), 0, RECORD)


def test_numbers_that_are_not_finite_are_named_with_their_file(groups, tmp_path):
    saved = spoiled(tmp_path, "products.1", lambda tensor: tensor[0, 1].fill_(torch.nan))
    with pytest.raises(InputError, match=r"critic: products.1: found values that are infinite") as caught:
        restore_critic(critic_of(*ALONE.ranks()[0]), ALONE.ranks()[0][1], saved)
    assert [Path(each.where).name for each in caught.value.problems] == ["rank-00000.safetensors"]


def test_squares_of_no_rollouts_are_a_broken_checkpoint(groups, tmp_path):
    saved = spoiled(tmp_path, "squares", lambda tensor: tensor.neg_())
    with pytest.raises(BrokenCheckpointError, match="critic: squares: found .*expected sums of squares"):
        restore_critic(critic_of(*ALONE.ranks()[0]), ALONE.ranks()[0][1], saved)


def test_the_state_that_a_checkpoint_speaks_of_has_to_be_there(tmp_path, monkeypatch):
    """By name and shape, before anything is read; where the critic is left out it may be missing."""
    monkeypatch.setattr("ebft_mega.checkpoint.tensors.hf_shapes", lambda architecture: {})
    tensors, config = write(tmp_path, ALONE), run_config(tmp_path / "run")
    kinds = tensors.index.kinds | {"weights": {}, "exp_avg": {}, "exp_avg_sq": {}}

    def check(critic: CriticRecord | None, changes: dict) -> None:
        index = TensorIndex(version=1, kinds=kinds | {CRITIC_STATE: changes})
        check_state(CheckpointTensors(tmp_path, index), config, Architecture.from_hf(MODEL, "here"), critic)

    there = kinds[CRITIC_STATE]
    check(RECORD, there)
    check(None, {})
    lacking = {name: tensor for name, tensor in there.items() if name != "products.4"}
    with pytest.raises(BrokenCheckpointError, match="critic: products.4: found no such tensor") as caught:
        check(RECORD.model_copy(update={"rank": 3}), lacking)
    named = {problem.key for problem in caught.value.problems}
    assert named == {f"critic: {name}" for name in RECORD.shapes}


def test_a_critic_is_described_by_the_configuration(tmp_path):
    changes = {
        "ebft__advantage_estimator": "token_critic",
        "ebft__embed_method": "concat",
        "ebft__use_whitening": False,
    }
    config = run_config(tmp_path, **changes, ebft__alignment="inner_product", ebft__feature_layers=[0.5, 0.25, 0.2])
    policy, frozen = (Architecture.from_hf(MODEL | {"hidden_size": size}, "here") for size in (16, 32))
    record = critic_record(config, policy, frozen, batches=2)
    assert (record.rank, record.hidden_size, record.vocabulary, record.batches) == (16, 32, 100, 2)
    assert (record.layers, record.vectors) == ((1, 1, 2), config.ebft.generate_max_len)
    assert critic_record(run_config(tmp_path), policy, frozen) is None
    alone = {"ebft__rl_coef": 0.0, "ebft__ce_coef": 1.0}
    assert critic_record(run_config(tmp_path, **changes, **alone), policy, frozen) is None

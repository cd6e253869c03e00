"""What one step of this trainer costs for one row, as its code does it; and the arithmetic limit of the algorithm.

A row counts as one document: with document masking attention needs fewer pairs than this, depending on the
data, and everything else is the same.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from ebft_mega.architecture.hf_config import Architecture, tapped_layers
from ebft_mega.block_plan import BlockPlan
from ebft_mega.config.schema import Reuse, RunConfig
from ebft_mega.cost.work import Flops, LayerWork, PhaseCost, StepCost, causal_pairs, forward_flops, rollout_pairs


@dataclass(frozen=True)
class StepShape:
    """All that the counts of a step depend on."""

    architecture: Architecture
    feature_architecture: Architecture
    plan: BlockPlan
    uses_rollouts: bool = True  # rl_coef > 0
    uses_targets: bool = False  # ce_coef > 0
    pools_mean: bool = False  # features of all G tokens of a window, not of its last
    feature_layers: tuple[float, ...] = (0.25, 0.5, 0.75)

    @classmethod
    def of(cls, config: RunConfig, architecture: Architecture, feature_architecture: Architecture) -> "StepShape":
        """The steps of a run."""
        return cls(
            architecture,
            feature_architecture,
            config.block_plan,
            uses_rollouts=config.uses_rollouts,
            uses_targets=config.ebft.ce_coef > 0,
            pools_mean=config.ebft.embed_method == "mean_pooling",
            feature_layers=config.ebft.feature_layers,
        )

    @property
    def fed_tokens(self) -> int:
        """Tokens of each rollout that the policy reads: the last one predicts nothing."""
        return self.plan.generate_length - 1 if self.uses_rollouts else 0

    def policy_layer(self, with_targets: bool) -> LayerWork:
        """One layer of the policy over a row and its rollouts.

        The row's positions end at the last anchor; with targets all of them predict one but the last.
        """
        document = self.plan.document_length(with_targets)
        rows = document + self.plan.rollouts_per_row * self.fed_tokens
        return LayerWork.whole(rows, causal_pairs(document) + rollout_pairs(self.plan, self.fed_tokens))

    @property
    def rollout_head_rows(self) -> int:
        """Rows that rollout tokens are drawn from: one per anchor for all samples, then one per fed token."""
        if not self.uses_rollouts:
            return 0
        return self.plan.num_blocks + self.plan.rollouts_per_row * self.fed_tokens

    @property
    def target_head_rows(self) -> int:
        """Rows that predict the row's own tokens."""
        return self.plan.document_length(with_targets=True) if self.uses_targets else 0

    @property
    def feature_rows(self) -> int:
        """Positions that go through the feature network: the row and all rollouts whole."""
        return self.plan.sequence_length + self.plan.generated_per_row

    @property
    def feature_depth(self) -> int:
        """Layers up to the deepest tap."""
        return tapped_layers(self.feature_layers, self.feature_architecture.num_hidden_layers)[-1]

    @property
    def pooled(self) -> LayerWork:
        """The last layer of the feature network: keys of all positions, the rest for pooled rows alone.

        Pooled are one position of each rollout and target, or all G; targets may overlap, and each row counts once.
        """
        plan = self.plan
        tokens = plan.generate_length if self.pools_mean else 1
        first = plan.generate_length - tokens
        targets = {anchor + t for anchor in plan.anchors for t in range(first, plan.generate_length)}
        rows = len(targets) + plan.rollouts_per_row * tokens
        rollouts = rollout_pairs(plan, plan.generate_length) - rollout_pairs(plan, first)
        return LayerWork(self.feature_rows, rows, rows, sum(targets) + len(targets) + rollouts)


def cost_of_step(shape: StepShape, reuse: Reuse, checkpoints_layers: bool = False) -> StepCost:
    """What one row costs in the step that the code runs.

    The generated tokens' forward is the policy's: a separate one runs only without reuse, and for targets the head
    alone runs in learning. The backward pass computes the chunks of logits once more (so that no more than a chunk
    exists), each layer once more unless its activations were kept, and, inside the attention kernels, the scores.

    Args:
        reuse: what learning takes over from the rollout phase; ignored without rollouts.
        checkpoints_layers: `train.activation_checkpointing` of a separate forward.
    """
    reuses = shape.uses_rollouts and reuse != "off"
    recomputes_layers = reuse == "checkpoints" if reuses else checkpoints_layers
    num_layers, head_rows = shape.architecture.num_hidden_layers, shape.rollout_head_rows + shape.target_head_rows
    policy = [shape.policy_layer(shape.uses_targets)] * num_layers
    generate = features = PhaseCost()
    if shape.uses_rollouts:
        # The pass that is to be the gradient's goes on to the targets.
        sampling = policy if reuses else [shape.policy_layer(False)] * num_layers
        generate = _forward(shape.architecture, sampling, shape.rollout_head_rows)
        # The projection of queries, keys and values is one, so the deepest layer makes queries of all positions.
        deepest = dataclasses.replace(shape.pooled, queries=shape.feature_rows)
        features = _forward(shape.feature_architecture, [*_whole_feature_layers(shape), deepest], 0)
    if reuses:
        policy_forward = _forward(shape.architecture, [], shape.target_head_rows)
    else:
        policy_forward = _forward(shape.architecture, policy, head_rows)
    once = forward_flops(shape.architecture, policy, head_rows)
    again = Flops(head=once.head, attention=once.attention // 2)
    if recomputes_layers:
        again += Flops(linear=once.linear, attention=once.attention)
    backward = PhaseCost(policy[0].keys, num_layers, head_rows, policy[0].pairs, once.times(2), again)
    return StepCost(generate, features, policy_forward, backward)


def least_cost_of_step(shape: StepShape) -> StepCost:
    """The arithmetic limit: every row that somebody reads once, nothing twice.

    The generated tokens' activations and logits are kept. In a last layer, of whose other rows only keys and values are
    needed, only rows that are read ask, attend and go on. A row before an anchor is sampled from and predicts a target
    with the same logits. Rollouts that begin alike are not merged.
    """
    plan, num_layers = shape.plan, shape.architecture.num_hidden_layers
    full = shape.policy_layer(shape.uses_targets)
    if shape.uses_targets:
        head_rows = shape.target_head_rows + plan.rollouts_per_row * shape.fed_tokens
        last = full
    else:
        head_rows = shape.rollout_head_rows
        pairs = sum(plan.anchors) + rollout_pairs(plan, shape.fed_tokens)
        last = LayerWork(full.keys, head_rows, head_rows, pairs)
    policy = [full] * (num_layers - 1) + [last]
    generate = features = PhaseCost()
    if shape.uses_rollouts:
        generate = _forward(shape.architecture, policy, shape.rollout_head_rows)
        features = _forward(shape.feature_architecture, [*_whole_feature_layers(shape), shape.pooled], 0)
        policy_forward = _forward(shape.architecture, [], head_rows - shape.rollout_head_rows)
    else:
        policy_forward = _forward(shape.architecture, policy, head_rows)
    once = forward_flops(shape.architecture, policy, head_rows)
    backward = PhaseCost(full.keys, num_layers, head_rows, full.pairs, once.times(2))
    return StepCost(generate, features, policy_forward, backward)


def _forward(architecture: Architecture, layers: Sequence[LayerWork], head_rows: int) -> PhaseCost:
    flops = forward_flops(architecture, layers, head_rows)
    if not layers:
        return PhaseCost(head_rows=head_rows, flops=flops)
    return PhaseCost(layers[0].keys, len(layers), head_rows, layers[0].pairs, flops)


def _whole_feature_layers(shape: StepShape) -> list[LayerWork]:
    """The layers below the deepest tap."""
    pairs = causal_pairs(shape.plan.sequence_length) + rollout_pairs(shape.plan, shape.plan.generate_length)
    return [LayerWork.whole(shape.feature_rows, pairs)] * (shape.feature_depth - 1)

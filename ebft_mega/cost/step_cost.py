"""FLOPs of one step for one row: as this trainer computes it, and the least that the algorithm needs.

A row is counted as one document. With document masking, attention needs fewer pairs than this, depending on the data;
everything else is the same. Rollouts that begin alike are computed once as far as they do: how many nodes that leaves
(`rollout_nodes.py`) depends on the model and the data, so it is given, as counts or as shares. The counts are exact for
counted nodes.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from ebft_mega.architecture.hf_config import Architecture, tapped_layers
from ebft_mega.block_plan import BlockPlan
from ebft_mega.config.entries import feature_map, tapped_fractions
from ebft_mega.config.schema import Reuse, RunConfig
from ebft_mega.cost.critic_cost import CriticShape
from ebft_mega.cost.rollout_nodes import RolloutNodes
from ebft_mega.cost.work import Flops, LayerWork, PhaseCost, StepCost, causal_pairs, forward_flops


@dataclass(frozen=True)
class StepShape:
    """Everything that the counts of a step depend on."""

    architecture: Architecture
    feature_architecture: Architecture
    plan: BlockPlan
    uses_rollouts: bool = True  # rl_coef > 0
    uses_targets: bool = False  # ce_coef > 0 or entropy_coef > 0
    tokens_read: int = 1  # the last ones of each window, of which a feature is made
    feature_layers: tuple[float, ...] = (0.25, 0.5, 0.75)
    nodes: RolloutNodes | None = None  # of the row's rollouts; None: no two begin alike
    critic: CriticShape | None = None  # the token critic; None: the estimator reads none

    @classmethod
    def of(
        cls,
        config: RunConfig,
        architecture: Architecture,
        feature_architecture: Architecture,
        nodes: RolloutNodes | None = None,
    ) -> "StepShape":
        """Take the shape of a run's steps from its configuration."""
        return cls(
            architecture,
            feature_architecture,
            config.block_plan,
            uses_rollouts=config.uses_rollouts,
            uses_targets=config.uses_targets,
            tokens_read=len(feature_map(config).positions(config.ebft.generate_max_len)),
            feature_layers=tapped_fractions(config),
            nodes=nodes,
            critic=CriticShape.of(config, architecture, feature_architecture),
        )

    def with_nodes(self, nodes: RolloutNodes) -> "StepShape":
        """The shape of steps whose rows have these nodes."""
        return dataclasses.replace(self, nodes=nodes)

    @property
    def rollout_nodes(self) -> RolloutNodes:
        """Nodes of the row's rollouts."""
        return self.nodes or RolloutNodes.all_different(self.plan)

    @property
    def fed_levels(self) -> range:
        """Tokens of each rollout in the policy's pass: all but the last one, which predicts nothing."""
        return range(self.plan.generate_length - 1 if self.uses_rollouts else 0)

    @property
    def fed_rows(self) -> int:
        """Rows of rollouts in the policy's pass."""
        return self.rollout_nodes.rows(self.fed_levels)

    @property
    def all_levels(self) -> range:
        """Tokens of each rollout in the feature network's pass."""
        return range(self.plan.generate_length)

    def policy_layer(self, with_targets: bool) -> LayerWork:
        """One layer of the policy over a row and its rollouts.

        The row's positions end at the last anchor; with targets all but the last one take part.
        """
        document = self.plan.document_length(with_targets)
        pairs = causal_pairs(document) + self.rollout_nodes.pairs(self.plan, self.fed_levels)
        return LayerWork.whole(document + self.fed_rows, pairs)

    @property
    def rollout_head_rows(self) -> int:
        """Rows that rollout tokens are drawn from: one per anchor for all samples, then one per prefix that is fed."""
        return self.plan.num_blocks + self.rollout_nodes.head_rows(self.fed_levels) if self.uses_rollouts else 0

    @property
    def target_head_rows(self) -> int:
        """Rows that predict the row's own tokens."""
        return self.plan.document_length(with_targets=True) if self.uses_targets else 0

    @property
    def feature_rows(self) -> int:
        """Positions in the feature network's pass: the whole row and all whole rollouts."""
        return self.plan.sequence_length + self.rollout_nodes.rows(self.all_levels)

    @property
    def feature_depth(self) -> int:
        """Layers up to the deepest tap."""
        return tapped_layers(self.feature_layers, self.feature_architecture.num_hidden_layers)[-1]

    @property
    def pooled(self) -> LayerWork:
        """Least work of the deepest tapped layer: keys and values of all positions, the rest for pooled rows only.

        Pooled are the positions of each rollout and target that the feature map reads. Where targets overlap, a
        position is counted once.
        """
        plan = self.plan
        first = plan.generate_length - self.tokens_read
        targets = {anchor + t for anchor in plan.anchors for t in range(first, plan.generate_length)}
        nodes, read = self.rollout_nodes, range(first, plan.generate_length)
        rows = len(targets) + nodes.rows(read)
        return LayerWork(self.feature_rows, rows, rows, sum(targets) + len(targets) + nodes.pairs(plan, read))


def cost_of_step(shape: StepShape, reuse: Reuse, checkpoints_layers: bool = False) -> StepCost:
    """Count the work of one row in the step as this trainer runs it.

    With reuse, the forward that generates the tokens is also the one that is differentiated; learning then only runs
    the head on the targets. The backward pass recomputes the logits (so that only one chunk of them exists at a time),
    each layer unless its activations were saved, and, inside the attention kernels, the scores.

    Args:
        reuse: `learn.reuse_rollout`, what learning takes over from the rollout phase; ignored without rollouts.
        checkpoints_layers: `train.activation_checkpointing` of a separate forward.
    """
    reuses = shape.uses_rollouts and reuse != "off"
    recomputes_layers = reuse == "checkpoints" if reuses else checkpoints_layers
    num_layers, head_rows = shape.architecture.num_hidden_layers, shape.rollout_head_rows + shape.target_head_rows
    policy = [shape.policy_layer(shape.uses_targets)] * num_layers
    generate = features = PhaseCost()
    if shape.uses_rollouts:
        # A pass that is differentiated later also covers the targets.
        sampling = policy if reuses else [shape.policy_layer(False)] * num_layers
        generate = _forward(shape.architecture, sampling, shape.rollout_head_rows)
        # Queries, keys and values come from one fused projection, so the deepest layer makes queries of all positions.
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
    return with_critic(StepCost(generate, features, policy_forward, backward), shape, scores_again=not reuses)


def with_critic(cost: StepCost, shape: StepShape, scores_again: bool = False) -> StepCost:
    """Add what the token critic does in each phase, once it is used; every row and block is taken to count.

    Sampling takes the mean vectors of the rows that tokens are drawn from, the features' phase statistics and terms,
    the backward pass the values of all tokens for the same rows, the update solves.

    Args:
        scores_again: learning has a forward pass of its own, which takes the mean vectors again.
    """
    critic, plan, nodes = shape.critic, shape.plan, shape.rollout_nodes
    if critic is None:
        return cost
    of_rows = critic.vocabulary_flops(shape.architecture.vocab_size, shape.rollout_head_rows)
    return StepCost(
        _adding(cost.generate, of_rows),
        _adding(cost.features, critic.statistics_flops(plan, nodes) + critic.terms_flops(plan, nodes)),
        _adding(cost.policy_forward, of_rows if scores_again else 0),
        _adding(cost.policy_backward, of_rows + critic.rows_of_directions_flops(plan)),
        _adding(cost.update, critic.solving_flops(plan)),
    )


def _adding(phase: PhaseCost, critic: int) -> PhaseCost:
    return dataclasses.replace(phase, flops=phase.flops + Flops(critic=critic))


def least_cost_of_step(shape: StepShape) -> StepCost:
    """Count the least work that the algorithm needs: what is read is computed once, everything else not at all.

    The generated tokens' activations and logits are saved. In a last layer, queries, attention and MLP are computed
    only for the rows that are read; the other rows need keys and values only. The same logits of a document's row are
    sampled from, for all anchors whose rollouts hold it, and predict a target. With `nodes` this is the bound with
    merging, without them no two rollouts are taken to begin alike.
    """
    plan, num_layers = shape.plan, shape.architecture.num_hidden_layers
    full = shape.policy_layer(shape.uses_targets)
    read, pairs = shape.rollout_nodes.document_rows(plan, shape.fed_levels)
    drawn = read + shape.fed_rows  # rows that rollout tokens are drawn from
    if shape.uses_targets:
        head_rows = shape.target_head_rows + shape.fed_rows
        last = full
    else:
        head_rows = drawn
        last = LayerWork(full.keys, head_rows, head_rows, pairs + shape.rollout_nodes.pairs(plan, shape.fed_levels))
    policy = [full] * (num_layers - 1) + [last]
    generate = features = PhaseCost()
    if shape.uses_rollouts:
        generate = _forward(shape.architecture, policy, drawn)
        features = _forward(shape.feature_architecture, [*_whole_feature_layers(shape), shape.pooled], 0)
        policy_forward = _forward(shape.architecture, [], head_rows - drawn)
    else:
        policy_forward = _forward(shape.architecture, policy, head_rows)
    once = forward_flops(shape.architecture, policy, head_rows)
    backward = PhaseCost(full.keys, num_layers, head_rows, full.pairs, once.times(2))
    return with_critic(StepCost(generate, features, policy_forward, backward), shape)


def _forward(architecture: Architecture, layers: Sequence[LayerWork], head_rows: int) -> PhaseCost:
    flops = forward_flops(architecture, layers, head_rows)
    if not layers:
        return PhaseCost(head_rows=head_rows, flops=flops)
    return PhaseCost(layers[0].keys, len(layers), head_rows, layers[0].pairs, flops)


def _whole_feature_layers(shape: StepShape) -> list[LayerWork]:
    """The layers below the deepest tap."""
    pairs = causal_pairs(shape.plan.sequence_length) + shape.rollout_nodes.pairs(shape.plan, shape.all_levels)
    return [LayerWork.whole(shape.feature_rows, pairs)] * (shape.feature_depth - 1)

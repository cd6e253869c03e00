"""FLOPs of one step of the naive baseline for one row: nothing packed, cached or shared between samples."""

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.cost.step_cost import StepShape
from ebft_mega.cost.work import Flops, LayerWork, PhaseCost, StepCost, forward_flops


def cost_of_naive_step(shape: StepShape, checkpoints_layers: bool = False, keeps_weights: bool = True) -> StepCost:
    """Count the FLOPs of one row when nothing is shared and nothing is left out.

    The row is repeated for each of its n samples. Token t of all blocks is sampled after a forward over the row and
    the t tokens that every block has so far. Attention is dense (masked pairs are computed, too), and the head computes
    logits of every position. The feature network runs all layers and its head. The policy's gradient needs another
    forward.

    Args:
        shape: of a step with rollouts.
        checkpoints_layers: keep only layer inputs for the policy's backward pass and compute the layers again.
        keeps_weights: attention saves its weights for the backward pass; else a fused kernel recomputes the scores.
    """
    plan, samples = shape.plan, shape.plan.num_samples
    lengths = [plan.sequence_length + plan.num_blocks * t for t in range(plan.generate_length + 1)]
    generate = _passes(shape.architecture, samples, lengths[:-1])
    features = _passes(shape.feature_architecture, samples, lengths[-1:])
    forward = _passes(shape.architecture, samples, lengths[-1:])
    again = Flops()
    if checkpoints_layers:
        again += Flops(linear=forward.flops.linear, attention=forward.flops.attention)
    if not keeps_weights:
        again += Flops(attention=forward.flops.attention // 2)
    backward = PhaseCost(forward.rows, forward.layers, forward.head_rows, forward.pairs, forward.flops.times(2), again)
    return StepCost(generate, features, forward, backward)


def _passes(architecture: Architecture, samples: int, lengths: list[int]) -> PhaseCost:
    """Sum of one forward of each of these lengths for every sample."""
    rows = samples * sum(lengths)
    pairs = samples * sum(length * length for length in lengths)
    layers = [LayerWork.whole(rows, pairs)] * architecture.num_hidden_layers
    return PhaseCost(rows, len(layers), rows, pairs, forward_flops(architecture, layers, rows))

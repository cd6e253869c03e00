"""What one step of a trainer without packing or caches costs for one row; the existing ones work like this."""

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.cost.step_cost import StepShape
from ebft_mega.cost.work import Flops, LayerWork, PhaseCost, StepCost, forward_flops


def cost_of_naive_step(shape: StepShape, checkpoints_layers: bool = False, keeps_weights: bool = True) -> StepCost:
    """What one row costs when nothing is shared and nothing is left out.

    The row is repeated for each of its n samples. Token t of all blocks is drawn after a forward over the row and
    the t tokens that every block has so far; attention is dense (the mask only hides), the head sees every position.
    The feature network runs all layers and its head, the policy has a forward of its own.

    Args:
        shape: with rollouts.
        checkpoints_layers: keep only layer inputs for the policy's backward pass and compute the layers again.
        keeps_weights: attention keeps its weights for the backward pass; a fused kernel computes the scores again.
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
    """Forwards of each of these lengths for every sample."""
    rows = samples * sum(lengths)
    pairs = samples * sum(length * length for length in lengths)
    layers = [LayerWork.whole(rows, pairs)] * architecture.num_hidden_layers
    return PhaseCost(rows, len(layers), rows, pairs, forward_flops(architecture, layers, rows))

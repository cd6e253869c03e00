"""What the step trace says of the token critic: everything from which its advantages can be computed again."""

import torch
from torch import Tensor

from ebft_mega.critic.fitted_critic import FittedCritic
from ebft_mega.critic.ridge import CriticWeights
from ebft_mega.features.gram import summed
from ebft_mega.features.network import FeatureNetwork
from ebft_mega.types import CriticValues


def traced_values(
    values: CriticValues | None, shape: tuple[int, ...], rank: int, device: torch.device
) -> dict[str, Tensor]:
    """A micro-batch's expected values and directions; zeros while the critic is not used yet.

    Args:
        shape: B, n, K, G; rank: r.
    Returns:
        `critic_value` float64 [B, n, K, G] and `critic_direction` float64 [B, n, K, G, r].
    Communication: none.
    """
    if values is not None:
        return {"critic_value": values.expected, "critic_direction": values.directions}
    none = torch.zeros((*shape, rank), dtype=torch.float64, device=device)
    return {"critic_value": none[..., 0], "critic_direction": none}


def traced_weights(critic: FittedCritic, weights: CriticWeights | None, features: FeatureNetwork) -> dict[str, Tensor]:
    """Token vectors and regression weights of all ranks of the replica.

    Args:
        weights: those that the step used; None: it was too early, and zeros are returned.
    Returns:
        `token_table` float64 [V, r], `prefix_weights` float64 [G, q, D] and `token_weights` float64 [G, r, D], D the
        tapped layers one after another, whole; of a map with several vectors each layer's vectors in their order.
    Communication: one all-reduce of all weights over the replica.
    """
    columns, size = own_columns(features)
    length, rank = critic.plan.generate_length, critic.rank
    both = torch.zeros((length, 4 * rank + 1, size), dtype=torch.float64, device=critic.groups.device)
    if weights is not None:
        both[..., columns] = torch.cat((weights.prefix, weights.token), dim=1)
    both = summed(both, critic.groups.model_parallel)
    prefix, token = both.split((3 * rank + 1, rank), dim=1)
    traced = {"token_table": critic.table.to(torch.float64), "prefix_weights": prefix, "token_weights": token}
    return {name: each.contiguous().cpu() for name, each in traced.items()}


def own_columns(features: FeatureNetwork) -> tuple[Tensor, int]:
    """Which channels of the whole feature this rank has, int64 [D'] in their order, and how many it has in all, D.

    Communication: none.
    """
    stage = features.stage
    hidden, groups = stage.architecture.hidden_size, stage.groups
    width, vectors = hidden // groups.tensor_parallel_size, features.recipe.map.vectors(features.recipe.generate_length)
    own = stage.shape.taps_within(features.taps)
    slices = torch.arange(width, device=groups.device) + groups.tensor_parallel_rank * width
    of_layer = (torch.arange(vectors, device=groups.device)[:, None] * hidden + slices).flatten()
    starts = [index * vectors * hidden for index, tap in enumerate(features.taps) if tap in own]
    columns = torch.cat([of_layer[:0], *(start + of_layer for start in starts)])
    return columns, len(features.taps) * vectors * hidden

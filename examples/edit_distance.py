"""A reward term: how few edits turn a rollout into the true continuation."""

# In a configuration:
#     plugins: [edit_distance.py]  # a copy beside the configuration
#     ebft: {reward_terms: {edit_distance: 0.5}}
#     options: {edit_distance: {substitution: 1.5}}  # not needed

from typing import TYPE_CHECKING

from ebft_mega.extension.options import Section, key
from ebft_mega.extension.reward_term import RewardInputs, RewardTerm

if TYPE_CHECKING:
    from torch import Tensor


class EditDistanceOptions(Section):
    """What edits cost."""

    substitution: float = key(1.0, "Cost of a token in the place of another; inserting or deleting one costs 1.", ge=0)


class EditDistance(RewardTerm):
    """Minus the edit distance of a rollout to the true continuation, as a share of G: 0 if they are equal."""

    name = "edit_distance"
    needs = frozenset({"tokens"})
    Options = EditDistanceOptions

    def values(self, inputs: RewardInputs) -> "Tensor":
        """Levenshtein's table, a row at a time, for all rollouts at once: float64 [B, n, K]."""
        import torch

        rollouts, target = torch.broadcast_tensors(inputs.rollout_tokens, inputs.target_tokens[:, None])
        length = rollouts.shape[-1]
        start = torch.zeros(rollouts.shape[:-1], dtype=torch.float64, device=rollouts.device)
        above = [start + column for column in range(length + 1)]
        for row in range(length):
            entries = [start + (row + 1)]
            for column in range(length):
                differs = (rollouts[..., row] != target[..., column]).to(torch.float64)
                replaced = above[column] + self.options.substitution * differs
                entries.append(torch.minimum(torch.minimum(above[column + 1], entries[column]) + 1, replaced))
            above = entries
        return -above[-1] / length

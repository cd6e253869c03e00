"""Advantages and directions of the token critic, from what each rank has of the features.

Per block, with y the feature of the true continuation, for rollout j and its token t (0 .. G - 1):

    F_jt    feature still to come (own_features.py)       P_jt = W_t^T u_jt, from the prefix alone
    phi~_j = phi_j - sum_t M_t^T zeta_jt                   F~_jt = F_jt - sum over t' >= t of M_t'^T zeta_jt'
    w_j  = 2 (alpha y - delta * mean over k != j of phi~_k)
    A_jt = w_j . (F_jt - P_jt - lambda * mean over k != j of (F~_kt - P_kt) - M_t^T zeta_jt)
    q_jt = M_t w_j

The gradient of the loss -(1/N) sum_jt (A_jt log pi(x_jt) + sum_v pi(v) z(v) . q_jt) has the mean of grad J / G with
J = delta |E phi|^2 - 2 alpha y . E phi, whatever W and M are, if they are functions of earlier batches: given the
prefix, grad log pi(x_jt) has mean zero and is independent of the other rollouts, w_j and the third term are functions
of those alone, P of the prefix, the features that are left out of F of earlier tokens, and what M takes off A the
second term gives back exactly (tests/unit/objective). All of it is linear in slices of the features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ebft_mega.critic.regressors import TokenRegressors
from ebft_mega.critic.ridge import CriticWeights
from ebft_mega.features.own_features import OwnFeatures, from_each_on


@dataclass(frozen=True)
class Objective:
    """The objective delta |E phi|^2 - 2 alpha y . E phi, and the baseline."""

    alignment: float  # alpha
    diversity: float  # delta
    leave_one_out_share: float  # lambda


def critic_terms(
    features: OwnFeatures, regressors: Sequence[TokenRegressors], weights: CriticWeights, objective: Objective
) -> Tensor:
    """This rank's share of A and q; the shares of all ranks of a replica add up to them.

    Args:
        features: of the micro-batch's blocks, n >= 2 rollouts each.
    Returns:
        float64 [B * K, n, G, 1 + r]: A, then q.
    Communication: none.
    """
    vectors = features.vectors.flatten(0, 1)  # [B * K, n + 1, D']
    rollouts, target = vectors[:, :-1], vectors[:, -1:]
    others = rollouts.shape[1] - 1
    drawn = torch.stack([item.level.spread(item.token) for item in regressors], dim=2)  # zeta, [B * K, n, G, r]
    of_tokens = weights.token.flatten(0, 1)  # [G * r, D']
    corrected = rollouts - drawn.flatten(2) @ of_tokens
    towards = corrected.sum(dim=1, keepdim=True) - corrected  # w, [B * K, n, D']
    towards.mul_(-2 * objective.diversity / others).add_(target, alpha=2 * objective.alignment)
    directions = (towards @ of_tokens.T).unflatten(-1, weights.token.shape[:2])  # q, [B * K, n, G, r]

    along = features.along_to_come(towards)  # w_j . F_kt, [B * K, j, k, G]
    for index, (item, of_prefix) in enumerate(zip(regressors, weights.prefix, strict=True)):
        along[..., index] -= towards @ item.spread_before(item.prefix @ of_prefix).transpose(-1, -2)
    own = along.diagonal(dim1=1, dim2=2).transpose(-1, -2)  # [B * K, n, G]
    of_drawn = (directions * drawn).sum(dim=-1)  # w_j . M_t^T zeta_jt
    of_others = (directions * drawn.sum(dim=1, keepdim=True)).sum(dim=-1) - of_drawn
    baseline = along.sum(dim=2) - own - from_each_on(of_others)  # w_j . (F~_kt - P_kt), k != j added up
    advantages = own - of_drawn - objective.leave_one_out_share / others * baseline
    return torch.cat((advantages[..., None], directions), dim=-1)

"""Build the token critic of a run: its vectors of tokens, and nothing learned yet."""

import torch
import torch.distributed as dist
from torch import Tensor

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.config.entries import advantage_estimator, uses_critic
from ebft_mega.config.schema import RunConfig
from ebft_mega.critic.critic_terms import Objective
from ebft_mega.critic.fitted_critic import FittedCritic
from ebft_mega.critic.own_channels import OwnChannels
from ebft_mega.critic.token_table import token_table
from ebft_mega.features.network import FeatureNetwork
from ebft_mega.metrics.announcer import SILENT, Announcer
from ebft_mega.model.weights.weight_sources import WeightSource
from ebft_mega.parallel.groups import ProcessGroups

EMBEDDINGS = "model.embed_tokens.weight"


def build_critic(
    config: RunConfig,
    architecture: Architecture,
    initial: WeightSource,
    features: FeatureNetwork | None,
    groups: ProcessGroups,
    announcer: Announcer = SILENT,
    saved_table: Tensor | None = None,
) -> FittedCritic | None:
    """Make the critic of a run that uses one; None for any other run.

    Args:
        architecture, initial: of the policy at the beginning of the run.
        features: whose channels it predicts; None: there are no rollouts.
        announcer: says what is built.
        saved_table: the vectors of tokens of a checkpoint; None: they are made of the initial policy.
    Communication: without saved vectors one broadcast of 4 bytes for each number of each token's vector over the world;
        its first rank reads the embeddings.
    """
    if features is None or not uses_critic(config):
        return None
    settings = advantage_estimator(config).critic_settings()
    is_mean = features.recipe.map.is_mean_of_tokens
    share = settings.leave_one_out_share
    if share is None:
        share = 0.5 if is_mean else 0.0
    table = saved_table
    if table is None:
        with announcer.phase("making the token critic's vectors of tokens"):
            table = _shared_table(architecture, initial, settings.rank, groups)
    objective = Objective(config.ebft.alignment_coef, config.ebft.diversity_coef, share)
    return FittedCritic(table, OwnChannels.of(features).count, settings, objective, config.block_plan, groups)


def _shared_table(architecture: Architecture, initial: WeightSource, rank: int, groups: ProcessGroups) -> Tensor:
    """Vectors of tokens, made by the world's first rank."""
    size = (architecture.vocab_size, min(rank, architecture.hidden_size))
    table = torch.empty(size, dtype=torch.float32, device=groups.device)
    if groups.is_world_first:
        box = (slice(0, architecture.vocab_size), slice(0, architecture.hidden_size))
        table.copy_(token_table(initial.part(EMBEDDINGS, box), rank))
    dist.broadcast(table, 0)
    return table

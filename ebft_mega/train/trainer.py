"""Everything that an optimizer step needs and that does not change from step to step."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

from ebft_mega.block_plan import BlockPlan
from ebft_mega.config.schema import Reuse, RunConfig
from ebft_mega.critic.critic_record import CriticRecord, critic_record
from ebft_mega.critic.fitted_critic import FittedCritic
from ebft_mega.critic.own_channels import OwnChannels
from ebft_mega.features.network import FeatureNetwork
from ebft_mega.metrics.timers import PhaseTimers
from ebft_mega.model.stage import PipelinedModel, Stage
from ebft_mega.objective.noise_probe import NoiseProbe
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.parallel.vocabulary import VocabularySlice
from ebft_mega.parallel.zero import ZeroEngine
from ebft_mega.reward.sampled_blocks import Decode
from ebft_mega.rollout.generate import SamplingSettings
from ebft_mega.train.experience import Rewarding


@dataclass(frozen=True)
class Trainer:
    """What a step is made with; only the engine, the critic and the probe hold what a step changes."""

    config: RunConfig
    plan: BlockPlan
    sampling: SamplingSettings
    groups: ProcessGroups
    engine: ZeroEngine[Stage]
    feature_network: FeatureNetwork | None  # None: rl_coef is 0
    timers: PhaseTimers
    reuse: Reuse = "off"  # what the gradient pass reuses of the rollout's forward pass
    decode: Decode | None = None  # token ids to text; None: no entry declares texts
    critic: FittedCritic | None = None  # None: the estimator reads none

    @cached_property
    def rewarding(self) -> Rewarding:
        """The terms of the reward and the estimator of advantages that the configuration names."""
        return Rewarding.of(self.config, self.decode)

    @cached_property
    def noise(self) -> NoiseProbe | None:
        """What measures the gradient's noise; None: `ebft.noise_interval` is not set."""
        return NoiseProbe.of(self.config, self.stage)

    @property
    def stage(self) -> Stage:
        """This rank's part of the policy: its modules and sizes; the parameters may be partitioned."""
        return self.engine.module

    @property
    def own_channels(self) -> OwnChannels:
        """The channels of features that this rank has, in a run with rollouts."""
        assert self.feature_network is not None, "there are rollouts"
        return OwnChannels.of(self.feature_network)

    @property
    def critic_record(self) -> CriticRecord | None:
        """What a checkpoint says of the critic beside its tensors; None: there is none."""
        if self.critic is None or self.feature_network is None:
            return None
        policy, frozen = self.stage.architecture, self.feature_network.stage.architecture
        return critic_record(self.config, policy, frozen, self.critic.state.batches)

    @property
    def vocabulary(self) -> VocabularySlice:
        """The tokens whose logits this rank computes."""
        return VocabularySlice.of(self.stage.architecture.vocab_size, self.groups)

    @contextmanager
    def policy(self, recording: bool = False) -> Iterator[PipelinedModel]:
        """The policy with whole parameters, for passes without gradient or, if `recording`, with it.

        Communication: over the data-parallel group one gather of all parameters, unless they are held.
        """
        with self.engine.whole_parameters(recording) as run:
            yield PipelinedModel.of(self.stage, run)

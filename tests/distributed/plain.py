"""The reference for layout tests: the same steps in one process with plain torch, a whole batch at once."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.partition import StageShape
from ebft_mega.config.entries import tapped_fractions
from ebft_mega.critic.critic_factory import build_critic
from ebft_mega.critic.fitted_critic import row_directions
from ebft_mega.features.factory import FeatureSettings, build_feature_network
from ebft_mega.features.gram import FeatureRecipe
from ebft_mega.model.head import LinearValues
from ebft_mega.model.stage import PipelinedModel, Stage
from ebft_mega.model.weights.stage_weights import hf_tensors, load_weights
from ebft_mega.model.weights.weight_layout import Box
from ebft_mega.model.weights.weight_sources import RandomWeights
from ebft_mega.objective.losses import count_tokens, loss_terms
from ebft_mega.rollout.generate import SamplingSettings, generate_rollouts
from ebft_mega.rollout.packed_order import counted_blocks
from ebft_mega.rollout.score import ScoreRequest, score
from ebft_mega.train.experience import Rewarding, make_experience
from ebft_mega.types import CriticValues
from tests.distributed.steps import LEARNING_RATE, NUM_STEPS, Case, config_of, rows_of_step

QUIET = 1e-4


@dataclass
class Truth:
    """What the steps should leave behind."""

    losses: list[float] = field(default_factory=list)
    loss_scales: list[float] = field(default_factory=list)  # mean |advantage * logprob|, of which the RL loss cancels
    grad_norms: list[float] = field(default_factory=list)
    projections: list[list[float]] = field(default_factory=list)  # of the gradient before clipping
    rollouts: list[Tensor] = field(default_factory=list)
    grams: list[Tensor] = field(default_factory=list)
    alignments: list[float] = field(default_factory=list)  # mean over the blocks that count
    parameters: dict[str, Tensor] = field(default_factory=dict)  # under their Hugging Face names
    # Elements whose gradient was once so small, beside others of its tensor, that rounding decides where Adam, which
    # divides by the gradient's size, moves them.
    quiet: dict[str, Tensor] = field(default_factory=dict)


def plain_steps(case: Case, groups, directory: str, followed: Sequence[Mapping[str, Tensor]] = ()) -> Truth:
    """A few steps with torch's AdamW and torch's clipping.

    Args:
        followed: a layout's parameters after every step. Quiet elements are taken from there: where rounding decides
            about an element, the following steps compare everything else from where the layout went.
    """
    config = config_of(case, directory)
    ebft, plan = config.ebft, config.block_plan
    architecture = Architecture.from_hf(config.model.config, "test")
    source = RandomWeights(architecture, config.seed)
    stage = Stage(architecture, StageShape.whole(architecture), groups, torch.float32)
    load_weights(stage, source)
    policy = PipelinedModel.of(stage)
    settings = FeatureSettings(tapped_fractions(config), FeatureRecipe.of(config), torch.float32)
    network = build_feature_network(architecture, source, settings, groups)
    matrices = [parameter for parameter in stage.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in stage.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.train.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=config.train.betas,
    )
    critic = build_critic(config, architecture, source, network, groups)
    # Every rollout by itself: layouts merge what begins alike, and must find the same.
    sampling = replace(SamplingSettings.of(config), merge_equal_prefixes=False)
    truth = Truth()
    for step in range(NUM_STEPS):
        rows = rows_of_step(step, groups, case)
        real, counted = rows.row_indices >= 0, counted_blocks(rows, plan)
        learned = real[:, None].repeat(1, plan.sequence_length - 1)
        if not config.data.train_on_first_token:
            learned &= rows.document_ids.diff(dim=1) == 0
        numbers = (int(counted.sum()), int(learned.sum()))
        counts = count_tokens(plan, int(real.sum()), ebft.rl_coef, ebft.ce_coef, *numbers, ebft.entropy_coef)
        rollout = advantages = values = None
        if ebft.rl_coef > 0:
            table = None if critic is None else critic.table
            (sampled,) = generate_rollouts(policy, [rows], plan, sampling, step, table=table)
            rollout = sampled.rollout
            gram, judgement = measured(network, critic, plan, rows, sampled, counted)
            experience = make_experience(gram, rollout, Rewarding.of(config), counted, rows.tokens, critic=judgement)
            advantages = experience.advantages
            if judgement is not None:
                values = LinearValues(table, row_directions(judgement, rollout.forest))
            counted = experience.rewards.terms["alignment"].values.transpose(1, 2)[counted]
            truth.alignments.append(counted.mean().item() if len(counted) else 0.0)
            truth.rollouts.append(rollout.tokens)
            truth.grams.append(gram)
        forest = rollout.forest if rollout else None
        request = ScoreRequest(
            rows.tokens, forest, config.uses_targets, ebft.temperature, rows.documents, values, ebft.entropy_coef > 0
        )
        logprobs = request.logprobs(score(stage, request, plan))
        terms = loss_terms(
            logprobs, advantages, counts, ebft.rl_coef, ebft.ce_coef, None, None, learned, ebft.entropy_coef
        )
        optimizer.zero_grad()
        terms.total.backward()
        truth.projections.append(projections_of(stage))
        limit = config.train.grad_clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(stage.parameters(), limit)
        for name, gradient in hf_tensors(((n, p.grad.clone()) for n, p in stage.named_parameters()), stage):
            quiet = quiet_elements(gradient)
            truth.quiet[name] = truth.quiet.get(name, torch.zeros_like(quiet)) | quiet
        optimizer.step()
        if followed:
            load_weights(stage, Followed(whole_parameters(stage), followed[step], truth.quiet))
        truth.losses.append(terms.total.item())
        scale = 1.0
        if advantages is not None and logprobs.rollout is not None:
            by_token = advantages[..., None] if advantages.dim() == 3 else advantages
            scale = (by_token * logprobs.rollout).abs().mean().item()
        truth.loss_scales.append(scale or 1.0)  # 0 where nothing counts
        truth.grad_norms.append(norm.item())
    truth.parameters = whole_parameters(stage)
    return truth


def measured(network, critic, plan, rows, sampled, counted) -> tuple[Tensor, CriticValues | None]:
    """Inner products of features, and what the critic makes of them as the steps before have fitted it."""
    if critic is None:
        return network.grams([rows], [sampled.rollout], plan)[0], None
    judged = critic.of_step([rows], [sampled], [counted])
    (gram,) = network.grams([rows], [sampled.rollout], plan, judged.take)
    critic.learn(judged)
    return gram, judged.values[0]


def projections_of(stage: Stage) -> list[float]:
    """Inner products of the gradient with the signs of a step trace, written out."""
    gradients = dict(hf_tensors(((name, each.grad.clone()) for name, each in stage.named_parameters()), stage))
    projections = []
    for direction in range(16):
        signs = {name: naive_signs(direction, name, gradient.shape) for name, gradient in gradients.items()}
        projections.append(sum((gradient.double() * signs[name]).sum().item() for name, gradient in gradients.items()))
    return projections


def naive_signs(direction: int, name: str, shape: torch.Size) -> Tensor:
    """Those of a whole Hugging Face tensor, float64."""
    key = int.from_bytes(hashlib.sha256(f"{direction}:{name}".encode()).digest()[:8], "little")
    words = np.random.Philox(key=key).random_raw(-(-shape.numel() // 64)).astype("<u8")
    bits = np.unpackbits(words.view("u1"), bitorder="little")[: shape.numel()]
    return torch.from_numpy(2.0 * bits - 1).view(shape)


def quiet_elements(gradient: Tensor) -> Tensor:
    """Where rounding decides what Adam does; rows without gradient (tokens not embedded) have none at any layout."""
    size = gradient.abs()
    return (size < QUIET * size.max()) & (size.sum(dim=-1, keepdim=True) > 0)


def whole_parameters(stage: Stage) -> dict[str, Tensor]:
    """Copies of a whole model's parameters, under their Hugging Face names."""
    named = ((name, parameter.detach().clone()) for name, parameter in stage.named_parameters())
    return dict(hf_tensors(named, stage))


@dataclass(frozen=True)
class Followed:
    """Weights of their own, except for elements that are taken from a layout."""

    own: Mapping[str, Tensor]
    layout: Mapping[str, Tensor]
    taken: Mapping[str, Tensor]  # bool

    def place(self, name: str) -> str:
        return "plain steps"

    def tensor(self, name: str) -> Tensor:
        difference = (self.layout[name] - self.own[name]).abs()[self.taken[name]]
        # Whatever the gradients were, one update of Adam is no longer than twice the learning rate.
        assert not difference.numel() or difference.max() <= 4 * LEARNING_RATE, (name, difference.max())
        return torch.where(self.taken[name], self.layout[name], self.own[name])

    def part(self, name: str, box: Box) -> Tensor:
        return self.tensor(name)[box]

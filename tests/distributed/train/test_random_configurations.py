"""Random configurations at random layouts take the same steps as plain torch."""

import random

import pytest
import torch

from tests.distributed.plain import plain_steps
from tests.distributed.ranks import run_ranks
from tests.distributed.steps import NUM_STEPS, Case, Layout, run_cases
from tests.distributed.train.test_layouts import assert_same_rollouts_and_rewards

LAYOUTS = (
    Layout(1, 1, 3),
    Layout(1, 1, 4),
    Layout(1, 4, 1),
    Layout(2, 1, 2),
    Layout(1, 2, 2, zero_stage=1),
    Layout(2, 2, 1, sequence_parallel=True),
)
NUM_CASES = 8
SEQUENCE_LENGTH = 24


def random_case(generator: random.Random, name: str, layout: Layout) -> Case:
    """Any geometry that fits the row, and any mix of settings."""
    choose = generator.choice
    generated, context = choose((1, 2, 3, 4)), choose((1, 3, 4))
    room = SEQUENCE_LENGTH - generated - context
    stride = choose([stride for stride in (1, 2, 3, 4) if room % stride == 0])
    overrides = {
        "ebft.generate_max_len": generated,
        "ebft.context_length": context,
        "ebft.stride": stride,
        "ebft.n_samples_per_prompt": choose((1, 2, 3, 5)),
        "ebft.embed_method": choose(("last_token", "mean_pooling")),
        "ebft.feature_norm": choose(("joint", "per_layer")),
        "ebft.feature_layers": choose(("[0.25,0.5,0.75]", "[1.0]", "[0.1,1.0]", "[0.5,0.55]")),
        "ebft.whitening": choose(("sample", "feature")),
        "ebft.use_whitening": choose(("true", "false")),
        "ebft.ce_coef": choose((0, 0.3)),
        "ebft.top_p": choose((1.0, 0.8)),
        "train.micro_batch_size": choose((1, 2)),
        "train.activation_checkpointing": choose(("none", "full")),
        "zero.hold_parameters": choose(("rollout", "step", "none")),
        "zero.feature_network": choose(("resident", "sharded")),
        "train.attention": choose(("two_part", "dense")),
        "zero.stage": layout.zero_stage,  # the plain steps' configuration must be a valid one, too
    }
    stay_whole = layout.zero_stage < 3 or overrides["zero.hold_parameters"] == "step"
    can_keep_activations = stay_whole and overrides["train.activation_checkpointing"] == "none"
    overrides["learn.reuse_rollout"] = choose(("off", "checkpoints", "activations")[: 2 + can_keep_activations])
    overrides["data.document_masking"] = choose(("true", "false"))
    overrides["data.train_on_first_token"] = choose(("true", "false"))
    overrides["ebft.alignment"] = choose(("cosine", "inner_product"))
    texts = tuple(f"{key}={value}" for key, value in overrides.items())
    return Case(name, texts, choose(("llama", "qwen2", "qwen3")), choose((True, False)), choose((5, 16, 512)))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_random_configurations_take_the_plain_steps(layout, groups, tmp_path):
    generator, largest, shares = random.Random(str(layout)), 0.0, []
    cases = tuple(random_case(generator, f"random {number}", layout) for number in range(NUM_CASES))
    by_rank = run_ranks(layout.world_size, run_cases, layout, cases, str(tmp_path), True)
    for case in cases:
        outcomes = [found[case.name] for found in by_rank]
        # One element with a gradient below rounding (measured: 3e-8 of its tensor's largest) can move a later step's
        # gradient norm by 2.6e-4 of it, since Adam turns that gradient's rounding into up to a whole learning rate.
        # So the plain steps go where the layout went with such elements: what is left deviates by 1e-6 at most.
        truth = plain_steps(case, groups, str(tmp_path), outcomes[0].by_step)
        assert_same_rollouts_and_rewards(outcomes, layout, truth)
        for outcome in outcomes:
            for step in range(NUM_STEPS):
                found = outcome.metrics[step]
                difference = abs(found["train/loss"] - truth.losses[step])
                assert difference <= 1e-5 * truth.loss_scales[step], (case, step)
                assert found["train/grad_norm"] == pytest.approx(truth.grad_norms[step], rel=1e-5), (case, step)
                largest = max(largest, abs(found["train/grad_norm"] / truth.grad_norms[step] - 1))
        # What the comparison leaves out. Without cross-entropy, tied embeddings of tokens that no rollout is likely to
        # have are quiet (5.8 % of all elements where that was most).
        quiet = torch.cat([elements.flatten() for elements in truth.quiet.values()])
        shares.append(quiet.float().mean().item())
        assert shares[-1] <= 0.1, case
        for name, parameter in truth.parameters.items():
            if name.endswith("k_proj.bias"):
                continue  # as in `test_layouts`
            farthest = (outcomes[0].parameters[name] - parameter).abs().max().item()
            assert farthest <= 1e-4, (case, name, farthest)
    # Shown by `pytest -rP`.
    print(f"{layout}: gradient norms deviate by {largest:.1e} at most, {max(shares):.1%} of the elements are quiet")

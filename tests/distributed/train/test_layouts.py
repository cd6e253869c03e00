"""Every parallel layout takes the same steps as one process with plain torch: same rollouts, rewards and update."""

from functools import cache

import pytest
import torch

from ebft_mega.forest import Forest
from tests.distributed.plain import Truth, plain_steps
from tests.distributed.ranks import run_ranks
from tests.distributed.steps import MASKING, NUM_STEPS, Case, Layout, Outcome, run_cases

LLAMA = Case("llama tied")
QWEN2 = Case("qwen2 untied", model_type="qwen2", tied=False)
QWEN3 = Case("qwen3", model_type="qwen3", tied=False)
ACTIVATIONS = Case(
    "saved activations, with cross-entropy and entropy",
    ("learn.reuse_rollout=activations", "zero.hold_parameters=step", "ebft.entropy_coef=0.2"),
)
# Used from the second step on, as the step before has fitted it.
FITTED = ("ebft.advantage_estimator=token_critic", "ebft.use_whitening=false", "options.token_critic.warmup_batches=1")
CRITIC = Case(
    "token critic", (*FITTED, "ebft.alignment=inner_product", "ebft.embed_method=mean_pooling", "ebft.temperature=0.6")
)
MASKED = (
    Case("masked documents, entropy", (MASKING, "train.micro_batch_size=2", "ebft.entropy_coef=0.2"), "qwen3"),
    Case(
        "masked documents, separate forward pass",
        (MASKING, "learn.reuse_rollout=off", "train.attention=dense"),
        "qwen2",
    ),
    Case(
        "masked documents, saved activations",
        (
            MASKING,
            "learn.reuse_rollout=activations",
            "zero.hold_parameters=step",
            "ebft.embed_method=mean_pooling",
            "train.micro_batch_size=2",
        ),
    ),
    # All rows of one of two replicas.
    Case("filler", ("data.on_error=skip",), filler=(2, 3)),
    Case("masked documents, with filler", (MASKING, "data.on_error=skip"), filler=(0,)),
    Case(
        "token critic, masked documents, with filler",
        (
            *FITTED,
            *(MASKING, "data.on_error=skip", "learn.reuse_rollout=off", "options.token_critic.rank=7"),
            "ebft.temperature=0.8",
        ),
        filler=(3,),
    ),
    Case("filler only", ("data.on_error=skip", "train.weight_decay=0.1"), filler=(0, 1, 2, 3)),
)
VARIANTS = {
    "nucleus and joint mean pooling": Case(
        "nucleus and joint mean pooling", ("ebft.top_p=0.9", "ebft.embed_method=mean_pooling"), "qwen3"
    ),
    "mean pooling per layer": Case(
        "mean pooling per layer", ("ebft.embed_method=mean_pooling", "ebft.feature_norm=per_layer")
    ),
    "last token per layer": Case("last token per layer", ("ebft.feature_norm=per_layer",)),
    "a stage without taps": Case(
        "a stage without taps", ("ebft.feature_layers=[1.0]", "ebft.embed_method=mean_pooling")
    ),
    "checkpointing": Case("checkpointing", ("train.activation_checkpointing=full",), "qwen2"),
    "fewer micro-batches than stages": Case("fewer micro-batches than stages", ("train.micro_batch_size=4",)),
    "cross-entropy only": Case("cross-entropy only", ("ebft.rl_coef=0", "ebft.ce_coef=1")),
    # At a low temperature a few tokens' gradients are so large that the others of the embedding are quiet.
    "rollouts only": Case(
        "rollouts only", ("ebft.ce_coef=0", "ebft.temperature=0.8", "train.grad_clip=0", "train.weight_decay=0.1")
    ),
    "parameters held for a step": Case("parameters held for a step", ("zero.hold_parameters=step",)),
    "a separate forward pass": Case(
        "a separate forward pass, entropy without cross-entropy",
        ("learn.reuse_rollout=off", "ebft.ce_coef=0", "ebft.entropy_coef=0.5"),
    ),
    "saved activations": Case(
        "saved activations", ("learn.reuse_rollout=activations", "zero.hold_parameters=step", "ebft.ce_coef=0")
    ),
    "saved activations, with cross-entropy and entropy": ACTIVATIONS,
    "much merged": Case("much merged", ("ebft.temperature=0.25", "train.micro_batch_size=2")),
    "nothing merged": Case("nothing merged", ("ebft.merge_equal_prefixes=false",)),
    "parameters never held": Case("parameters never held", ("zero.hold_parameters=none",)),
    "token critic": CRITIC,
    "token critic, weights of layers": Case(
        "token critic, weights of layers",
        (*CRITIC.overrides, "ebft.layer_weights=[1, 0, 3]", "ebft.feature_norm=per_layer", "learn.reuse_rollout=off"),
        "qwen3",
        tied=False,
    ),
    "sharded feature network": Case("sharded feature network", ("zero.feature_network=sharded",)),
}
# What slices and what stages have most to do with; the others are slow.
OFTEN_TENSOR = (
    *("nucleus and joint mean pooling", "rollouts only", "saved activations, with cross-entropy and entropy"),
    *("much merged", "token critic"),
)
OFTEN_PIPELINE = (
    *("a stage without taps", "fewer micro-batches than stages", "a separate forward pass"),
    *("much merged", "nothing merged", "token critic"),
)
L = Layout
FAST = {
    L(1, 1, 1): (LLAMA,),
    L(2, 1, 1): (LLAMA, *MASKED),
    L(1, 2, 1): (LLAMA, QWEN3, *(VARIANTS[name] for name in OFTEN_TENSOR), MASKED[0]),
    L(1, 1, 2): (LLAMA, QWEN2, *(VARIANTS[name] for name in OFTEN_PIPELINE), MASKED[2]),
    L(1, 2, 2): (LLAMA,),
}
SLOW = {
    L(1, 2, 1): (QWEN2, *(case for name, case in VARIANTS.items() if name not in OFTEN_TENSOR), MASKED[2]),
    L(1, 1, 2): (QWEN3, *(case for name, case in VARIANTS.items() if name not in OFTEN_PIPELINE), MASKED[0]),
    L(2, 2, 1): (LLAMA,),
    L(2, 1, 2): (LLAMA, *VARIANTS.values()),
    L(2, 2, 2): (LLAMA, QWEN2, QWEN3, ACTIVATIONS, *MASKED),
    # Three feature layers: the last stage has none of them.
    L(1, 1, 4): (LLAMA, VARIANTS["fewer micro-batches than stages"], VARIANTS["sharded feature network"]),
    L(1, 4, 1): (LLAMA, QWEN2, QWEN3),
    **{L(2, 1, 1, zero_stage=stage): (LLAMA, QWEN2, ACTIVATIONS) for stage in (0, 1, 2)},
    **{L(1, 1, 2, zero_stage=stage): (LLAMA, QWEN2, ACTIVATIONS) for stage in (0, 1, 2)},
    L(1, 2, 1, sequence_parallel=True): (LLAMA, QWEN2, QWEN3, *VARIANTS.values(), *MASKED),
    L(2, 2, 2, sequence_parallel=True): (LLAMA, QWEN3),
}
MATRIX = [
    pytest.param(layout, case, cases, id=f"{layout}-{case.name}", marks=[pytest.mark.slow] if slow else [])
    for slow, layouts in ((False, FAST), (True, SLOW))
    for layout, cases in layouts.items()
    for case in cases
]


@cache
def steps_of(layout: Layout, cases: tuple[Case, ...], directory: str) -> list[dict[str, Outcome]]:
    """All cases of a layout, by rank: starting ranks costs more than the steps."""
    return run_ranks(layout.world_size, run_cases, layout, cases, directory)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="module")
def truth_of(groups, directory):
    """The plain steps of a case, taken once for all layouts."""
    return cache(lambda case: plain_steps(case, groups, directory))


@pytest.mark.parametrize(("layout", "case", "cases"), MATRIX)
def test_layout_takes_the_plain_steps(layout, case, cases, truth_of, directory):
    truth = truth_of(case)
    by_rank = [outcomes[case.name] for outcomes in steps_of(layout, cases, directory)]
    assert_same_rollouts_and_rewards(by_rank, layout, truth)
    largest = {"loss": 0.0, "norm": 0.0, "projections": 0.0, "parameters": 0.0}
    for outcome in by_rank:
        for step in range(NUM_STEPS):
            found = outcome.metrics[step]
            loss = abs(found["train/loss"] - truth.losses[step]) / truth.loss_scales[step]
            norm = abs(found["train/grad_norm"] - truth.grad_norms[step]) / (truth.grad_norms[step] or 1.0)
            projected = torch.tensor([outcome.projections[step], truth.projections[step]], dtype=torch.float64)
            projections = (projected[0] - projected[1]).abs().max().item() / (truth.grad_norms[step] or 1.0)
            assert projected.shape[1] == 16
            assert loss <= 1e-5 and norm <= 1e-4 and projections <= 5e-4, step
            found = {"loss": loss, "norm": norm, "projections": projections}
            largest |= {key: max(largest[key], value) for key, value in found.items()}
    for name, parameter in truth.parameters.items():
        if name.endswith("k_proj.bias"):
            continue  # softmax cancels it: its gradient is rounding noise, which Adam blows up
        quiet = truth.quiet[name]
        assert quiet.float().mean() <= 0.05, name
        difference = (by_rank[0].parameters[name] - parameter).abs().masked_fill(quiet, 0.0).max().item()
        assert difference <= 1e-4, (name, difference)
        largest["parameters"] = max(largest["parameters"], difference)
    # Shown by `pytest -rP`: docs/parallelism.md quotes the largest.
    print(f"deviation of {layout} {case.name}: " + " ".join(f"{key} {value:.1e}" for key, value in largest.items()))


def assert_same_rollouts_and_rewards(by_rank: list[Outcome], layout: Layout, truth: Truth) -> None:
    """Every rank of a replica knows the same; the replicas' rows together are the global batch."""
    replicas = [[by_rank[rank] for rank in ranks] for ranks in ranks_of_replicas(layout)]
    for step, tokens in enumerate(truth.rollouts):
        for members in replicas:
            assert all(torch.equal(member.rollouts[step], members[0].rollouts[step]) for member in members)
            assert all(torch.equal(member.grams[step], members[0].grams[step]) for member in members)
        assert torch.equal(torch.cat([members[0].rollouts[step] for members in replicas]), tokens), step
        gram = torch.cat([members[0].grams[step] for members in replicas])
        torch.testing.assert_close(gram, truth.grams[step], atol=2e-5, rtol=0)


def ranks_of_replicas(layout: Layout) -> list[list[int]]:
    """World ranks by replica: tensor fastest, then data, then pipeline."""
    return [
        [
            tensor + layout.tensor * (replica + layout.data * stage)
            for stage in range(layout.pipeline)
            for tensor in range(layout.tensor)
        ]
        for replica in range(layout.data)
    ]


COUNTING = [parameters for parameters in MATRIX if parameters.values[1] in MASKED]


@pytest.mark.parametrize(("layout", "case", "cases"), COUNTING)
def test_metrics_are_means_over_what_counts(layout, case, cases, truth_of, directory):
    """Blocks counted by hand: row 0 of `DOCUMENT_STARTS` keeps three of five, row 1 all, row 2 one, row 3 none."""
    counted_of_rows = (3, 5, 1, 0) if MASKING in case.overrides else (5, 5, 5, 5)
    for outcome in (outcomes[case.name] for outcomes in steps_of(layout, cases, directory)):
        for step, alignment in enumerate(truth_of(case).alignments):
            found = outcome.metrics[step]
            counting = [row for row in range(4) if row ^ (step % 2) not in case.filler]
            counted = sum(counted_of_rows[row] for row in counting)
            if counted:
                assert found["ebft/alignment"] == pytest.approx(alignment, abs=1e-3), step
            else:
                assert "ebft/alignment" not in found and found["ebft/rl_loss"] == 0
            if MASKING in case.overrides:
                assert found["data/dropped_anchor_share"] == pytest.approx(1 - counted / (5 * len(counting)))
            else:
                assert "data/dropped_anchor_share" not in found
            assert found.get("data/skipped_rows", 0.0) == len(case.filler)


def test_the_comparison_would_see_a_wrong_step(truth_of):
    """Clipping is active, parameters move far more than the tolerance, and rewards differ between rollouts."""
    truth = truth_of(LLAMA)
    assert truth.grad_norms[0] > 0.5
    assert not torch.equal(truth.rollouts[0], truth.rollouts[1])
    assert truth.loss_scales[0] > 0.1
    for case, share in ((LLAMA, 0.95), (VARIANTS["much merged"], 0.9)):
        rollouts = truth_of(case).rollouts
        nodes = [[Forest.of(row[None], merges=True).num_nodes for row in step] for step in rollouts]
        assert sum(map(sum, nodes)) < share * sum(step.numel() for step in rollouts)
        assert all(len(set(of_rows)) > 1 for of_rows in nodes)  # rows and replicas have different numbers of them

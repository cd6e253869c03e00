import gc
import logging
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils import _triton
from torch.utils._python_dispatch import TorchDispatchMode

from ebft_mega.attention import dense as dense_module
from ebft_mega.attention import two_part_plan
from ebft_mega.attention.dense import DenseAttention
from ebft_mega.attention.flex import FlexAttention
from ebft_mega.attention.pattern import AttentionPattern
from ebft_mega.attention.prefix_kernels import CpuKernel, CudaFlash, SplitKernel, WrittenOut
from ebft_mega.attention.routes import make_route
from ebft_mega.attention.two_part import TwoPartAttention
from tests.unit.attention.attention_passes import (
    assert_same,
    forest_of,
    held_by,
    naive_attend,
    patterns,
    random_tensors,
    values_and_gradients,
)

CPU = torch.device("cpu")


class CpuFlash:
    """Torch's CPU flash kernel in the place of the CUDA one, which has the same two parts."""

    def forward(self, query, key, value, causal):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal)

    def backward(self, grad, query, key, value, out, lse, causal):
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(grad, query, key, value, out, lse, 0.0, causal)


def two_part(kernel, edge):
    """The two-part route with a ragged edge of `edge` keys, so that small passes have several spans."""
    kernel.edge = edge
    return TwoPartAttention(kernel)


ROUTES = {
    "own kernel": TwoPartAttention(),
    "no edge": two_part(CpuKernel(), 0),
    "small edge": two_part(CpuKernel(), 5),
    "split": two_part(SplitKernel(CpuFlash()), 5),
    "split, one span": two_part(SplitKernel(CpuFlash()), 1000),
    "written out": two_part(SplitKernel(WrittenOut()), 5),
    "dense": DenseAttention(),
}
HEADS_AND_GROUPS = st.sampled_from([(4, 4), (4, 2), (4, 1), (6, 3)])
ONE_NODE = AttentionPattern(1, (3,), (), 3, forest_of(1, 1, 1, 1).levels, 1)  # one anchor, one sample, one level


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
@given(pattern=patterns(), heads_and_groups=HEADS_AND_GROUPS, seed=st.integers(0, 99))
@example(ONE_NODE, (4, 2), 0)
def test_values_and_gradients_are_those_of_the_masked_softmax(route, pattern, heads_and_groups, seed):
    heads, groups = heads_and_groups
    tensors = random_tensors(pattern, heads=heads, groups=groups, seed=seed)
    found = values_and_gradients(route.attend, pattern, tensors)
    assert_same(found, values_and_gradients(naive_attend, pattern, tensors), 1e-10)


ANCHORS = tuple(range(8, 153, 8))
SEPARATE = forest_of(2, 19, 4, 8, merges=False).levels
STARTS = ((0, 40, 41, 103, 155), (0, 9))
# Rows have different numbers of nodes; some rollouts are all in the document, some leave it.
MERGED = forest_of(2, 19, 4, 8, vocabularies=(1, 2, 2, 1000), held=held_by(ANCHORS, 8, 152, STARTS)).levels
LARGE = {
    "packed": AttentionPattern(2, ANCHORS, range(152), 152, SEPARATE[:7], 7),
    "decode": AttentionPattern(2, ANCHORS, (), 152, SEPARATE[:3], 1),
    "merged": AttentionPattern(2, ANCHORS, range(152), 152, MERGED[:7], 7),
    "merged decode": AttentionPattern(2, ANCHORS, (), 152, MERGED[:3], 1),
    "last features": AttentionPattern(2, ANCHORS, tuple(range(15, 160, 8)), 160, MERGED, 1),
    "masked documents": AttentionPattern(2, ANCHORS, range(152), 152, MERGED[:7], 7, STARTS),
}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("pattern", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_lower_precision_is_as_close_as_its_digits(route, pattern, dtype, tolerance):
    tensors = random_tensors(pattern, head_dim=32, dtype=dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    found = values_and_gradients(route.attend, pattern, tensors)
    assert all(tensor.dtype == dtype for tensor in found.values())
    assert_same(found, values_and_gradients(naive_attend, pattern, wide), tolerance)


def as_in_a_layer(tensor):
    """The same values as a view of [S, heads, d], as projections give them."""
    return tensor.transpose(-2, -3).contiguous().transpose(-2, -3)


@pytest.mark.parametrize("how", [as_in_a_layer, lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2)])
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_views_and_expanded_gradients_are_taken_as_they_are(route, how):
    pattern = AttentionPattern(2, (3, 6, 12), range(10), 12, forest_of(2, 3, 2, 4).levels, 2)
    tensors = random_tensors(pattern)
    results = []
    for given_tensors in (tensors, [how(tensor) for tensor in tensors]):
        outputs = route.attend(pattern, *given_tensors)
        results.append((*outputs, *torch.autograd.grad(sum(out.sum() for out in outputs), tensors)))
    for plain, viewed in zip(*results, strict=True):
        torch.testing.assert_close(plain, viewed, rtol=1e-12, atol=1e-12)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes, by its own storage."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else (results,):
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.untyped_storage().nbytes() // result.element_size())
        return results


@pytest.mark.parametrize("merges", [False, True], ids=["separate", "merged"])
@pytest.mark.parametrize("kernel", [CpuKernel(), SplitKernel(CpuFlash())], ids=["cpu", "split"])
def test_two_part_makes_no_scores_of_all_nodes_and_keeps_only_inputs_outputs_and_normalisers(kernel, merges):
    levels = forest_of(1, 127, 4, 7, merges=merges, vocabularies=(1, 2, 1000)).levels
    pattern = AttentionPattern(1, tuple(range(8, 1017, 8)), range(1016), 1016, levels, 7)
    heads, head_dim = 4, 8
    tensors = random_tensors(pattern, heads=heads, head_dim=head_dim, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        with LargestTensor() as largest:
            outputs = TwoPartAttention(kernel).attend(pattern, *tensors)
            torch.autograd.grad(sum(out.square().sum() for out in outputs), tensors)
    at_squares = sum(out.numel() for out in outputs)
    normalisers = heads * (len(pattern.document_queries) + pattern.own_queries)
    assert sum(kept) - at_squares == sum(t.numel() for t in tensors) + sum(o.numel() for o in outputs) + normalisers

    scores = heads * pattern.own_queries * pattern.document_keys
    mask_of_a_span = 17 * 4 * 7 * 1016 * (heads // 2)
    assert largest.elements <= mask_of_a_span < scores / 10


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_nothing_is_kept_without_gradients(route):
    kept = []
    pattern = LARGE["packed"]
    tensors = random_tensors(pattern)
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        outputs = route.attend(pattern, *tensors)
    assert kept == [] and all(out.grad_fn is None for out in outputs)


@pytest.mark.parametrize("merges", [False, True], ids=["separate", "merged"])
def test_a_pass_may_be_gradient_free_first_and_recorded_later(merges):
    """Plans are kept by pattern; one made in inference mode must serve training."""
    levels = forest_of(2, 3, 2, 3, merges=merges).levels
    pattern = AttentionPattern(2, (3, 7, 11), (2, 9), 11, levels, 2)
    tensors = random_tensors(pattern)
    with torch.inference_mode():
        TwoPartAttention().attend(pattern, *(tensor.detach() for tensor in tensors))
    found = values_and_gradients(TwoPartAttention().attend, pattern, tensors)
    assert_same(found, values_and_gradients(naive_attend, pattern, tensors), 1e-10)


@pytest.mark.parametrize("causal, keys, groups", [(True, 64, 4), (True, 64, 2), (False, 96, 2)])
def test_the_cuda_kernel_takes_these_arguments(causal, keys, groups):
    """By torch's shape functions, on tensors without data; the kernel itself needs a GPU."""
    query = torch.empty(2, 4, 64, 32, dtype=torch.bfloat16, device="meta")
    key = torch.empty(2, groups, keys, 32, dtype=torch.bfloat16, device="meta")
    out, lse = CudaFlash().forward(query, key, key, causal)
    assert out.shape == query.shape and lse.shape == (2, 4, 64) and lse.dtype == torch.float32
    grads = CudaFlash().backward(out, query, key, key, out, lse, causal)
    assert [grad.shape for grad in grads] == [query.shape, key.shape, key.shape]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the CUDA kernels need a GPU")
@pytest.mark.parametrize("name", ["two_part", "flex"])
@pytest.mark.parametrize("pattern", LARGE.values(), ids=LARGE)
def test_values_and_gradients_on_a_gpu(name, pattern):
    device = torch.device("cuda")
    drawn = random_tensors(pattern, head_dim=64, dtype=torch.bfloat16, requires_grad=False)
    tensors = [tensor.to(device).requires_grad_() for tensor in drawn]
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    route = make_route(name, device, own_capacity=8, head_dim=32)
    outputs, expected = route.attend(pattern, *tensors), naive_attend(pattern, *wide)
    for out, want in zip(
        (*outputs, *_gradients(outputs, tensors)), (*expected, *_gradients(expected, wide)), strict=True
    ):
        torch.testing.assert_close(out.double(), want, rtol=2e-2, atol=2e-2 * max(1.0, want.abs().max().item()))


def _gradients(outputs, tensors):
    loss = sum(out.double().square().sum() for out in outputs)
    return torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)


@pytest.fixture
def dense_warnings(caplog, monkeypatch):
    """What the dense route says in a process that has warned of nothing yet."""
    monkeypatch.setattr(dense_module, "_warned", set())
    caplog.set_level(logging.WARNING, "ebft_mega")
    return caplog


def test_dense_warns_once_per_kind_of_pass_and_names_the_cost(dense_warnings):
    levels = forest_of(2, 3, 2, 5, merges=False).levels
    pattern, *others = (AttentionPattern(2, (5, 10, 17), (), 23, levels[:number], 1) for number in (2, 3, 4, 5))
    for asked in (pattern, pattern, *others, pattern):  # more patterns than masks are kept
        DenseAttention().attend(asked, *random_tensors(asked))
    assert len(dense_warnings.messages) == 4
    # Two rows of 6 queries, 23 + 6 * 2 keys; each query sees its anchor's tokens and both of its own.
    assert "420 query-key pairs per head where 152 are needed (2.8 times)" in dense_warnings.messages[0]
    assert "masks of 420 bytes" in dense_warnings.messages[0]


def test_dense_warns_once_whatever_the_rollouts_and_wherever_documents_start(dense_warnings):
    for start in range(1, 20):
        levels = forest_of(2, 3, 2, 2, seed=start).levels
        masked = AttentionPattern(2, (6, 11, 18), (), 24, levels, 1, ((0, start), (0,)))
        DenseAttention().attend(masked, *random_tensors(masked))
    assert len(dense_warnings.messages) == 1


def clear_plans():
    two_part_plan._repeated_plan.cache_clear()
    two_part_plan._passing_plan.cache_clear()


def decode_passes(forest, starts=None):
    return [
        AttentionPattern(forest.num_rows, (4, 8, 12), (), 16, forest.up_to(number).levels, 1, starts)
        for number in range(1, len(forest.levels) + 1)
    ]


def test_layers_and_steps_share_plans_of_separate_rollouts():
    clear_plans()
    for step in range(3):
        for pattern in decode_passes(forest_of(2, 3, 2, 4, merges=False, seed=step)):
            for _layer in range(3):
                TwoPartAttention().attend(pattern, *random_tensors(pattern))
    assert two_part_plan._repeated_plan.cache_info().misses == 4
    assert two_part_plan._passing_plan.cache_info().misses == 0


@pytest.mark.parametrize("merges, starts", [(True, None), (True, ((0, 5), (0, 2, 9))), (False, ((0, 5), (0, 2, 9)))])
def test_plans_that_do_not_repeat_are_made_once_per_pass_and_not_collected(merges, starts):
    clear_plans()
    forests = []
    for step in range(3):
        forest = forest_of(2, 3, 2, 4, merges=merges, seed=step)
        forests.append(weakref.ref(forest.levels[0]))
        for pattern in decode_passes(forest, starts):
            for _layer in range(3):
                TwoPartAttention().attend(pattern, *random_tensors(pattern))
    found = two_part_plan._passing_plan.cache_info()
    assert found.misses == (3 * 4 if merges else 4)  # documents start at the same places in every step here
    assert found.currsize <= 4 and two_part_plan._repeated_plan.cache_info().misses == 0
    if merges:
        del forest, pattern
        gc.collect()
        assert forests[0]() is None and forests[1]() is None, "the nodes of earlier steps are held"


@pytest.mark.parametrize("merges", [False, True], ids=["separate", "merged"])
def test_rows_of_one_document_each_are_as_if_documents_were_not_masked(merges):
    for shared in decode_passes(forest_of(2, 3, 2, 4, merges=merges)):
        alone = replace(shared, document_starts=((0,), (0,)))
        tensors = random_tensors(shared)
        for one, other in zip(*(TwoPartAttention().attend(p, *tensors) for p in (shared, alone)), strict=True):
            assert torch.equal(one, other)


def test_routes_by_name(monkeypatch):
    cuda, other = torch.device("cuda"), torch.device("meta")
    assert isinstance(make_route("auto", CPU, own_capacity=8, head_dim=32), TwoPartAttention)
    assert isinstance(make_route("two_part", CPU, own_capacity=8, head_dim=32), TwoPartAttention)
    assert isinstance(make_route("dense", CPU, own_capacity=8, head_dim=32), DenseAttention)
    assert isinstance(make_route("auto", other, own_capacity=8, head_dim=32), DenseAttention)
    with pytest.raises(ValueError, match="no backward pass on cpu"):
        make_route("flex", CPU, own_capacity=8, head_dim=32)
    with pytest.raises(ValueError, match="not for meta"):
        make_route("two_part", other, own_capacity=8, head_dim=32)
    for triton, expected in ((True, FlexAttention(8)), (False, TwoPartAttention())):
        monkeypatch.setattr(_triton, "has_triton", lambda triton=triton: triton)
        assert make_route("auto", cuda, own_capacity=8, head_dim=32) == expected
    monkeypatch.setattr(_triton, "has_triton", lambda: True)
    assert make_route("auto", cuda, own_capacity=8, head_dim=8) == TwoPartAttention()
    with pytest.raises(ValueError, match="heads of 16 values or more, not of 8"):
        make_route("flex", cuda, own_capacity=8, head_dim=8)
    assert make_route("auto", cuda, own_capacity=8, head_dim=32, is_repeatable=True) == TwoPartAttention()
    with pytest.raises(ValueError, match="deterministic is true"):
        make_route("flex", cuda, own_capacity=8, head_dim=32, is_repeatable=True)

"""The tests' own measure of memory, on functions whose peak can be told by hand."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.memory import most_live, peak_tensor_bytes

MIB = 2**20
SCALARS = 64  # bytes: a number that meets a tensor becomes a tensor itself


def mebibytes(count: int) -> torch.Tensor:
    return torch.empty(count * MIB, dtype=torch.uint8)


def test_counts_what_is_live_at_once_not_what_was_ever_allocated() -> None:
    def function() -> torch.Tensor:
        kept = mebibytes(2)
        first = mebibytes(5)
        del first
        second = mebibytes(4)
        del second
        return kept

    result, peak = peak_tensor_bytes(function)
    assert result.numel() == 2 * MIB
    assert peak == 7 * MIB


def test_earlier_tensors_do_not_count_even_when_they_are_freed_meanwhile() -> None:
    earlier = [mebibytes(50)]

    def function() -> None:
        earlier.clear()
        mebibytes(3)

    assert peak_tensor_bytes(function) == (None, 3 * MIB)


def test_a_place_counts_only_while_the_call_holds_it() -> None:
    # The profiler remembers blocks beyond its end: one of an earlier call may seem to be freed in this one.
    assert most_live([(1, 5), (9, -100), (2, 3), (1, -5), (1, 4), (2, -3)]) == 8


def test_views_and_work_in_place_cost_nothing() -> None:
    def function() -> None:
        whole = torch.zeros(MIB, dtype=torch.float32)
        whole.view(1024, -1)[3:7].add_(1).t().mul_(2)

    assert peak_tensor_bytes(function)[1] - 4 * MIB in range(SCALARS)


def test_sees_what_the_backward_needs() -> None:
    weight = torch.ones(MIB, requires_grad=True)

    def function() -> None:
        # exp keeps its result (4 MiB); in the backward the expanded gradient of the sum is a view, and the
        # product with the kept result is the gradient of exp (4 MiB), which becomes weight.grad.
        weight.exp().sum().backward()

    assert peak_tensor_bytes(function)[1] - 8 * MIB in range(SCALARS)


def test_sees_scratch_inside_a_kernel() -> None:
    values = torch.rand(MIB // 8, dtype=torch.float64)

    # A median orders a copy of its input inside the kernel; the copy never reaches Python.
    _, peak = peak_tensor_bytes(values.median)
    assert peak >= MIB


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 8)), max_size=12))
def test_any_order_of_allocations_and_frees(actions: list[tuple[bool, int]]) -> None:
    def function() -> int:
        live: list[torch.Tensor] = []
        peak = 0
        for allocates, count in actions:
            if allocates or not live:
                live.append(mebibytes(count))
            else:
                live.pop(count % len(live))
            peak = max(peak, sum(tensor.numel() for tensor in live))
        return peak

    expected, peak = peak_tensor_bytes(function)
    assert peak == expected

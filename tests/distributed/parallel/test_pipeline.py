"""The pipeline's ring and 1F1B on real ranks, with a toy model whose results are known."""

import pytest
import torch
from torch import Tensor

from ebft_mega.parallel import pipeline
from ebft_mega.parallel.groups import connect, make_process_groups
from ebft_mega.parallel.pipeline import Slot, one_forward_one_backward, ring_slots, run_ring, share_from_last_stage
from tests.distributed.ranks import run_ranks

PASSES = 4


def ring(micro_batches: int, stages: int) -> dict[str, object]:
    """Numbers go round: each stage appends its own digit, the first starts from what came back.

    What is sent on has as many copies of the number as what came back last says, which every stage has to know.
    """
    groups = make_process_groups(connect(), 1, stages)
    stage, busy, ticks = groups.pipeline_rank, [], 0
    kept: dict[int, list[int]] = {}
    returned: dict[int, list[int]] = {index: [] for index in range(micro_batches)}

    def newest(slot: Slot) -> int:
        """What came back of the pass before; there must be nothing newer yet."""
        assert len(returned[slot.micro_batch]) == slot.pass_index
        return returned[slot.micro_batch][-1] if slot.pass_index else slot.micro_batch + 1

    def size(slot: Slot) -> int:
        return 1 + newest(slot) % 5

    def run(slot: Slot, received: Tensor | None) -> Tensor:
        busy.append(slot)
        start = torch.tensor([newest(slot)] * size(slot)) if received is None else received
        assert len(start) == size(slot)
        output = start * 7 % 1000003 + stage
        assert (output == output[0]).all()
        if not groups.is_last_stage:
            return output
        kept.setdefault(slot.micro_batch, []).append(int(output[0]))
        return output[:1]

    def take_returned(slot: Slot, values: Tensor) -> None:
        assert len(returned[slot.micro_batch]) == slot.pass_index < PASSES - 1
        returned[slot.micro_batch].append(int(values))

    original = pipeline.hand_over

    def counting(*arguments, **options):
        nonlocal ticks
        ticks += 1
        original(*arguments, **options)

    pipeline.hand_over = counting
    try:
        run_ring(
            groups,
            micro_batches,
            run,
            hidden_buffer=lambda slot: torch.empty(size(slot), dtype=torch.int64),
            num_passes=PASSES,
            returned_buffer=lambda slot: torch.empty(1, dtype=torch.int64),
            take_returned=take_returned,
        )
    finally:
        pipeline.hand_over = original
    values = torch.tensor([kept[index] for index in range(micro_batches)]) if groups.is_last_stage else torch.empty(0)
    (shared,) = share_from_last_stage([values], [(micro_batches, PASSES)], torch.int64, groups)
    return {"values": shared, "order": busy, "ticks": ticks, "returned": returned}


def expected_values(micro_batches: int, stages: int) -> list[list[int]]:
    """The same numbers without ranks."""
    rows = []
    for index in range(micro_batches):
        value, row = index + 1, []
        for _ in range(PASSES):
            for stage in range(stages):
                value = value * 7 % 1000003 + stage
            row.append(value)
        rows.append(row)
    return rows


@pytest.mark.parametrize(("micro_batches", "stages"), [(1, 1), (3, 1), (2, 2), (5, 2), (1, 2), (3, 3), (7, 3), (2, 3)])
def test_ring_carries_every_micro_batch_through_every_stage_and_back(micro_batches, stages):
    results = run_ranks(stages, ring, micro_batches, stages)
    for result in results:
        expected = expected_values(micro_batches, stages)
        assert result["values"].tolist() == expected
        # Of all passes but the last, which nothing follows, every stage learns what came out.
        assert result["returned"] == {index: row[:-1] for index, row in enumerate(expected)}
        assert result["order"] == [slot for slot in ring_slots(micro_batches, PASSES, stages) if slot is not None]
        if stages > 1:
            # Measured: the ticks in which a stage does nothing are those of the continuous schedule.
            idle = result["ticks"] - len(result["order"])
            missing = max(0, stages - micro_batches) * PASSES
            assert idle == stages - 1 + missing
            flushed = PASSES * (stages - 1)
            assert micro_batches < stages or idle < flushed


def train(micro_batches: int, stages: int) -> dict[str, object]:
    """Gradients of a chain of linear layers, one per stage, and how many micro-batches were in flight."""
    groups = make_process_groups(connect(), 1, stages)
    stage = groups.pipeline_rank
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 9, dtype=torch.float64).view(3, 3) + stage)
    in_flight = most = 0

    def forward(index: int, received: Tensor | None) -> Tensor:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        entering = inputs(index) if received is None else received
        output = torch.tanh(entering @ weight)
        return (output * (index + 1)).sum() if groups.is_last_stage else output

    def backward(output: Tensor, gradient: Tensor | None) -> None:
        nonlocal in_flight
        in_flight -= 1
        torch.autograd.backward([output], None if gradient is None else [gradient])

    one_forward_one_backward(
        groups, micro_batches, forward, backward, lambda index: torch.empty(2, 3, dtype=torch.float64)
    )
    return {"gradient": weight.grad, "most": most}


def inputs(index: int) -> Tensor:
    """A micro-batch."""
    return torch.arange(6, dtype=torch.float64).view(2, 3) / 6 + index


@pytest.mark.parametrize(("micro_batches", "stages"), [(3, 1), (4, 2), (1, 2), (2, 4), (6, 4)])
def test_one_forward_one_backward_has_the_gradients_of_the_whole_chain(micro_batches, stages):
    weights = [
        torch.nn.Parameter(torch.linspace(-1, 1, 9, dtype=torch.float64).view(3, 3) + stage) for stage in range(stages)
    ]
    for index in range(micro_batches):
        hidden = inputs(index)
        for weight in weights:
            hidden = torch.tanh(hidden @ weight)
        (hidden * (index + 1)).sum().backward()
    for stage, result in enumerate(run_ranks(stages, train, micro_batches, stages)):
        torch.testing.assert_close(result["gradient"], weights[stage].grad, atol=1e-12, rtol=1e-12)
        assert result["most"] == min(stages - stage, micro_batches)

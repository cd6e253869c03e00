"""The schedule of the decode ring: every pass once, tokens back in time, and no idle slots but unavoidable ones."""

from hypothesis import given
from hypothesis import strategies as st

from ebft_mega.parallel.pipeline import Slot, ring_slots

sizes = st.integers(1, 9)


@given(sizes, sizes, sizes)
def test_every_pass_of_every_micro_batch_runs_once(micro_batches, passes, stages):
    slots = [slot for slot in ring_slots(micro_batches, passes, stages) if slot is not None]
    assert sorted(slots, key=lambda s: (s.micro_batch, s.pass_index)) == [
        Slot(batch, index) for batch in range(micro_batches) for index in range(passes)
    ]


@given(sizes, sizes, sizes)
def test_a_pass_starts_only_after_the_last_stage_returned_the_one_before(micro_batches, passes, stages):
    slots = ring_slots(micro_batches, passes, stages)
    tick_of = {slot: tick for tick, slot in enumerate(slots) if slot is not None}
    for slot, tick in tick_of.items():
        if slot.pass_index:
            before = tick_of[Slot(slot.micro_batch, slot.pass_index - 1)]
            returned = before + stages - 1  # the tick at whose end the last stage hands it back
            assert tick > returned or stages == 1


@given(sizes, sizes, sizes)
def test_enough_micro_batches_leave_no_slot_idle(micro_batches, passes, stages):
    """A stage then waits only for the first pass to reach it and after the last has left it: p - 1 ticks in all.

    Flushing the pipeline after every pass would cost p - 1 ticks for each.
    """
    slots = ring_slots(micro_batches, passes, stages)
    idle = sum(slot is None for slot in slots)
    missing = max(0, stages - micro_batches)
    assert idle == missing * passes
    assert len(slots) == max(micro_batches, stages) * passes


@given(sizes, sizes, sizes)
def test_keys_and_values_of_few_micro_batches_are_held_at_once(micro_batches, passes, stages):
    slots = ring_slots(micro_batches, passes, stages)
    started, ended, most = set(), set(), 0
    for slot in slots:
        if slot is not None:
            started.add(slot.micro_batch)
            most = max(most, len(started - ended))
            if slot.pass_index == passes - 1:
                ended.add(slot.micro_batch)
    # Without pipeline one at a time; a remainder that fills no group of its own is shared out among the groups.
    groups = max(1, micro_batches // stages)
    assert most <= -(-micro_batches // groups)
    assert most == 1 or stages > 1

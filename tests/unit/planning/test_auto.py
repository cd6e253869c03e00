"""What `auto` becomes: the choices against the peaks that the memory formulas give."""

import pytest

from ebft_mega.config.load import load_config
from ebft_mega.planning import dry_run as planner
from ebft_mega.planning.auto import (
    Fit,
    choices,
    chosen_reuse,
    feature_network_is_sharded,
    fit,
    needed_bytes,
    needs_of_phases,
    possible_reuses,
    ways_out,
)
from ebft_mega.planning.memory import Choices, peak_bytes, plan_memory
from ebft_mega.planning.run_plan import check_run

# The fixture's model is so small that saved activations need most of all; parameters stay whole at stage 2.
WHOLE = {"zero__stage": 2}
PLENTY = 1 << 40


def plan_of(inputs, world_size=4, **changes):
    config = load_config(inputs.write(**changes))
    return config, check_run(config, world_size)


def needed(config, plan, reuse, is_sharded=False):
    return needed_bytes(peak_bytes(config, plan, Choices(reuse, is_sharded)))


def test_the_most_that_fits_is_kept(inputs):
    config, plan = plan_of(inputs, **WHOLE, zero__feature_network="resident")
    activations, checkpoints = (needed(config, plan, reuse) for reuse in ("activations", "checkpoints"))
    assert activations > checkpoints
    assert chosen_reuse(config, plan, activations) == "activations"
    assert chosen_reuse(config, plan, activations - 1) == "checkpoints"
    assert chosen_reuse(config, plan, checkpoints) == "checkpoints"
    off = needed(config, plan, "off")
    assert chosen_reuse(config, plan, checkpoints - 1) == ("off" if off < checkpoints else "checkpoints")


def test_a_tenth_of_the_memory_is_left_free(inputs):
    config, plan = plan_of(inputs, **WHOLE, zero__feature_network="resident")
    peak = peak_bytes(config, plan, Choices("activations", False))
    assert chosen_reuse(config, plan, round(peak / 0.91)) == "checkpoints"
    assert chosen_reuse(config, plan, round(peak / 0.89)) == "activations"


@pytest.mark.parametrize(
    ("changes", "with_plenty"),
    [
        ({}, "checkpoints"),  # stage 3, parameters released after the rollouts
        ({"zero__hold_parameters": "step"}, "activations"),
        ({"zero__stage": 0}, "activations"),
        (WHOLE | {"train__activation_checkpointing": "full"}, "checkpoints"),
        ({"ebft__rl_coef": 0, "ebft__ce_coef": 1}, "off"),
    ],
)
def test_what_auto_takes_of_plenty_and_of_unknown_memory(inputs, changes, with_plenty):
    config, plan = plan_of(inputs, **changes)
    assert chosen_reuse(config, plan, PLENTY) == with_plenty
    assert chosen_reuse(config, plan, None) == ("off" if with_plenty == "off" else "checkpoints")


@pytest.mark.parametrize("memory", [None, 1, PLENTY])
@pytest.mark.parametrize("reuse", ["activations", "checkpoints", "off"])
@pytest.mark.parametrize("network", ["resident", "sharded"])
def test_what_is_configured_is_taken_whatever_fits(inputs, reuse, network, memory):
    config, plan = plan_of(inputs, **WHOLE, learn__reuse_rollout=reuse, zero__feature_network=network)
    assert choices(config, plan, memory) == Choices(reuse, network == "sharded")


def test_a_run_without_rollouts_keeps_nothing(inputs):
    config, plan = plan_of(inputs, ebft__rl_coef=0, ebft__ce_coef=1, learn__reuse_rollout="checkpoints")
    assert choices(config, plan, PLENTY) == Choices("off", False)


def test_the_network_is_divided_before_fewer_activations_are_kept(inputs):
    """In micro-batches of one row the network is larger than what its own phase adds to it."""
    changes = {"train__micro_batch_size": 1, "train__global_batch_size": 8, "ebft__n_samples_per_prompt": 1}
    config, plan = plan_of(inputs, **WHOLE, **changes)
    resident, divided = (needed(config, plan, "activations", is_sharded) for is_sharded in (False, True))
    assert divided < resident
    assert choices(config, plan, resident) == Choices("activations", False)
    assert choices(config, plan, resident - 1) == Choices("activations", True)
    assert choices(config, plan, divided) == Choices("activations", True)
    assert chosen_reuse(config, plan, divided - 1) != "activations"
    assert not feature_network_is_sharded(config, plan, None)


def test_a_network_that_no_other_process_has_is_never_divided(inputs):
    config, plan = plan_of(inputs, world_size=1)
    assert not feature_network_is_sharded(config, plan, 1)


def test_the_dry_run_shows_the_alternatives(inputs):
    config, plan = plan_of(inputs, **WHOLE)
    text = planner.describe_run(config, plan)
    for reuse in ("activations", "checkpoints", "off"):
        peaks = (peak_bytes(config, plan, Choices(reuse, is_sharded)) for is_sharded in (False, True))
        cells = [reuse, *(f"{peak / planner.GIB_BYTES:.3f}" for peak in peaks)]
        assert cells in [line.split() for line in text.splitlines()]
    assert "Planned above: checkpoints, feature network resident." in text
    config, plan = plan_of(inputs)
    section = planner.describe_run(config, plan).partition("Peak by what learning takes over")[2]
    assert section and "activations" not in section
    config, plan = plan_of(inputs, ebft__rl_coef=0, ebft__ce_coef=1)
    assert "Peak by what learning takes over" not in planner.describe_run(config, plan)


def fit_lines(config, plan, memory):
    section = planner.describe_run(config, plan, memory).partition("\nOn accelerators of ")[2].partition("\n\n")[0]
    return [" ".join(line.split()) for line in section.splitlines()]


def test_the_dry_run_resolves_auto_for_a_memory(inputs):
    """The table above is that of what was resolved; what does not fit is said."""
    config, plan = plan_of(inputs, **WHOLE)
    for memory, reuse in (
        (PLENTY, "activations"),
        (needed(config, plan, "checkpoints"), "checkpoints"),
        (1, "checkpoints"),
    ):
        found = fit(config, plan, memory)
        assert found.choices == choices(config, plan, memory) and found.choices.reuse_rollout == reuse
        assert found.fits == (needed_bytes(found.peak_bytes) <= memory) == (memory > 1)
        lines = fit_lines(config, plan, memory)
        assert lines[2] == f"learn.reuse_rollout {reuse} (configured: auto)"
        assert lines[4] == f"peak of the ranks that need the most, GiB {found.peak_bytes / planner.GIB_BYTES:,.3f}"
        assert lines[6].startswith("it fits yes: " if memory > 1 else "it fits no: ")
        peak = f"peak (states and the largest phase) {found.peak_bytes / planner.GIB_BYTES:.3f}"
        text = planner.describe_run(config, plan, memory)
        assert peak in [" ".join(line.split()) for line in text.splitlines()]
        assert f"Planned above: {reuse}, feature network " in text
    assert fit_lines(config, plan, 79_600_000_000)[0] == "79.6 GB"
    assert fit_lines(config, plan, None) == []


@pytest.mark.parametrize("changes", [{}, WHOLE, {"train__activation_checkpointing": "full"}])
def test_where_nothing_fits_auto_takes_what_needs_the_least(inputs, changes):
    config, plan = plan_of(inputs, **changes)
    peaks = [peak_bytes(config, plan, Choices(reuse, each)) for reuse in possible_reuses(config) for each in (0, 1)]
    found = fit(config, plan, 1)
    assert not found.fits and found.peak_bytes == min(peaks)


def with_settings(inputs, changes, way):
    """Config and plan of the settings that a way out names, made as those of a file."""
    return plan_of(inputs, **changes, **{key.replace(".", "__"): value for key, value in way.changes.items()})


@pytest.mark.parametrize("changes", [{}, {"zero__stage": 0, "train__micro_batch_size": 1}])
def test_where_a_run_does_not_fit_the_fewest_settings_with_which_it_does_are_named(inputs, changes):
    config, plan = plan_of(inputs, **changes)
    smallest = fit(config, plan, 1).peak_bytes
    memory, count, most = needed_bytes(smallest), 1, 0
    while (ways := ways_out(config, plan, memory := memory * 9 // 10)) and ways[0].fits:
        assert {len(way.changes) for way in ways} == {len(ways[0].changes)} and len(ways[0].changes) >= count
        count = len(ways[0].changes)
        most = max(most, len(ways))
        assert len({tuple(way.changes) for way in ways}) == len(ways)
        for way in ways:
            found = fit(*with_settings(inputs, changes, way), memory)
            assert found.fits and found.peak_bytes == way.peak_bytes < smallest
    assert most > 1 and count > 1
    (least,) = ways
    assert fit(*with_settings(inputs, changes, least), memory).peak_bytes == least.peak_bytes > 0.9 * memory


def test_the_dry_run_names_ways_out(inputs):
    config, plan = plan_of(inputs)
    memory = needed_bytes(fit(config, plan, 1).peak_bytes) * 9 // 10
    first = ways_out(config, plan, memory)[0]
    lines = fit_lines(config, plan, memory)
    assert lines[6].startswith("it fits no: ") and lines[7].startswith("it fits with --set ")
    assert lines[7].endswith(f": peak {first.peak_bytes / planner.GIB_BYTES:,.3f} GiB") and len(lines) <= 11
    lines = fit_lines(config, plan, 1)
    assert lines[7].startswith("nearest to it --set ") and lines[8].startswith("else more or larger accelerators")


def test_what_fits_leaves_a_tenth_free():
    chosen = Choices("off", False)
    assert Fit(chosen, peak_bytes=90, memory_bytes=100).fits and Fit(chosen, 90, 100).usable_bytes == 90
    assert not Fit(chosen, peak_bytes=95, memory_bytes=100).fits


def test_a_run_without_rollouts_has_nothing_to_resolve(inputs):
    config, plan = plan_of(inputs, ebft__rl_coef=0, ebft__ce_coef=1)
    lines = fit_lines(config, plan, PLENTY)
    assert len(lines) == 5 and lines[2].startswith("peak of the ranks")


def test_what_a_phase_is_said_to_need_is_what_the_run_has_chosen(inputs):
    config, plan = plan_of(inputs)
    chosen = {choices(config, plan, memory): memory for memory in (10**15, 1, None)}
    assert len(chosen) > 1, "memory decides"
    for resolved, memory in chosen.items():
        planned = plan_memory(config, plan, resolved, 0)
        for phase, words in needs_of_phases(config, plan, 0, memory).items():
            assert f"needs {(planned.state_bytes + planned.phase_bytes(phase)) / 1e9:.3g} GB" in words

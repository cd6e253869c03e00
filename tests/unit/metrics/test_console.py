"""What is printed on a terminal and into a log file."""

import io

from ebft_mega.metrics.console import (
    PlainLines,
    ProgressBar,
    StepClock,
    evaluation_numbers,
    format_duration,
    key_numbers,
    open_console,
    work_numbers,
)

TRAINING = {
    "train/loss": 1.25,
    "ebft/ce_loss": 2.5,
    "ebft/alignment": 0.125,
    "ebft/cfm_loss": 0.75,
    "train/grad_norm": 3.0,
    "train/lr": 7e-4,
    "perf/step_seconds": 1.5,
    "memory/peak_bytes": 123.0,
    "perf/tokens_per_second": 5461.3,
    "data/rows": 240.0,
    "data/epochs": 0.6,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_line_of_a_training_step():
    stream = io.StringIO()
    console = open_console(100, 0, stream, total_rows=400)
    console.log(60, TRAINING)
    console.close()
    assert stream.getvalue() == (
        "step 60/100  loss 1.2500  ce 2.5000  alignment 0.1250  cfm 0.7500  grad_norm 3.000  lr 7.00e-04  "
        "1.50 s/step  ETA 1:00  5,461 tokens/s  peak 0.00 GiB  row 240 of 400  epoch 0.60\n"
    )


def test_further_terms_of_the_reward_follow_the_alignment():
    terms = {"ebft/diversity": 1.0, "ebft/edit_distance": -0.5, "ebft/mean_reward": 2.0, "ebft/Odd name": 3.0}
    assert key_numbers(TRAINING | terms).startswith(
        "loss 1.2500  ce 2.5000  alignment 0.1250  edit_distance -0.5000  cfm 0.7500  grad_norm"
    )
    of_a_term_alone = {"train/loss": 1.0, "ebft/edit_distance": -0.5}
    assert key_numbers(of_a_term_alone) == "loss 1.0000  edit_distance -0.5000"


def test_missing_keys_are_left_out_and_evaluations_get_their_own_line():
    stream = io.StringIO()
    console = PlainLines(10, 0, stream)
    console.log(0, {"eval/ce_loss": 3.0, "eval/alignment": 0.5})
    console.log(1, {"train/loss": 1.0, "eval/ce_loss": 2.0, "perf/step_seconds": 2.0})
    assert stream.getvalue().splitlines() == [
        "step 0/10  held out: ce_loss 3.0000  alignment 0.5000",
        "step 1/10  loss 1.0000  2.00 s/step  ETA 18 s",
        "step 1/10  held out: ce_loss 2.0000",
    ]


def test_the_work_of_a_step_in_words():
    memory = {"memory/peak_bytes": 12.345 * 2**30}
    assert work_numbers(memory | {"data/rows": 8.0}) == "peak 12.35 GiB  row 8"
    assert work_numbers({"data/epochs/code": 0.25, "data/epochs/text": 1.5, "data/tokens/code": 9.0}, 80) == (
        "epochs 0.25 to 1.50"
    )
    assert work_numbers({}, 80) == ""


def test_what_an_evaluation_left_out_is_shown_if_there_is_any():
    counts = {"eval/rows_left_out": 0.0, "eval/blocks_left_out": 0.0}
    assert evaluation_numbers({"eval/ce_loss": 3.0} | counts) == "ce_loss 3.0000"
    some = {"eval/ce_loss": float("nan")} | counts | {"eval/blocks_left_out": 12.0}
    assert evaluation_numbers(some) == "ce_loss nan  blocks_left_out 12"


def test_progress_bar_on_a_terminal():
    stream = Terminal()
    console = open_console(4, 1, stream)
    assert isinstance(console, ProgressBar)
    console.log(2, TRAINING)
    console.note("[not markup]")
    console.log(3, TRAINING | {"eval/ce_loss": 2.0})
    console.close()
    text = stream.getvalue()
    assert "3/4" in text
    assert "1.50 s/step  ETA 2 s" in text
    assert "[not markup]" in text
    assert "held out: ce_loss 2.0000" in text


def test_time_left_follows_the_newest_steps_and_ignores_nan():
    clock = StepClock(total_steps=10, first_step=0)
    assert clock.text() == ""
    clock.tick(1, {"perf/step_seconds": 1.0})
    clock.tick(2, {"perf/step_seconds": 2.0})
    assert clock.text() == "1.10 s/step  ETA 9 s"
    clock.tick(3, {"perf/step_seconds": float("nan")})
    assert clock.text() == "1.10 s/step  ETA 8 s"


def test_durations():
    assert [format_duration(value) for value in (0.4, 59, 60, 125, 3599.6, 7383)] == [
        "0 s",
        "59 s",
        "1:00",
        "2:05",
        "1:00:00",
        "2:03:03",
    ]

"""The console of a training run: a progress bar on a terminal, one plain line a step in a log file."""

import math
import sys
import time
from collections.abc import Mapping
from typing import Protocol, TextIO

from ebft_mega.io.progress_bar import step_bar
from ebft_mega.io.standard_streams import print_line
from ebft_mega.metrics.metric_keys import term_key, terms_among

# Short name on screen, metric key, format. A key that a run does not log (a CE-only run has no alignment) is
# left out. Terms of `ebft.reward_terms` follow the alignment.
SHOWN = (
    ("loss", "train/loss", "{:.4f}"),
    ("ce", "ebft/ce_loss", "{:.4f}"),
    ("alignment", "ebft/alignment", "{:.4f}"),
    ("cfm", "ebft/cfm_loss", "{:.4f}"),
    ("grad_norm", "train/grad_norm", "{:.3f}"),
    ("lr", "train/lr", "{:.2e}"),
)
GIB_BYTES = 1 << 30
# Weight of the newest step in the moving average behind the time left.
SMOOTHING = 0.1


class ConsoleSink(Protocol):
    """A console that metrics are shown on."""

    name: str

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a step."""

    def note(self, text: str) -> None:
        """Show a line of text."""

    def close(self) -> None:
        """Leave the terminal as it was."""


def open_console(
    total_steps: int, first_step: int, stream: TextIO | None = None, total_rows: int | None = None
) -> ConsoleSink:
    """A progress bar if `stream` (standard output by default) is a terminal, plain lines otherwise.

    Args:
        total_steps: steps of the whole run.
        first_step: steps that were done before this start.
        stream: where to write.
        total_rows: rows that the whole run reads; None: it is not known.
    """
    stream = stream or sys.stdout
    if stream.isatty():
        return ProgressBar(total_steps, first_step, stream, total_rows)
    return PlainLines(total_steps, first_step, stream, total_rows)


def format_duration(seconds: float) -> str:
    """`7 s`, `3:05` (minutes), `2:03:05` (hours)."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes, second = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{second:02d}" if hours else f"{minutes}:{second:02d}"


def key_numbers(metrics: Mapping[str, float]) -> str:
    """The few numbers of a training step that fit on a line."""
    further = [
        (name, term_key(name), "{:.4f}") for name in terms_among(metrics) if name not in ("alignment", "diversity")
    ]
    place = next(index for index, (name, _, _) in enumerate(SHOWN) if name == "alignment") + 1
    numbers = (*SHOWN[:place], *further, *SHOWN[place:])
    return "  ".join(f"{name} {form.format(metrics[key])}" for name, key, form in numbers if key in metrics)


def work_numbers(metrics: Mapping[str, float], total_rows: int | None = None) -> str:
    """The pace of a step, the memory that it took, and how far the run is in its data.

    Args:
        metrics: of the step; what it did not log is left out.
        total_rows: rows that the whole run reads; None: it is not known.
    Returns:
        For instance `5,461 tokens/s  peak 12.34 GiB  row 240 of 400  epoch 0.60`.
    """
    parts = []
    if "perf/tokens_per_second" in metrics:
        parts.append(f"{metrics['perf/tokens_per_second']:,.0f} tokens/s")
    if "memory/peak_bytes" in metrics:
        parts.append(f"peak {metrics['memory/peak_bytes'] / GIB_BYTES:.2f} GiB")
    if "data/rows" in metrics:
        of_total = "" if total_rows is None else f" of {total_rows}"
        parts.append(f"row {metrics['data/rows']:.0f}{of_total}")
    epochs = [value for key, value in metrics.items() if key == "data/epochs" or key.startswith("data/epochs/")]
    if epochs:
        first, last = f"{min(epochs):.2f}", f"{max(epochs):.2f}"
        parts.append(f"epoch {first}" if len(epochs) == 1 else f"epochs {first} to {last}")
    return "  ".join(parts)


def evaluation_numbers(metrics: Mapping[str, float]) -> str:
    """Every `eval/*` value on one line, or an empty text; what was left out only if something was."""
    values = {key.removeprefix("eval/"): value for key, value in metrics.items() if key.startswith("eval/")}
    means = [f"{name} {value:.4f}" for name, value in values.items() if not name.endswith("_left_out")]
    counts = [f"{name} {value:.0f}" for name, value in values.items() if name.endswith("_left_out") and value]
    return "  ".join(means + counts)


class StepClock:
    """Smoothed seconds per step, and the time left at that pace."""

    def __init__(self, total_steps: int, first_step: int):
        self._total_steps = total_steps
        self._last_step = first_step
        self._last_time = time.monotonic()
        self._average_seconds: float | None = None

    def tick(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in a step: its own `perf/step_seconds`, or else the wall time since the last one."""
        now = time.monotonic()
        if step > self._last_step:
            seconds = metrics.get("perf/step_seconds", (now - self._last_time) / (step - self._last_step))
            if math.isfinite(seconds):
                previous = self._average_seconds
                self._average_seconds = seconds if previous is None else previous + SMOOTHING * (seconds - previous)
        self._last_step, self._last_time = step, now

    def text(self) -> str:
        """Seconds per step and time left, e.g. `1.52 s/step  ETA 2:31`."""
        if self._average_seconds is None:
            return ""
        left = max(self._total_steps - self._last_step, 0) * self._average_seconds
        return f"{self._average_seconds:.2f} s/step  ETA {format_duration(left)}"


class PlainLines:
    """One line a step, for a log file."""

    name = "console"

    def __init__(self, total_steps: int, first_step: int, stream: TextIO, total_rows: int | None = None):
        self._total_steps, self._total_rows = total_steps, total_rows
        self._clock = StepClock(total_steps, first_step)
        self._stream = stream

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print `step i/N` with the step's numbers, and one more line if the step was evaluated."""
        numbers = key_numbers(metrics)
        head = f"step {step}/{self._total_steps}"
        if numbers:
            self._clock.tick(step, metrics)
            work = work_numbers(metrics, self._total_rows)
            self.note("  ".join(part for part in (head, numbers, self._clock.text(), work) if part))
        evaluated = evaluation_numbers(metrics)
        if evaluated:
            self.note(f"{head}  held out: {evaluated}")

    def note(self, text: str) -> None:
        """Print a line at once, also into a pipe."""
        print_line(text, self._stream)

    def close(self) -> None:
        """Do nothing: nothing is held open."""


class ProgressBar:
    """A bar with the step's numbers and the time left, for a terminal."""

    name = "console"

    def __init__(self, total_steps: int, first_step: int, stream: TextIO, total_rows: int | None = None):
        self._total_rows = total_rows
        self._clock = StepClock(total_steps, first_step)
        self._bar = step_bar(total_steps, first_step, stream)
        self._bar.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Move the bar; an evaluation stays on screen as a line above it."""
        numbers = key_numbers(metrics)
        if numbers:
            self._clock.tick(step, metrics)
            work = work_numbers(metrics, self._total_rows)
            self._bar.show(step, clock=self._clock.text(), numbers="  ".join(part for part in (numbers, work) if part))
        evaluated = evaluation_numbers(metrics)
        if evaluated:
            self.note(f"step {step}  held out: {evaluated}")

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.note(text)

    def close(self) -> None:
        """Stop redrawing; the last state of the bar stays on screen."""
        self._bar.stop()

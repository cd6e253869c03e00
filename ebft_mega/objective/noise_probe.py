"""How noisy a step's gradient is, from short random sketches of what each micro-batch adds to it.

A *sketch* multiplies every element of a gradient by a random sign and adds the products up in a thousand buckets; the
expectation of its squared norm is that of the gradient. It is linear: sketches of parts of a gradient add up, whichever
ranks have the parts. They are taken while the backward passes run, when every rank has the gradients of its own
micro-batch whole, at every ZeRO stage; no gradient is stored for it.
"""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ebft_mega.config.schema import RunConfig
from ebft_mega.model.stage import Stage
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.parallel.roles import ParameterRole

# A prime: elements of one column of a matrix come to different buckets.
BUCKETS = 1021
ELEMENTS_AT_ONCE = 4096 * BUCKETS
# Share of what is known that is left after another measurement.
DECAY = 0.9


@dataclass(frozen=True)
class GradientNoise:
    """Two parts of the squared norm of a step's gradient, of one measurement or decayed sums of several."""

    signal: float  # squared norm of the expected gradient; unbiased, so it may be below 0
    noise: float  # of a single row: trace of the covariance of its gradient

    @classmethod
    def of_micro_batches(cls, squares: float, square_of_sum: float, micro_batches: int, rows: int) -> "GradientNoise":
        """Take the gradient of a step apart, by what its micro-batches differ in.

        Args:
            squares: sum of the squared norms of what each micro-batch adds to the step's gradient.
            square_of_sum: squared norm of the step's gradient.
            micro_batches: N, at least 2, of all replicas.
            rows: of each.
        Source: McCandlish et al., "An Empirical Model of Large-Batch Training" (arXiv 1812.06162), appendix A.1.
        """
        of_mean = (micro_batches * squares - square_of_sum) / (micro_batches - 1)  # noise of the step's gradient
        return cls(square_of_sum - of_mean, of_mean * micro_batches * rows)

    def plus(self, later: "GradientNoise") -> "GradientNoise":
        """What is left of this after a later measurement, and that one."""
        return GradientNoise(DECAY * self.signal + later.signal, DECAY * self.noise + later.noise)

    def metrics(self, rows: int) -> dict[str, float]:
        """As they are logged.

        Args:
            rows: of a step.
        """
        if self.noise <= 0:  # micro-batches whose gradients are equal
            return {}
        found = {"ebft/gradient_signal_to_noise": self.signal / (self.noise / rows)}
        if self.signal > 0:
            found["ebft/critical_batch_rows"] = self.noise / self.signal
        return found


class NoiseProbe:
    """Measures the gradient of every so many steps; a trainer has one if its configuration says so."""

    def __init__(self, stage: Stage, interval: int, micro_batch_size: int):
        """Begin with nothing measured.

        Args:
            stage: this rank's; its parameters may be partitioned.
            interval: optimizer steps.
            micro_batch_size: rows.
        """
        self._stage, self._interval, self._rows = stage, interval, micro_batch_size
        self._sketches: list[Tensor] | None = None  # by micro-batch, while a step is measured
        self.last: GradientNoise | None = None  # of the last measured step, times what the engine scales gradients by
        self._known: GradientNoise | None = None
        self._metrics: dict[str, float] = {}

    @classmethod
    def of(cls, config: RunConfig, stage: Stage) -> "NoiseProbe | None":
        """That of a run; None: `ebft.noise_interval` is not set."""
        interval = config.ebft.noise_interval
        return None if interval is None else cls(stage, interval, config.train.micro_batch_size)

    @contextmanager
    def around_step(self, step: int) -> Iterator[None]:
        """Context in which optimizer step `step` (0-based) is computed; measures it, if it is one of those.

        Communication: if so, an all-reduce of `BUCKETS` float64 for each micro-batch over the replica, and one of one
            more than `BUCKETS` over the data-parallel group, for which the host waits.
        """
        self._metrics = {}
        if (step + 1) % self._interval:
            yield
            return
        self._sketches = []
        try:
            with self._looking():
                yield
            self._take(torch.stack(self._sketches))
        finally:
            self._sketches = None

    def begin_micro_batch(self) -> None:
        """Before the backward pass of each micro-batch."""
        if self._sketches is not None:
            self._sketches.append(torch.zeros(BUCKETS, dtype=torch.float64, device=self._stage.groups.device))

    def metrics(self) -> dict[str, float]:
        """Of the step that has just been measured; of any other one nothing. Communication: none."""
        return self._metrics

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """See every gradient as soon as a backward pass has it."""
        groups, roles = self._stage.groups, self._stage.parameter_roles()
        with ExitStack() as handles:
            for name, parameter in self._stage.named_parameters():
                seed = sketch_seed(name, roles[name], groups)
                if seed is not None:
                    handles.callback(
                        parameter.register_hook(lambda gradient, seed=seed: self._add(gradient, seed)).remove
                    )
            yield

    def _add(self, gradient: Tensor, seed: int) -> None:
        assert self._sketches, "a backward pass belongs to a micro-batch"
        add_sketch(self._sketches[-1], gradient, seed)

    def _take(self, sketches: Tensor) -> None:
        """Take in the sketches [M, BUCKETS] of this rank."""
        groups = self._stage.groups
        dist.all_reduce(sketches, group=groups.model_parallel)
        sums = torch.cat((sketches.sum(dim=0), sketches.square().sum()[None]))
        dist.all_reduce(sums, group=groups.data_parallel)
        if not sums.isfinite().all():  # the step is skipped, too
            return
        micro_batches = len(sketches) * groups.data_parallel_size
        squares, square_of_sum = float(sums[-1]), float(sums[:-1].square().sum())
        self.last = found = GradientNoise.of_micro_batches(squares, square_of_sum, micro_batches, self._rows)
        self._known = found if self._known is None else self._known.plus(found)
        self._metrics = self._known.metrics(micro_batches * self._rows)


def sketch_seed(name: str, role: ParameterRole, groups: ProcessGroups) -> int | None:
    """Seed of a parameter's signs: the same wherever parts of one gradient are, different for all others.

    None: another rank has the same gradient.
    """
    if not (role.sharded or role.partial_gradient or groups.tensor_parallel_rank == 0):
        return None
    place = "tied" if role.tied else f"{groups.pipeline_rank}:{name}"
    part = groups.tensor_parallel_rank if role.sharded else -1
    return int.from_bytes(hashlib.sha256(f"{place}:{part}".encode()).digest()[:4], "little")


@torch.no_grad()
def add_sketch(sketch: Tensor, gradient: Tensor, seed: int) -> None:
    """Add the sketch of a gradient of any shape to `sketch`, float64 [BUCKETS]; equal seeds are equal signs.

    Memory: `ELEMENTS_AT_ONCE` signs and float32 products.
    Communication: none.
    """
    generator = torch.Generator(gradient.device).manual_seed(seed)
    for part in gradient.reshape(-1).split(ELEMENTS_AT_ONCE):
        bits = torch.randint(2, part.shape, generator=generator, device=part.device, dtype=torch.int8)
        signed = part.float() * (2 * bits - 1)
        sketch += F.pad(signed, (0, -len(signed) % BUCKETS)).view(-1, BUCKETS).sum(dim=0)

"""Count the matrix products of a running step, to check the formulas of `ebft_mega.cost` against them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.metrics.timers import PhaseTimers


@dataclass(frozen=True)
class MatrixProduct:
    """One product of a [rows, inner] and an [inner, columns] matrix, or of a batch of them."""

    phase: str
    batch: int | None  # None: two matrices
    rows: int
    inner: int
    columns: int

    @property
    def flops(self) -> int:
        """Two per multiply-add."""
        return 2 * (self.batch or 1) * self.rows * self.inner * self.columns


class LabelledTimers(PhaseTimers):
    """Timers that know which phase is running; of nested phases, the outermost."""

    def __init__(self, synchronize: Callable[[], object] | None = None):
        """Make timers with no phase running; `synchronize` as in `PhaseTimers`."""
        super().__init__(synchronize)
        self.current = ""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """As `PhaseTimers.phase`."""
        outer = self.current
        self.current = outer or name
        try:
            with super().phase(name):
                yield
        finally:
            self.current = outer


class ProductCounter(TorchDispatchMode):
    """Record the matrix products of forward and backward passes, by dispatching below autograd.

    Products in float64 (the features' inner products and the rewards) are left out: the formulas do not count them.
    """

    # Index of the first operand: `addmm(sum, a, b)` adds `mm(a, b)` to its first argument.
    OPERANDS = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::bmm": 0, "aten::baddbmm": 1}

    def __init__(self, timers: LabelledTimers):
        """Count for the phases of these timers."""
        super().__init__()
        self.products: list[MatrixProduct] = []
        self._timers = timers

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: D102
        first = self.OPERANDS.get(func._schema.name)
        if first is not None and args[first].dtype != torch.float64:
            left, right = args[first : first + 2]
            batch = left.shape[0] if left.dim() == 3 else None
            rows, inner = left.shape[-2:]
            self.products.append(MatrixProduct(self._timers.current, batch, rows, inner, right.shape[-1]))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class CountedPhase:
    """Sums over the matrix products of one phase."""

    linear_flops: int
    head_flops: int
    batched_flops: int  # attention, unless a fused kernel computes it
    layer_rows: int  # positions x layers, forward
    head_rows: int  # forward


def count_phase(products: Sequence[MatrixProduct], phase: str, architecture: Architecture) -> CountedPhase:
    """Sort a phase's products by their shapes.

    Products of the head have the vocabulary among their three sizes, all others belong to layers. A forward product
    multiplies [rows, H] and [H, width]: rows that enter a layer are those of the fused projection of queries, keys and
    values.

    Args:
        architecture: of one process. Rows, H, V and the fused width must differ: a product is recognised by its shape.
    """
    a = architecture
    fused = (a.num_attention_heads + 2 * a.num_key_value_heads) * a.head_dim
    of_phase = [product for product in products if product.phase == phase]
    own = [product for product in of_phase if product.batch is None]
    head = [p for p in own if a.vocab_size in (p.rows, p.inner, p.columns)]
    layers = [p for p in own if a.vocab_size not in (p.rows, p.inner, p.columns)]
    return CountedPhase(
        linear_flops=sum(p.flops for p in layers),
        head_flops=sum(p.flops for p in head),
        batched_flops=sum(p.flops for p in of_phase if p.batch is not None),
        layer_rows=sum(p.rows for p in layers if (p.inner, p.columns) == (a.hidden_size, fused)),
        head_rows=sum(p.rows for p in head if (p.inner, p.columns) == (a.hidden_size, a.vocab_size)),
    )

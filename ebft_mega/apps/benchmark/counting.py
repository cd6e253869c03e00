"""Count the matrix products of a running step, to check the formulas of `ebft_mega.cost` against them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
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
    is_double: bool = False  # of float64 matrices
    reads_table: bool = False  # one of them is the token critic's, of a vector of each token
    divisor: int = 1  # 6 for a Cholesky factor, which needs as many times fewer

    @property
    def flops(self) -> int:
        """Two per multiply-add."""
        return (self.batch or 1) * (2 * self.rows * self.inner * self.columns // self.divisor)


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

    A Cholesky factor, and solving with one, count as products, too.
    """

    # Index of the first operand: `addmm(sum, a, b)` adds `mm(a, b)` to its first argument.
    OPERANDS = {
        "aten::mm": 0,
        "aten::addmm": 1,
        "aten::addmm_": 1,
        "aten::bmm": 0,
        "aten::baddbmm": 1,
        "aten::baddbmm_": 1,
    }

    def __init__(self, timers: LabelledTimers, table: Tensor | None = None):
        """Count for the phases of these timers.

        Args:
            table: vectors of tokens of the step's critic; None: it has none.
        """
        super().__init__()
        self.products: list[MatrixProduct] = []
        self._timers = timers
        self._table = None if table is None else table.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: D102
        name = func._schema.name
        first = self.OPERANDS.get(name)
        if first is not None:
            self._record(*args[first : first + 2])
        elif name == "aten::linalg_cholesky_ex":
            self._record(args[0], args[0], divisor=6)
        elif name == "aten::cholesky_solve":
            self._record(args[1], args[0])
        return func(*args, **(kwargs or {}))

    def _record(self, left: Tensor, right: Tensor, divisor: int = 1) -> None:
        rows, inner = left.shape[-2:]
        self.products.append(
            MatrixProduct(
                self._timers.current,
                left.shape[0] if left.dim() == 3 else None,
                rows,
                inner,
                right.shape[-1],
                is_double=left.dtype == torch.float64,
                reads_table=self._table in (left.untyped_storage().data_ptr(), right.untyped_storage().data_ptr()),
                divisor=divisor,
            )
        )


@dataclass(frozen=True)
class CountedPhase:
    """Sums over the matrix products of one phase."""

    linear_flops: int
    head_flops: int
    batched_flops: int  # attention, unless a fused kernel computes it
    critic_flops: int
    layer_rows: int  # positions x layers, forward
    head_rows: int  # forward


def count_phase(
    products: Sequence[MatrixProduct], phase: str, architecture: Architecture, critic_samples: int | None = None
) -> CountedPhase:
    """Sort a phase's products by their shapes.

    Products of the head have the vocabulary among their three sizes, all others belong to layers. A forward product
    multiplies [rows, H] and [H, width]: rows that enter a layer are those of the fused projection of queries, keys and
    values. Products with the token critic's vectors are its own, and so are all in float64 but those of rewards and the
    features' inner products, which the formulas do not count.

    Args:
        architecture: of one process. Rows, H, V and the fused width must differ: a product is recognised by its shape.
        critic_samples: n of a step with a token critic; None: it has none, and no product is its own.
    """
    a = architecture
    fused = (a.num_attention_heads + 2 * a.num_key_value_heads) * a.head_dim
    of_critic, of_phase = [], []
    for product in products:
        if product.phase == phase:
            if critic_samples is not None and _is_of_critic(product, critic_samples):
                of_critic.append(product)
            elif not product.is_double:
                of_phase.append(product)
    own = [product for product in of_phase if product.batch is None]
    head = [p for p in own if a.vocab_size in (p.rows, p.inner, p.columns)]
    layers = [p for p in own if a.vocab_size not in (p.rows, p.inner, p.columns)]
    return CountedPhase(
        linear_flops=sum(p.flops for p in layers),
        head_flops=sum(p.flops for p in head),
        batched_flops=sum(p.flops for p in of_phase if p.batch is not None),
        critic_flops=sum(p.flops for p in of_critic),
        layer_rows=sum(p.rows for p in layers if (p.inner, p.columns) == (a.hidden_size, fused)),
        head_rows=sum(p.rows for p in head if (p.inner, p.columns) == (a.hidden_size, a.vocab_size)),
    )


def _is_of_critic(product: MatrixProduct, samples: int) -> bool:
    is_gram = product.batch is not None and product.rows == product.columns == samples + 1
    return product.reads_table or (product.is_double and product.phase != "reward" and not is_gram)

"""What a rank has of a micro-batch's features: its layers and its slice of the hidden dimension. It never leaves it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerFeatures:
    """What a rank has of one tapped layer."""

    vectors: Tensor  # float64 [B, K, n + 1, X], pooled
    rows: Tensor | None = None  # [B, K, n + 1, T, H / ranks], normalised, which were pooled; None: pooled before

    def times(self, scale: float) -> "LayerFeatures":
        """Multiply by a number."""
        if scale == 1:
            return self
        return LayerFeatures(scale * self.vectors, None if self.rows is None else scale * self.rows)


@dataclass(frozen=True)
class OwnFeatures:
    """A rank's D' channels of the features of a micro-batch's blocks.

    Normalised, and each layer times the root of its weight: the products of all ranks add up to the Gram matrix.
    """

    vectors: Tensor  # float64 [B, K, n + 1, D'], of the rollouts, then of the target
    tokens: Tensor | None  # float64 [B, K, n + 1, G, D'], whose mean the vectors are; None: they are no means of tokens
    generate_length: int  # G

    @classmethod
    def of(
        cls,
        layers: Sequence[LayerFeatures],
        blocks: tuple[int, ...],
        generate_length: int,
        is_mean_of_tokens: bool,
        device: torch.device,
    ) -> "OwnFeatures":
        """Put the layers of this rank side by side; without any there are no channels.

        Args:
            blocks: B, K, n + 1.
        """
        none = torch.zeros((*blocks, 0), dtype=torch.float64, device=device)
        vectors = torch.cat([none, *(layer.vectors for layer in layers)], dim=-1)
        if not is_mean_of_tokens:
            return cls(vectors, None, generate_length)
        rows = [layer.rows for layer in layers if layer.rows is not None]
        none = torch.zeros((*blocks, generate_length, 0), dtype=torch.float64, device=device)
        return cls(vectors, torch.cat([none, *rows], dim=-1), generate_length)

    def to_come(self) -> Iterator[Tensor]:
        """Features still to come, F_jt of the tokens t = G - 1 down to 0: float64 [B * K, n, D'] each.

        Tokens before t have no part in them: of a mean of tokens the sum of those from t on, divided by G; of any other
        feature all of it, for each token.
        """
        if self.tokens is None:
            whole = self.vectors[:, :, :-1].flatten(0, 1)
            yield from (whole for _ in range(self.generate_length))
            return
        rollouts = self.tokens[:, :, :-1].flatten(0, 1)
        so_far = torch.zeros_like(rollouts[..., 0, :])
        for index in reversed(range(self.generate_length)):
            so_far = torch.add(so_far, rollouts[..., index, :], alpha=1 / self.generate_length)
            yield so_far

    def along_to_come(self, directions: Tensor) -> Tensor:
        """Inner products with the features still to come, as `to_come` has them: [B * K, m, D'] -> [B * K, m, n, G]."""
        if self.tokens is None:
            whole = directions @ self.vectors[:, :, :-1].flatten(0, 1).transpose(-1, -2)
            return whole[..., None].repeat(1, 1, 1, self.generate_length)
        rollouts = self.tokens[:, :, :-1].flatten(0, 1)  # [B * K, n, G, D']
        products = directions @ rollouts.flatten(1, 2).transpose(-1, -2)
        return from_each_on(products.unflatten(-1, rollouts.shape[1:3])) / self.generate_length


def from_each_on(values: Tensor) -> Tensor:
    """Of each token the sum of its value and of those of later ones: [..., G]. The same bits in every run."""
    length = values.shape[-1]
    return values @ torch.ones(length, length, dtype=values.dtype, device=values.device).tril()

"""Inner products of a micro-batch's features, before and after whitening: what rewards are made of."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ebft_mega.block_plan import BlockPlan
from ebft_mega.reward.marked_blocks import finite_blocks
from ebft_mega.reward.sampled_blocks import SampledBlocks
from ebft_mega.reward.whitening import Products, Whitening, whitened_products


@dataclass(frozen=True)
class BlockInputs:
    """Inner products of a micro-batch's features, and what was sampled."""

    plan: BlockPlan
    gram: Tensor  # float64 [B, K, n + 1, n + 1]; of a marked block that of orthonormal features
    finite: Tensor  # bool [B, K], false where a block is marked
    products: Products
    sampled: SampledBlocks | None = None  # None: for terms that declare no needs

    @classmethod
    def of(
        cls, gram: Tensor, whitening: Whitening, plan: BlockPlan, sampled: SampledBlocks | None = None
    ) -> "BlockInputs":
        """Whiten, with stand-ins for marked blocks: a decomposition raises on NaN, and for all blocks.

        Args:
            gram: float64 [B, K, n + 1, n + 1], symmetric, samples first, the target last; equal rollouts have equal
                rows (`copy_duplicate_rows`).
            whitening: of the products.
        Communication: none.
        """
        finite = finite_blocks(gram)
        stand_in = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        gram = torch.where(finite[..., None, None], gram, stand_in)
        return cls(plan, gram, finite, whitened_products(gram, whitening), sampled)

    @property
    def cfm(self) -> Tensor:
        """Squared distance of the means of rollouts and targets after whitening, float64 [B, K]; NaN where marked."""
        return self.products.squared_distance.clamp(min=0).masked_fill(~self.finite, torch.nan)

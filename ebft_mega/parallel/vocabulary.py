"""The slice of the vocabulary whose logits a tensor-parallel rank has, and the reductions over all slices."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ebft_mega.architecture.vocabulary_blocks import padded_vocabulary, vocabulary_block_width
from ebft_mega.parallel.collectives import all_gather_single
from ebft_mega.parallel.groups import ProcessGroups


@dataclass(frozen=True)
class VocabularySlice:
    """The slice of the vocabulary whose logits this tensor-parallel rank computes: whole vocabulary blocks.

    One rank has exactly the vocabulary. Of several, the last ones may have columns for tokens that do not exist:
    padding, whose logits mean nothing.
    """

    size: int  # V, true vocabulary over all ranks
    first: int  # id of the first token of this rank's slice
    width: int  # columns of this rank's logits, padding included
    group: dist.ProcessGroup  # tensor parallel

    @classmethod
    def of(cls, vocab_size: int, groups: ProcessGroups) -> "VocabularySlice":
        """Find this rank's slice of a vocabulary."""
        width = padded_vocabulary(vocab_size, groups.tensor_parallel_size) // groups.tensor_parallel_size
        return cls(vocab_size, groups.tensor_parallel_rank * width, width, groups.tensor_parallel)

    @property
    def num_ranks(self) -> int:
        """Slices of the vocabulary."""
        return dist.get_world_size(self.group)

    @property
    def num_tokens(self) -> int:
        """Columns of this rank's logits that belong to tokens; padding follows them."""
        return min(max(self.size - self.first, 0), self.width)

    @property
    def block_width(self) -> int:
        """Tokens in a vocabulary block, the same on all ranks and at all degrees."""
        return vocabulary_block_width(self.size)

    @property
    def num_blocks(self) -> int:
        """Vocabulary blocks that this rank has columns of."""
        return -(-self.width // self.block_width)

    @property
    def first_block(self) -> int:
        """Index of this rank's first block among all."""
        return self.first // self.block_width

    def own_rows(self, table: Tensor) -> Tensor:
        """This rank's rows of a table with a row for each token of the vocabulary: [width, ...], 0 for padding."""
        own = table[self.first : self.first + self.num_tokens]
        return own if len(own) == self.width else torch.cat((own, own.new_zeros(self.width - len(own), *own.shape[1:])))

    def exclude_padding_(self, logits: Tensor) -> Tensor:
        """Set the padding columns of [..., width] to minus infinity, in place."""
        logits[..., self.num_tokens :] = -torch.inf
        return logits

    def has_nan_or_minus_infinity(self, logits: Tensor) -> Tensor:
        """Tell rows with a logit that softmax or sampling may lose: bool [...] of [..., width], of this rank alone.

        One reduction: it finds NaN too. Plus infinity needs none, since it makes a NaN or an infinity of every sum of
        exponentials.

        Communication: none, and nothing waits for the device.
        """
        if not self.num_tokens:
            return torch.zeros(logits.shape[:-1], dtype=torch.bool, device=logits.device)
        return ~(logits[..., : self.num_tokens].amin(dim=-1) > -torch.inf)

    def maximum(self, values: Tensor) -> Tensor:
        """Take the element-wise maximum over the ranks.

        Communication: one all-reduce over the tensor-parallel group; none for one rank.
        """
        return self._reduce(values, dist.ReduceOp.MAX)

    def sum(self, values: Tensor) -> Tensor:
        """Add up values element-wise over the ranks.

        Communication: one all-reduce over the tensor-parallel group; none for one rank.
        """
        return self._reduce(values, dist.ReduceOp.SUM)

    def gather(self, values: Tensor) -> Tensor:
        """Stack the values of all ranks.

        Args:
            values: [...], the same shape on all ranks.
        Returns:
            [ranks, ...], by rank.
        Communication: one all-gather over the tensor-parallel group; none for one rank.
        """
        if self.num_ranks == 1:
            return values[None]
        gathered = values.new_empty(self.num_ranks * values.numel())
        all_gather_single(gathered, values.flatten(), self.group)
        return gathered.view(self.num_ranks, *values.shape)

    def _reduce(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.num_ranks == 1:
            return values
        # Reductions of logits inherit their strides, which may be those of a transposed view.
        reduced = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(reduced, operation, group=self.group)
        return reduced

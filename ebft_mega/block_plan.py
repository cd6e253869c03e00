"""Positions of anchors, rollouts and targets in a packed row: integers only, no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockPlan:
    """The block geometry of one packed row (EBFT paper, arXiv 2603.12248, strided mode).

    Block k continues the whole prefix `tokens[:anchor(k)]` by `generate_length` tokens; `context_length` is
    only the first anchor, not a window. All lengths are in tokens.
    """

    sequence_length: int  # P
    stride: int
    context_length: int
    generate_length: int  # G
    num_samples: int  # n

    def __post_init__(self) -> None:
        room = self.sequence_length - self.generate_length - self.context_length
        if room < 0:
            raise ValueError(
                f"sequence of {self.sequence_length} tokens is shorter than context {self.context_length} "
                f"+ generation {self.generate_length}"
            )
        if room % self.stride:
            raise ValueError(
                f"(sequence {self.sequence_length} - generation {self.generate_length} - context "
                f"{self.context_length}) = {room} is not divisible by the stride {self.stride}"
            )

    @property
    def num_blocks(self) -> int:
        """K, blocks in a row."""
        return (self.sequence_length - self.generate_length - self.context_length) // self.stride + 1

    @property
    def anchors(self) -> tuple[int, ...]:
        """Index of the first token that each block generates, length K."""
        return tuple(self.context_length + k * self.stride for k in range(self.num_blocks))

    @property
    def rollouts_per_row(self) -> int:
        """K * n: generated sequences per row; block-major, so the rollouts of one anchor are neighbours."""
        return self.num_blocks * self.num_samples

    @property
    def generated_per_row(self) -> int:
        """n * K * G: tokens generated for one row."""
        return self.rollouts_per_row * self.generate_length

    def document_length(self, with_targets: bool) -> int:
        """Positions of a row's own tokens in the policy's pass.

        Args:
            with_targets: the pass also predicts the row's tokens: P - 1, as the last one predicts nothing. Otherwise it
                ends at the last anchor.
        """
        return self.sequence_length - 1 if with_targets else self.anchors[-1]

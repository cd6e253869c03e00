"""How a parameter is spread over the ranks of a replica, and which rank adds it to norms and checksums."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ParameterRole:
    """How a stage's parameter relates to those of the other tensor- and pipeline-parallel ranks.

    A parameter that is neither sharded nor partial is whole on every tensor-parallel rank, with the same gradient.
    """

    sharded: bool = False  # every tensor-parallel rank holds another slice
    partial_gradient: bool = False  # whole on every tensor-parallel rank, but each has only its share of the gradient
    tied: bool = False  # the first and the last stage both hold it; the gradient is the sum of both
    copy: bool = False  # the last stage's copy of a tied parameter, which the first stage owns

    def is_counted(self, tensor_parallel_rank: int) -> bool:
        """Whether this rank's part belongs in sums over the replica (norms, checksums), which count everything once."""
        return not self.copy and (self.sharded or tensor_parallel_rank == 0)

"""A frozen stage with parameters partitioned over the data-parallel ranks (`zero.feature_network: sharded`)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic

import torch

from ebft_mega.parallel.deepspeed_adapter.deepspeed_setup import frozen_config
from ebft_mega.parallel.deepspeed_adapter.partitioned_parameters import gather, partitioned_module, release
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.parallel.stage_module import Loader, StageRunner, StageT, runner


class ShardedStage(Generic[StageT]):
    """A frozen stage whose parameters are partitioned over the data-parallel group; no optimizer, no hooks."""

    module: StageT

    def __init__(
        self, build_stage: Callable[[], StageT], load: Loader[StageT], dtype: torch.dtype, groups: ProcessGroups
    ) -> None:
        """Build a partitioned stage and fill it; arguments as in `make_engine`.

        Args:
            dtype: of the parameters. A stage may have none: a pipeline can be longer than a feature network is deep.
        """
        config = frozen_config(dtype)
        self.module = partitioned_module(build_stage, load, config, groups).requires_grad_(False).eval()

    @contextmanager
    def whole_parameters(self) -> Iterator[StageRunner]:
        """Context that gives a function to run on the stage with whole parameters, without recording gradients.

        Communication: one gather of all parameters over the data-parallel group.
        """
        gathered = gather(self.module.parameters())
        try:
            yield runner(self.module)
        finally:
            release(gathered)

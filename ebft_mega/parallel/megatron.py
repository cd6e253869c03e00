"""The megatron-core names this package is built on, imported without their start-up warnings.

Importing megatron-core without Transformer Engine and Apex prints ten warnings about fallbacks that are wanted here;
on every rank they would hide the ones that matter.
"""

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=r".*Apex (is|are) not installed.*")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayer

__all__ = [
    "ColumnParallelLinear",
    "ProcessGroupCollection",
    "TransformerConfig",
    "TransformerLayer",
    "VocabParallelEmbedding",
    "get_gpt_layer_local_spec",
]

"""The megatron-core names this package is built on, imported without their start-up warnings.

Importing megatron-core without Transformer Engine and Apex prints ten warnings about fallbacks that are wanted here;
on every rank they would hide the ones that matter.
"""

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=r".*Apex (is|are) not installed.*")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import (
        VocabParallelEmbedding,
        gather_from_sequence_parallel_region,
    )
    from megatron.core.transformer.attention import SelfAttention
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

__all__ = [
    "ProcessGroupCollection",
    "SelfAttention",
    "TransformerConfig",
    "TransformerLayer",
    "TransformerLayerSubmodules",
    "VocabParallelEmbedding",
    "gather_from_sequence_parallel_region",
    "get_gpt_layer_local_spec",
]


def make_gather_buffer() -> None:
    """Make the buffer in which sequence-parallel linear layers gather their input.

    It is the only part of megatron-core's global state that the layers need; its own start-up makes it together with
    process groups of its own.
    """
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()

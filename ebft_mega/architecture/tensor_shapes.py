"""Names and shapes of a model's tensors in Hugging Face's form. No torch."""

from ebft_mega.architecture.hf_config import Architecture

EMBEDDING_NAME = "model.embed_tokens.weight"
HEAD_NAME = "lm_head.weight"


def hf_shapes(architecture: Architecture, num_layers: int | None = None) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the model under its Hugging Face name, in the order in which `hf_tensors` yields them.

    Args:
        num_layers: only the embedding and this many layers (a feature network); None: the whole model.
    """
    a = architecture
    query, key_value = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING_NAME: (a.vocab_size, a.hidden_size)}
    for layer in range(a.num_hidden_layers if num_layers is None else num_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (a.hidden_size,)
        shapes[prefix + "self_attn.o_proj.weight"] = (a.hidden_size, query)
        projections = {"q": query, "k": key_value, "v": key_value}
        shapes |= {f"{prefix}self_attn.{kind}_proj.weight": (rows, a.hidden_size) for kind, rows in projections.items()}
        if a.qkv_bias:
            shapes |= {f"{prefix}self_attn.{kind}_proj.bias": (rows,) for kind, rows in projections.items()}
        if a.qk_norm:
            shapes |= {f"{prefix}self_attn.{kind}_norm.weight": (a.head_dim,) for kind in "qk"}
        shapes[prefix + "post_attention_layernorm.weight"] = (a.hidden_size,)
        shapes[prefix + "mlp.gate_proj.weight"] = (a.intermediate_size, a.hidden_size)
        shapes[prefix + "mlp.up_proj.weight"] = (a.intermediate_size, a.hidden_size)
        shapes[prefix + "mlp.down_proj.weight"] = (a.hidden_size, a.intermediate_size)
    if num_layers is None or num_layers == a.num_hidden_layers:
        shapes["model.norm.weight"] = (a.hidden_size,)
    if num_layers is None and not a.tie_word_embeddings:
        shapes[HEAD_NAME] = (a.vocab_size, a.hidden_size)
    return shapes

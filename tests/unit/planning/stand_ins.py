"""Model directories with the true sizes of published models and no weights: headers over sparse files."""

import json
import struct
from pathlib import Path

BFLOAT16_BYTES = 2
TENSORS_PER_FILE = 90

QWEN = {"model_type": "qwen2", "max_position_embeddings": 131072, "tie_word_embeddings": False, "rms_norm_eps": 1e-6}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# The fields of the published `config.json` files, and how many parameters their model cards give.
MODELS = {
    "Qwen2.5-7B": QWEN
    | {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "Qwen2.5-32B": QWEN
    | {
        "vocab_size": 152064,
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
    },
    "Llama-3.1-8B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "rope_scaling": LLAMA3_ROPE,
    },
}
PARAMETERS = {"Qwen2.5-7B": 7_615_616_512, "Qwen2.5-32B": 32_763_876_352, "Llama-3.1-8B": 8_030_261_248}


def tensor_shapes(fields: dict) -> dict[str, list[int]]:
    """Names and shapes of a published model's tensors."""
    hidden, inner, heads = fields["hidden_size"], fields["intermediate_size"], fields["num_attention_heads"]
    dim = hidden // heads
    keys = fields["num_key_value_heads"] * dim
    shapes = {"model.embed_tokens.weight": [fields["vocab_size"], hidden]}
    for index in range(fields["num_hidden_layers"]):
        layer = {
            "self_attn.q_proj.weight": [heads * dim, hidden],
            "self_attn.k_proj.weight": [keys, hidden],
            "self_attn.v_proj.weight": [keys, hidden],
            "self_attn.o_proj.weight": [hidden, heads * dim],
            "mlp.gate_proj.weight": [inner, hidden],
            "mlp.up_proj.weight": [inner, hidden],
            "mlp.down_proj.weight": [hidden, inner],
            "input_layernorm.weight": [hidden],
            "post_attention_layernorm.weight": [hidden],
        }
        if fields["model_type"] == "qwen2":
            layer |= {"self_attn.q_proj.bias": [heads * dim]}
            layer |= {"self_attn.k_proj.bias": [keys], "self_attn.v_proj.bias": [keys]}
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": [hidden], "lm_head.weight": [fields["vocab_size"], hidden]}


def write_model(directory: Path, fields: dict) -> None:
    """A sharded model directory whose files have true headers and lengths, and holes for weights."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    shapes = list(tensor_shapes(fields).items())
    groups = [shapes[first : first + TENSORS_PER_FILE] for first in range(0, len(shapes), TENSORS_PER_FILE)]
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        weight_map |= {tensor: name for tensor, _ in group}
        header, end = {}, 0
        for tensor, shape in group:
            begin, end = end, end + BFLOAT16_BYTES * count(shape)
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        with (directory / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def count(shape: list[int]) -> int:
    """Elements of a tensor."""
    product = 1
    for size in shape:
        product *= size
    return product

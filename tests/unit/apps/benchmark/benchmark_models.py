"""Small models and cases for tests of the benchmark."""

from ebft_mega.apps.benchmark.case import MODELS, BenchCase, BenchModel

TINY_SIZES = {
    **MODELS["toy"].sizes,
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
# No two of rows, H, V, I and the fused width are equal, so that the shape of a product tells what it is.
TINY_MODEL = BenchModel(TINY_SIZES, "float32")
TINY_CASES = {
    "stride=G": BenchCase("", 28, samples=3, stride=4, context_length=4, generate_length=4, runs=1),
    "stride<G": BenchCase("", 23, samples=2, stride=2, context_length=3, generate_length=4, runs=1),
    "stride>G": BenchCase("", 30, samples=4, stride=8, context_length=2, generate_length=4, runs=1),
}

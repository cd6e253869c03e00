"""Whether tokens are those of a model and of other data: the same checks for training, held-out and evaluated data.

No torch. Tokenizers and end-of-document tokens of models are compared in `model_data`.
"""

from collections.abc import Iterator

from ebft_mega.data.store.format import Manifest
from ebft_mega.errors import Problem


def vocabulary_problems(
    where: str, key: str, manifest: Manifest, vocab_size: int, model: str = "the model"
) -> Iterator[Problem]:
    """Report token ids beyond a model's vocabulary.

    Args:
        where: place of the key or option that names the dataset.
        key: that key or option.
        manifest: of the dataset.
        vocab_size: of the model that reads it.
        model: its name, for the message.
    """
    if manifest.vocab_size > vocab_size:
        found = f"a vocabulary of {manifest.vocab_size} tokens (largest token id in it: {manifest.max_token_id})"
        yield Problem(where, key, found, f"no token id outside {model}'s vocabulary of {vocab_size}")


def held_out_problems(
    where: str, key: str, held_out: Manifest, training_key: str, training: Manifest
) -> Iterator[Problem]:
    """Report held-out data whose tokens are not those of the training data: its figures would say nothing.

    Args:
        where: place of the key that names the held-out data.
        key: that key.
        held_out: manifest of the held-out data.
        training_key: key of a training source.
        training: its manifest; the sources of a mixture agree with each other.
    """
    if held_out.tokenizer_sha256 != training.tokenizer_sha256:
        found = f"tokens of a tokenizer with sha256 {held_out.tokenizer_sha256}"
        yield Problem(where, key, found, f"the tokenizer of {training_key}, sha256 {training.tokenizer_sha256}")
    elif held_out.eos_id != training.eos_id:
        found = f"documents that end with token {held_out.eos_id}"
        yield Problem(where, key, found, f"token {training.eos_id}, which ends the documents of {training_key}")
    elif held_out.vocab_size != training.vocab_size:
        found = f"a vocabulary of {held_out.vocab_size} tokens"
        yield Problem(where, key, found, f"{training.vocab_size} tokens, as {training_key} has")

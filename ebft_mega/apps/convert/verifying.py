"""Compare the logits of this package's model with those of transformers on a text."""

import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.partition import StageShape
from ebft_mega.architecture.tensor_shapes import hf_shapes
from ebft_mega.architecture.vocabulary_blocks import HEAD_ROWS
from ebft_mega.checkpoint.initial_model import open_weights
from ebft_mega.checkpoint.model_folder import is_checkpoint
from ebft_mega.data.tokenizers.tokenizer import load_tokenizer, tokenizer_sha256
from ebft_mega.errors import InputError, InputProblems, Problem
from ebft_mega.io.input_errors import bad_input
from ebft_mega.model.stage import Stage
from ebft_mega.model.strided_attention import StridedLayout
from ebft_mega.model.weights.model_directory import CONFIG_NAME
from ebft_mega.model.weights.stage_weights import load_weights
from ebft_mega.model.weights.weight_files import INDEX_NAME
from ebft_mega.model.weights.weight_sources import RoundedWeights, SafetensorsWeights
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.planning.model_files import CheckedModel, check_model
from ebft_mega.shown_text import LONGEST_NOTE, shown


@dataclass(frozen=True)
class Comparison:
    """Differences between the logits of two models, in float32."""

    positions: int  # tokens of the text that were read
    vocab_size: int
    max_difference: float  # largest absolute difference of two logits
    largest_logit: float  # of the reference, absolute
    notes: tuple[str, ...] = ()  # on the model directories, in sentences

    def __str__(self) -> str:
        return "".join(f"note: {shown(note, LONGEST_NOTE)}\n" for note in self.notes) + (
            f"max absolute difference {self.max_difference:.3e}; largest logit {self.largest_logit:.3e}; "
            f"{self.positions} positions of {self.vocab_size} logits, float32"
        )


def compare_logits(
    model: Path, reference: Path | None, text: Path, max_positions: int, groups: ProcessGroups
) -> Comparison:
    """Compare this package's model with transformers' on the first tokens of a text, in one process.

    A tensor that the two store in different dtypes is rounded to the coarser one on the other side, too: a checkpoint's
    float32 weights are compared with an export in bfloat16 as that export holds them.

    Args:
        model: a Hugging Face directory or a checkpoint folder, whose logits are computed here.
        reference: the Hugging Face directory that transformers loads; None: `model`.
        text: a UTF-8 file.
        max_positions: most tokens to read; the context of the models is a limit, too.
        groups: of a job of one process.
    Raises:
        InputError: files are missing or do not fit together, all problems at once.
    Memory: one of the two models at a time, in float32, and the logits of all positions.
    """
    if is_checkpoint(model) and reference is None:
        wanted = "a Hugging Face directory: tools/convert_hf.py export makes one of the checkpoint"
        raise bad_input("--reference", str(model), "not given, for a checkpoint", wanted)
    reference = reference or model
    problems: list[Problem] = []
    checked: list[CheckedModel] = []
    for directory in dict.fromkeys((model, reference)):
        try:
            checked.append(check_model(directory))
        except InputProblems as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    architectures = [found.architecture for found in checked]
    own, other = architectures[0], architectures[-1]
    if own.vocab_size != other.vocab_size:
        wanted = f"{own.vocab_size}, as {model} has: --reference is another version of the same model"
        raise bad_input(str(reference), "vocab_size", other.vocab_size, wanted)
    weights = open_weights(model, own)
    compared = SafetensorsWeights(reference, other)
    dtypes = dict.fromkeys(hf_shapes(own), torch.float32)  # as a checkpoint has them
    dtypes |= weights.dtypes if isinstance(weights, SafetensorsWeights) else {}
    ours, theirs = _coarser(compared.dtypes, dtypes), _coarser(dtypes, compared.dtypes)
    tokens = _tokens(text, model if tokenizer_sha256(model) else reference, architectures, max_positions)
    expected = _reference_logits(reference, compared.digest_names(), tokens, theirs)
    stage = Stage(own, StageShape.whole(own), groups, torch.float32)
    load_weights(stage, RoundedWeights(weights, ours))
    notes = dict.fromkeys(note for found in checked for note in found.notes)
    notes |= dict.fromkeys([*_rounding_notes(ours, model, reference), *_rounding_notes(theirs, reference, model)])
    return _compare(stage.requires_grad_(False).eval(), tokens, expected, tuple(notes))


def _coarser(dtypes: Mapping[str, torch.dtype], than: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
    """Of the tensors that both have, those of fewer bits than the other's, with their dtype."""
    bits = torch.finfo
    return {name: kind for name, kind in dtypes.items() if name in than and bits(kind).bits < bits(than[name]).bits}


def _rounding_notes(rounded: Mapping[str, torch.dtype], directory: Path, other: Path) -> list[str]:
    """Say which weights were rounded, so that a difference is one of the computation and not of the files' dtypes."""
    return [
        f"{count} tensors of {directory} are rounded to {str(kind).removeprefix('torch.')} before they are compared, "
        f"as {other} has them"
        for kind, count in Counter(rounded.values()).items()
    ]


def _tokens(text: Path, tokenizer: Path, architectures: list[Architecture], max_positions: int) -> Tensor:
    """The first tokens of a text, int64 [1, S]."""
    try:
        ids = load_tokenizer(tokenizer).encode(text.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise bad_input("--text", str(text), error, "a UTF-8 text file") from None
    # transformers masks positions beyond a sliding window, the layers of this package do not.
    limits = [limit for a in architectures for limit in (a.max_position_embeddings, a.sliding_window) if limit]
    ids = ids[: min(max_positions, *limits)]
    if not ids or max(ids) >= architectures[0].vocab_size:
        found = f"token {max(ids)}" if ids else "no tokens"
        raise bad_input("--text", str(text), found, f"tokens below {architectures[0].vocab_size}")
    return torch.tensor(ids)[None]


def _reference_logits(reference: Path, files: list[str], tokens: Tensor, rounded: Mapping[str, torch.dtype]) -> Tensor:
    """Compute logits float32 [S, V] with transformers, some tensors rounded to another dtype.

    It loads from a temporary directory with links to the configuration and the safetensors files only, so that it
    cannot find a pickle, an adapter or code.
    """
    with tempfile.TemporaryDirectory() as shown:
        for name in (CONFIG_NAME, INDEX_NAME, *files):
            if (reference / name).is_file():
                (Path(shown) / name).symlink_to((reference / name).resolve())
        model: Any = AutoModelForCausalLM.from_pretrained(
            shown,
            dtype=torch.float32,
            attn_implementation="sdpa",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in rounded:
                    parameter.copy_(parameter.to(rounded[name]))
            logits: Tensor = model.eval()(tokens, use_cache=False).logits[0]
    return logits


@torch.no_grad()
def _compare(stage: Stage, tokens: Tensor, expected: Tensor, notes: tuple[str, ...]) -> Comparison:
    length = tokens.shape[1]
    device = stage.groups.device
    stage.to(device)
    layout = StridedLayout(1, (), length, (), 0, stage.attention)
    hidden = stage.hidden_states(tokens.to(device), torch.arange(length, device=device), layout)[:, 0]
    differences = [
        (stage.logits(rows) - wanted.to(device)).abs().max()
        for rows, wanted in zip(hidden.split(HEAD_ROWS), expected.split(HEAD_ROWS), strict=True)
    ]
    return Comparison(
        positions=length,
        vocab_size=expected.shape[1],
        max_difference=float(torch.stack(differences).max()),
        largest_logit=float(expected.abs().max()),
        notes=notes,
    )

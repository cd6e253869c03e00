"""config.json, tokenizer and generation settings of a checkpoint, which make it a model directory for other runs."""

import json
from pathlib import Path

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.config.load import resolved_yaml
from ebft_mega.config.schema import RunConfig
from ebft_mega.data.text.tokenizer import tokenizer_files
from ebft_mega.model.weights.model_directory import CONFIG_NAME, GENERATION_CONFIG_NAME
from ebft_mega.runtime.run_files import ENVIRONMENT_NAME, RESOLVED_CONFIG_NAME, describe_environment


def describing_files(config: RunConfig, architecture: Architecture, tokenizer_directory: Path) -> dict[str, bytes]:
    """Contents by file name: configuration, environment, architecture, tokenizer and how to generate.

    Args:
        tokenizer_directory: of the training data.
    """
    files = {path.name: path.read_bytes() for path in tokenizer_files(tokenizer_directory)}
    generation = generation_config(config)
    if generation is not None:
        files[GENERATION_CONFIG_NAME] = generation.read_bytes()
    files[CONFIG_NAME] = _as_json(architecture.exported_config("float32"))
    files[ENVIRONMENT_NAME] = _as_json(describe_environment())
    files[RESOLVED_CONFIG_NAME] = resolved_yaml(config).encode()
    return files


def generation_config(config: RunConfig) -> Path | None:
    """The initial model's `generation_config.json`, if it has one."""
    if config.model.init_from is None:
        return None
    path = config.model.init_from / GENERATION_CONFIG_NAME
    return path if path.is_file() else None


def _as_json(content: object) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()

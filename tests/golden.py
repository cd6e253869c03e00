"""The golden curve: the first steps of the quickstart's settings on made-up rows, as `golden_curve.json` has them.

    OMP_NUM_THREADS=1 python -m tests.golden

writes the file anew (`make golden`); do so only with a change that is meant to change results, and say which. The
quickstart's own corpus is the running Python's standard library, and its warm start takes minutes: here the tokens are
a function of their position, the weights are random ones of the quickstart's model, and a step has `ROWS` rows of
`LENGTH` tokens.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
import yaml

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.config.entries import learning_rates
from ebft_mega.config.load import load_config
from ebft_mega.lifecycle.build import build_trainer
from ebft_mega.parallel.groups import ProcessGroups, connect, make_process_groups
from ebft_mega.train.step import train_step
from ebft_mega.train.step_metrics import step_metrics
from ebft_mega.train.trainer import Trainer
from ebft_mega.types import TokenBatch

CURVE = Path(__file__).with_name("golden_curve.json")
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
STEPS, ROWS, LENGTH = 20, 2, 64
KEYS = (
    *("train/loss", "train/grad_norm", "ebft/rl_loss", "ebft/ce_loss", "ebft/cfm_loss"),
    *("ebft/alignment", "ebft/diversity", "ebft/mean_reward"),
)


def rows_of(step: int, vocab_size: int) -> TokenBatch:
    """The rows of a step: each token follows from the one before it in one of three ways, which a hash chooses."""
    rows = []
    for row in range(ROWS):
        draws = hashlib.shake_256(f"golden {step} {row}".encode()).digest(LENGTH)
        tokens = [draws[0]]
        for draw in draws[1:]:
            tokens.append((5 * tokens[-1] + 7 * (draw % 3) + 1) % vocab_size)
        rows.append(tokens)
    tokens = torch.tensor(rows)
    return TokenBatch(tokens, torch.zeros_like(tokens), torch.arange(ROWS))


def make_trainer(groups: ProcessGroups) -> Trainer:
    """A trainer of the quickstart's settings, by itself."""
    model = yaml.safe_load((CONFIGS / "quickstart_warmstart.yaml").read_text(encoding="utf-8"))["model"]["config"]
    changes = (
        *("model.init_from=null", f"model.config={json.dumps(model)}", "data.shards=unused", "evaluation.shards=null"),
        *(f"data.sequence_length={LENGTH}", f"train.global_batch_size={ROWS}", f"train.micro_batch_size={ROWS}"),
    )
    config = load_config(CONFIGS / "quickstart.yaml", changes)
    architecture = Architecture.from_hf(model, "golden curve")
    return build_trainer(config, architecture, architecture, groups)


def curve(trainer: Trainer, steps: int = STEPS) -> dict[str, list[float]]:
    """Losses, reward terms and gradient norms of the first steps, by metric key."""
    rates, found = learning_rates(trainer.config), {key: [] for key in KEYS}
    for step in range(steps):
        rate = rates.at(step)
        rows = rows_of(step, trainer.stage.architecture.vocab_size)
        metrics = step_metrics(trainer, train_step(trainer, rows, step, rate), rate)
        for key in KEYS:
            found[key].append(metrics[key])
    return found


def main() -> None:
    """Write the curve anew."""
    torch.set_num_threads(1)
    CURVE.write_text(json.dumps(curve(make_trainer(make_process_groups(connect()))), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {CURVE}")


if __name__ == "__main__":
    sys.exit(main())

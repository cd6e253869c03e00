"""`results.json` of an experiment: what its report is made from. No torch."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ebft_mega.apps.experiment.trials import Choice, ExperimentResults, TrialResult
from ebft_mega.io.durable import write_json

RESULTS_NAME = "results.json"


def write_results(output: Path, results: ExperimentResults) -> Path:
    """Write `results.json`; its paths start in the experiment's directory.

    Args:
        output: directory of the experiment.
    """
    content = {
        "chosen": {arm: _choice(choice) for arm, choice in results.chosen.items()},
        "trials": [_trial(output, each) for each in results.trials],
        "facts": results.facts,
    }
    path = output / RESULTS_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
    return path


def _choice(choice: Choice) -> list[list[object]]:
    return [[key, value] for key, value in choice]


def _trial(output: Path, result: TrialResult) -> dict[str, Any]:
    def place(path: Path | None) -> str | None:
        return None if path is None else str(path.relative_to(output))

    return {
        "arm": result.trial.arm,
        "choice": _choice(result.trial.choice),
        "seed": result.trial.seed,
        "purpose": result.trial.purpose,
        "run": place(result.run),
        "tuning": place(result.tuning),
        "report": place(result.report),
        "cost": None if result.cost is None else asdict(result.cost),
    }

"""A small experiment whose commands leave what a run and an evaluation would, within milliseconds."""

import json
import shlex
import shutil

import yaml

from ebft_mega.apps.experiment.running.program import ExperimentOptions, run_experiment
from ebft_mega.runtime.run_files import MODEL_FOLDER, STATUS_NAME
from tests.unit.apps.experiment.written_experiment import TEMPERATURES, Truth, write_evaluation
from tests.unit.conftest import write_dataset, write_tokenizer

# Lengths of documents; each split's own, so that no two are alike.
SPLITS = {"train": [40, 41, 42, 43], "tuning": [50, 51], "report": [60, 61]}
CONFIG = {
    "output_dir": "unset",
    "model": {
        "config": {
            "model_type": "llama",
            "vocab_size": 90,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        }
    },
    "data": {"shards": "unset", "sequence_length": 32},
    "ebft": {"stride": 4, "context_length": 4, "generate_max_len": 4},
    "train": {"global_batch_size": 4, "max_steps": 3, "dtype": "float32"},
}


class SmallExperiment:
    """Its file, its commands and what became of them.

    Args:
        folder: for everything.
    """

    def __init__(self, folder):
        self.folder = folder
        self.started = []  # names of what ran, in order
        self.fails = set()  # directories (their ends) of commands that fail
        self.sleeps = set()  # of commands that take a minute
        write_tokenizer(folder / "tokenizer", '{"model": {}}')
        for split, lengths in SPLITS.items():
            self.write_split(split, lengths)
        write_evaluation(folder / "templates", Truth(), 0)
        (folder / "base.yaml").write_text(yaml.safe_dump(CONFIG))
        self.spec = {
            "question": "Does it run?",
            "output_dir": str(folder / "experiments" / "one"),
            "config": str(folder / "base.yaml"),
            "splits": {split: str(folder / "data" / split) for split in SPLITS},
            "start": "warm",
            "arms": {
                "warm": {"seeds": [5], "set": {"ebft.rl_coef": 0.0, "ebft.ce_coef": 1.0}},
                "ce": {"like": "warm", "tune": {"train.lr": [0.001, 0.002]}},
                "ebft": {"like": "ce", "set": {"ebft.rl_coef": 1.0}},
            },
            "seeds": [0, 1],
            "evaluation": {"temperatures": list(TEMPERATURES), "rows": 24},
            "tuning": {"rows": 24},
            "primary": [{"arm": "ebft", "against": "ce"}],
        }

    def write_split(self, split, lengths):
        place = self.folder / "data" / split
        if place.exists():
            shutil.rmtree(place)
        write_dataset(place, self.folder / "tokenizer", lengths)

    @property
    def output(self):
        return self.folder / "experiments" / "one"

    def run(self, **options):
        """Run it as the tool does, but for the report, whose plots take their time, unless that is asked for."""
        path = self.folder / "spec.yaml"
        path.write_text(yaml.safe_dump(self.spec, sort_keys=False))
        self.started = []
        run_experiment(ExperimentOptions(path, jobs=2, **{"until": "evaluate"} | options), self)

    def train(self, setup, config, overrides):
        values = dict(text.split("=", 1) for text in overrides)
        output = shlex.quote(values["output_dir"])
        name = str(values["output_dir"]).removeprefix(f"{self.output}/runs/")
        status = json.dumps({"state": "done", "exit_code": 0, "checkpoint": None, "step": 3})
        script = f"mkdir -p {output}/{MODEL_FOLDER}; echo {shlex.quote(status)} > {output}/{STATUS_NAME}"
        return self._command(f"train {name}", script)

    def evaluate(self, setup, split, models, features):
        template = shlex.quote(str(self.folder / "templates" / "evaluation.json"))
        names = [
            str(path).removeprefix(f"{self.output}/runs/").removesuffix(f"/{MODEL_FOLDER}") for path in models.values()
        ]
        places = [f'mkdir -p "$2/{each}" && cp {template} "$2/{each}/evaluation.json"' for each in models]
        return self._command(f"evaluate {' and '.join(names)} on {split}", " && ".join(places))

    def _command(self, name, script):
        self.started.append(name)
        if any(name.endswith(each) for each in self.sleeps):
            script = "sleep 60"
        if any(name.endswith(each) for each in self.fails):
            script = "echo a first line; echo this is why; exit 7"
        return ["sh", "-c", script, "sh"]

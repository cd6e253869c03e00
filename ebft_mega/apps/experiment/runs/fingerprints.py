"""Name what runs are made from: the code, datasets, models. No torch."""

import hashlib
from functools import cache
from pathlib import Path

from ebft_mega.apps.experiment.running.phases import source_fingerprint
from ebft_mega.config.schema import RunConfig
from ebft_mega.data.store.checks import read_manifest
from ebft_mega.data.store.format import MANIFEST_NAME
from ebft_mega.io.expanded_paths import REPOSITORY
from ebft_mega.lifecycle.run_record import weights_fingerprint

# What an evaluation runs beside all rooms below `apps`.
_EVALUATION_CODE = ("ebft_mega/apps/*evaluat*", "ebft_mega/apps/feature_choice.py", "tools/evaluate.py")


@cache
def training_code() -> str:
    """sha256 of the sources that a training run can depend on: the launcher, and the package without `apps`."""
    package = REPOSITORY / "ebft_mega"
    rooms = sorted(path for path in package.iterdir() if path.name not in ("apps", "__pycache__"))
    return source_fingerprint([*rooms, REPOSITORY / "launcher"])


@cache
def evaluation_code() -> str:
    """sha256 of the sources that an evaluation can depend on."""
    own = source_fingerprint(path for pattern in _EVALUATION_CODE for path in sorted(REPOSITORY.glob(pattern)))
    return hashlib.sha256(f"{training_code()} {own}".encode()).hexdigest()


def data_fingerprint(place: Path | str) -> str | None:
    """Fingerprint of a dataset's contents; None where there is no dataset on this machine (yet).

    Raises:
        InputError: there is one, and its manifest is damaged.
    """
    try:
        found = (Path(place) / MANIFEST_NAME).stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return _of_manifest(Path(place), found.st_mtime_ns, found.st_size, found.st_ino)


@cache
def _of_manifest(place: Path, *state: int) -> str:
    """Read the fingerprint of a manifest, once for each state of the file."""
    return str(read_manifest(place).fingerprint)


def training_data(config: RunConfig) -> dict[str, str | None]:
    """The fingerprint of every source that a run trains on, or its address where it lies elsewhere."""
    found = {}
    for name, source in config.data.named_sources.items():
        is_address = isinstance(source.shards, str)
        found[name] = str(source.shards) if is_address else data_fingerprint(source.shards)
    return found


def model_fingerprint(directory: Path) -> str | None:
    """Fingerprint of a model's weights; None where there is none (yet).

    Raises:
        InputError: there is one, and it is damaged.
    """
    return weights_fingerprint(directory) if (directory / "config.json").is_file() else None

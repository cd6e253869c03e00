"""A store that a plugin brings: its addresses are read, checked and opened again in other processes."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ebft_mega.config.load import load_config
from ebft_mega.data.store.dataset import Dataset
from ebft_mega.errors import ConfigError, InputError
from ebft_mega.registry.kinds import STORES
from tests.unit.data.store.places.conftest import read_all

ROOT = Path(__file__).resolve().parents[5]
PLUGIN = '''
from pathlib import Path

from ebft_mega.errors import DamagedDataError
from ebft_mega.extension.options import Section, key
from ebft_mega.extension.store import Store, StoreClient


class Shelf(Store):
    """Folders of one disk."""

    class Options(Section):
        root: str = key("/", "Folder that holds them.")

    name = "shelf"

    @classmethod
    def address_problem(cls, address):
        return None if address[8:].replace("/", "").isalnum() else "no folder"

    def client(self, transfer):
        return ShelfClient(Path(self.options.root))


class ShelfClient(StoreClient):
    def __init__(self, root):
        self.root = root
        self.opener = lambda path: path.read_bytes()  # cannot be pickled, and need not be

    def path(self, url):
        return self.root / url.removeprefix("shelf://")

    def size(self, url):
        return self.path(url).stat().st_size

    def chunks(self, url, start, stop, total_bytes):
        content = self.opener(self.path(url))
        if len(content) != total_bytes:
            raise DamagedDataError(url, start, f"{total_bytes} bytes", f"{len(content)} bytes")
        yield content[start:stop]

    def small_file(self, url, limit_bytes, absent_if_forbidden=False):
        return self.opener(self.path(url)) if self.path(url).is_file() else None
'''
CONFIG = """
plugins: [shelf.py]
options: {shelf: {root: ROOT}}
output_dir: out
model: {init_from: nothing}
data: {shards: "PLACE", sequence_length: 128}
train: {max_steps: 1}
"""


@pytest.fixture
def configuration(tmp_path: Path, dataset_directory: Path) -> Iterator[Callable[[str], Path]]:
    (tmp_path / "shelf.py").write_text(PLUGIN)

    def write(place: str) -> Path:
        text = CONFIG.replace("ROOT", str(dataset_directory.parent)).replace("PLACE", place)
        (tmp_path / "c.yaml").write_text(text)
        return tmp_path / "c.yaml"

    yield write
    STORES.added.clear()


def test_a_plugin_s_store_is_one_like_the_package_s_own(
    configuration: Callable[[str], Path],
    opened: Callable[..., Dataset],
    dataset: Dataset,
    dataset_directory: Path,
    tmp_path: Path,
) -> None:
    config = load_config(configuration(f"shelf://{dataset_directory.name}"))
    place = config.data.shards
    assert place == f"shelf://{dataset_directory.name}"
    remote = opened(place, 0, **config.options)
    assert read_all(remote) == read_all(dataset)
    (tmp_path / "remote").write_bytes(pickle.dumps(remote))
    code = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb')).tokens(3).tolist())"
    command = [sys.executable, "-c", code, str(tmp_path / "remote")]
    answer = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert answer.stdout.strip() == str(dataset.tokens(3).tolist())


def test_what_it_does_not_read_is_refused_with_its_scheme_among_the_others(
    configuration: Callable[[str], Path],
) -> None:
    for place in ("shelf://a.b", "shelf:a", "shelves://a"):
        with pytest.raises(ConfigError) as caught:
            load_config(configuration(place))
        assert "data.shards" in str(caught.value) and "s3:// or shelf://" in str(caught.value)


def test_its_own_reason_against_an_address_is_shown(configuration: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"data.shards: found 'shelf://a\.b': no folder; expected"):
        load_config(configuration("shelf://a.b"))


def test_an_unforeseen_error_of_it_is_one_of_the_place(
    configuration: Callable[[str], Path], opened: Callable[..., Dataset], dataset_directory: Path, tmp_path: Path
) -> None:
    path = configuration(f"shelf://{dataset_directory.name}")
    plugin = tmp_path / "shelf.py"
    plugin.write_text(PLUGIN.replace("return self.path(url).stat().st_size", "return {}[url]"))
    line = 1 + plugin.read_text().splitlines().index("        return {}[url]")
    config = load_config(path)
    with pytest.raises(InputError, match=rf"KeyError of the store shelf \({plugin}:\d+, line {line}\)"):
        opened(config.data.shards, 0, **config.options)

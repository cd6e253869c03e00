"""DeepSpeed is imported, and names of its internals are used, in `parallel/deepspeed_adapter/` alone."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
ADAPTER = ROOT / "ebft_mega/parallel/deepspeed_adapter"
# Attributes that DeepSpeed gives to parameters and keeps in its optimizers: `ds_shape`, `_hp_mapping`, `fp16_groups`.
INTERNAL = re.compile(
    r"_*(ds_[a-z0-9_]+|[hl]p_(mapping|fragment_address|grad_fragment)|index_in_param_group"
    r"|(bf16|fp16|bit16|fp32)_(partitioned_)?groups(_[a-z]+)*|single_partition_of_fp32_groups|averaged_gradients"
    r"|grad_partitions_flat_buffer|clear_backward_seen_flag|safe_[gs]et_[a-z0-9_]+)"
)


def deepspeed_names(source):
    """Line and name of each import of DeepSpeed and of each name of its internals, also in a string of its own."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "deepspeed"]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module and node.module.split(".")[0] == "deepspeed" else []
        elif isinstance(node, ast.Attribute):
            names = [node.attr] if INTERNAL.fullmatch(node.attr) else []
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value] if INTERNAL.fullmatch(node.value) else []
        else:
            continue
        for name in names:
            yield node.lineno, name


def python_files():
    folders = [ROOT / name for name in ("ebft_mega", "tools", "launcher")]
    return [path for folder in folders for path in sorted(folder.rglob("*.py"))]


def test_deepspeed_is_known_in_one_place():
    outside = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in python_files()
        if ADAPTER not in path.parents
        for line, name in deepspeed_names(path.read_text())
    ]
    assert outside == []


@pytest.mark.parametrize(
    "source",
    [
        "import deepspeed",
        "def later():\n    from deepspeed.utils import groups",
        "shape = parameter.ds_shape",
        "shape = getattr(parameter, 'ds_shape', parameter.shape)",
        "address = parameter._hp_mapping",
        "optimizer.fp32_partitioned_groups_flat",
    ],
)
def test_the_check_can_fail(source):
    assert list(deepspeed_names(source))


def test_internals_of_deepspeed_are_used_where_they_belong():
    """The pattern above knows the names: it finds some in every file of the adapter that reads DeepSpeed's storage."""
    found = {path.name for path in ADAPTER.glob("*.py") if list(deepspeed_names(path.read_text()))}
    assert {"optimizer_storage.py", "partitioned_parameters.py", "deepspeed_engine.py"} <= found

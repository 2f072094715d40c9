"""Every module imports, and only in the allowed direction."""

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import megatron_scmoe

PACKAGE = Path(megatron_scmoe.__file__).parent
MODULES = sorted(
    module.name for module in pkgutil.walk_packages(megatron_scmoe.__path__, "megatron_scmoe.")
)

# What a part of the package may use of the rest of it.
ALLOWED = {
    "overlap": {"overlap"},
    "config": {"overlap"},
    "norm": set(),
    "attention": set(),
    "moe": {"moe", "overlap", "config"},
    "shortcut_layer": {"moe", "overlap", "config"},
    "layer_specs": {"shortcut_layer", "moe", "config", "norm", "attention"},
    "planner": {"planner", "overlap", "config", "layer_specs", "model", "model_size", "memory"},
    "model_size": {"config", "layer_specs", "model"},
    "memory": {"model_size", "layer_specs", "model", "arguments"},
    "layout": set(),
    "host": {"host"},
    "doctor": {"doctor", "host", "checkpoint"},
    "data": {"data"},
    "watch": {"watch", "host"},
}


@pytest.mark.parametrize("module", [name for name in MODULES if not name.endswith("__main__")])
def test_import(module: str) -> None:
    importlib.import_module(module)


def imported_parts(source: Path) -> set[str]:
    """Parts of the package that a file imports anywhere, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source.name} uses a relative import"
            module = node.module or ""
            names |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("megatron_scmoe.")}


@pytest.mark.parametrize("part", ALLOWED)
def test_import_direction(part: str) -> None:
    folder = PACKAGE / part
    sources = sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{part}.py"]
    assert sources
    for source in sources:
        assert imported_parts(source) <= ALLOWED[part], source.name

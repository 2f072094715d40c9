"""Every module imports, and only in the allowed direction."""

import ast
import importlib
import pkgutil
import re
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
    "memory": {"model_size", "layer_specs", "model", "arguments", "host"},
    "layout": set(),
    "metrics": {"config", "overlap", "shortcut_layer"},
    "model": {"model", "config", "layer_specs", "metrics"},
    "checkpoint": {"checkpoint", "host", "watch"},
    "arguments": {"checkpoint", "config", "host", "layer_specs", "layout", "model", "moe"},
    "start": {"host", "checkpoint", "memory"},
    "host": {"host"},
    "doctor": {"doctor", "host", "checkpoint"},
    "data": {"data"},
    "watch": {"watch", "host"},
}


@pytest.mark.parametrize("module", [name for name in MODULES if not name.endswith("__main__")])
def test_import(module: str) -> None:
    importlib.import_module(module)


def imported_parts(source: Path) -> set[str]:
    """Parts of the package that a file imports anywhere, inside functions and by strings too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source.name} uses a relative import"
            module = node.module or ""
            names |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and re.fullmatch(
            r"megatron_scmoe[.\w]*", str(node.value)
        ):
            names.add(str(node.value))
    return {name.split(".")[1] for name in names if name.startswith("megatron_scmoe.")}


def test_every_part_has_its_place_and_none_is_above_itself() -> None:
    """A part that is used by what it uses would be a circle."""
    parts = {name.split(".")[1] for name in MODULES}
    assert parts == set(ALLOWED)
    reached = {part: set(used) - {part} for part, used in ALLOWED.items()}
    for _ in ALLOWED:
        for used in reached.values():
            used |= {further for part in used for further in reached[part]}
    assert [part for part, used in reached.items() if part in used] == []


def test_a_module_that_is_named_in_a_string_is_seen(tmp_path: Path) -> None:
    source = tmp_path / "hidden.py"
    source.write_text('import importlib\nimportlib.import_module("megatron_scmoe.watch.report")\n')
    assert imported_parts(source) == {"watch"}


@pytest.mark.parametrize("part", ALLOWED)
def test_import_direction(part: str) -> None:
    folder = PACKAGE / part
    sources = sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{part}.py"]
    assert sources
    for source in sources:
        assert imported_parts(source) <= ALLOWED[part], source.name

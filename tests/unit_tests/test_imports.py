"""Every module imports, and only in the allowed direction; class names are unique."""

import ast
import importlib
import importlib.util
import pkgutil
import re
from collections import Counter
from pathlib import Path

import pytest

import megatron_scmoe

REPOSITORY = Path(__file__).parents[2]
MODULES = sorted(
    module.name for module in pkgutil.walk_packages(megatron_scmoe.__path__, "megatron_scmoe.")
)

# What a part of the package, a wing, a room of one, or a module of the root, may use of the rest.
ALLOWED = {
    "words": set(),
    "say": {"words"},
    "recipe": set(),
    "presets": set(),
    "c2r": {"words"},
    "host": {"words"},
    "overlap": set(),
    "overlap.measure": {"words", "c2r", "overlap"},
    "model.variant": {"checks.refusal"},
    "model.combine": {"checks.refusal", "model.variant"},
    "model.dispatch": {"checks.refusal", "model.variant", "overlap"},
    "model.routing": {"c2r", "checks.refusal", "model.variant"},
    "model.experts.grouped": {"model.names"},
    "model.experts.offload": {"model.experts", "overlap"},
    "model.experts": {"checks.refusal", "model.variant"},
    "model.names": {"model.combine", "model.experts", "model.routing", "model.variant"},
    "config": {
        "presets",
        "model.combine",
        "model.dispatch",
        "model.experts",
        "model.experts.offload",
        "model.routing",
        "model.variant",
        "overlap",
    },
    "model": {
        "c2r",
        "checks.refusal",
        "config",
        "model.combine",
        "model.dispatch",
        "model.experts",
        "model.experts.grouped",
        "model.experts.offload",
        "model.names",
        "model.routing",
        "overlap",
        "overlap.measure",
    },
    "checks": {
        "words",
        "checks.ranges",
        "c2r",
        "host",
        "checks.refusal",
        "config",
        "model",
        "model.experts.grouped",
        "model.routing",
        "overlap",
    },
    "checks.ranges": {"words", "checks.refusal"},
    "checks.refusal": set(),
    "run": {"c2r", "host", "model.routing", "overlap.measure"},
    "run.watch": {"host", "say"},
    "run.checkpoint": {
        "words",
        "host",
        "model.names",
        "model.routing",
        "run",
        "say",
        "run.watch",
    },
    "run.doctor": {"words", "host", "run", "run.checkpoint"},
    "huggingface.logits": {
        "arguments",
        "inference",
        "run.checkpoint",
        "run.watch",
        "say",
        "start",
    },
    "huggingface": {
        "words",
        "c2r",
        "checks.ranges",
        "checks.refusal",
        "huggingface.logits",
        "run.checkpoint",
    },
    "arguments": {
        "words",
        "checks.ranges",
        "c2r",
        "presets",
        "recipe",
        "say",
        "host",
        "config",
        "model",
        "model.combine",
        "model.dispatch",
        "model.experts",
        "model.experts.grouped",
        "model.routing",
        "model.variant",
        "checks",
        "checks.refusal",
        "run.checkpoint",
    },
    "planner": {
        "words",
        "arguments",
        "c2r",
        "checks",
        "checks.ranges",
        "checks.refusal",
        "config",
        "host",
        "model",
        "model.combine",
        "model.experts",
        "model.routing",
        "overlap",
        "overlap.measure",
    },
    "inference": {
        "arguments",
        "host",
        "model",
        "model.experts.offload",
        "planner",
        "run.checkpoint",
        "start",
        "words",
    },
    "start": {"host", "planner", "run", "run.checkpoint"},
    "commands.preprocess": {"words"},
    "commands.trace_report": {"words", "overlap", "overlap.measure"},
    "commands": {
        "words",
        "checks.ranges",
        "c2r",
        "presets",
        "recipe",
        "commands.preprocess",
        "commands.trace_report",
        "start",
        "arguments",
        "say",
        "host",
        "model",
        "checks",
        "checks.refusal",
        "huggingface",
        "inference",
        "overlap.measure",
        "planner",
        "run",
        "run.checkpoint",
        "run.doctor",
        "run.watch",
    },
}


@pytest.mark.parametrize("module", [name for name in MODULES if not name.endswith("__main__")])
def test_import(module: str) -> None:
    importlib.import_module(module)


def part_of(module: str) -> str:
    """The part with the longest name that a module, or what is in it, lies in."""
    path = module.split(".")[1:]
    prefixes = (".".join(path[:length]) for length in range(len(path), 0, -1))
    return next((prefix for prefix in prefixes if prefix in ALLOWED), "")


def imported_parts(source: Path) -> set[str]:
    """Parts of the package that a file imports anywhere, inside functions and by strings too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom):
            # transformers loads what is copied beside weights by relative imports alone.
            assert node.level == 0 or source.name == "modeling_scmoe.py", source.name
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and re.fullmatch(
            r"megatron_scmoe[.\w]*", str(node.value)
        ):
            names.add(str(node.value))
    return {part_of(name) for name in names if name.startswith("megatron_scmoe.")} - {""}


def test_every_module_has_a_part_and_no_part_is_above_itself() -> None:
    """A part that is used by what it uses would be a circle."""
    assert {part_of(name) for name in MODULES} == set(ALLOWED)
    reached = {part: set(used) for part, used in ALLOWED.items()}
    for _ in ALLOWED:
        for used in reached.values():
            used |= {further for part in used for further in reached[part]}
    assert [part for part, used in reached.items() if part in used] == []


def test_a_module_that_is_named_in_a_string_is_seen(tmp_path: Path) -> None:
    source = tmp_path / "hidden.py"
    source.write_text(
        'import importlib\nimportlib.import_module("megatron_scmoe.run.watch.account")\n'
    )
    assert imported_parts(source) == {"run.watch"}


def test_a_class_name_has_one_meaning() -> None:
    """transformers' convention for the name of a model's config is the exception."""
    names = Counter(
        node.name.removeprefix("_")
        for folder in ("megatron_scmoe", "tools", "tests")
        for path in (REPOSITORY / folder).rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef)
    )
    assert {name for name, count in names.items() if count > 1} == {"ScMoEConfig"}


@pytest.mark.parametrize("module", MODULES)
def test_import_direction(module: str) -> None:
    source = importlib.util.find_spec(module).origin  # type: ignore[union-attr]
    own = part_of(module)
    assert imported_parts(Path(source)) <= {*ALLOWED[own], own}  # type: ignore[arg-type]

"""The parts of the proof, and what a part says about itself without being imported.

A part's imports may be broken, or may touch the device: only the process that runs it imports it.
"""

import ast
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = "tools.gpu_proof"
PARTS = ("right", "ranks", "main_job", "transformer_engine", "hidden", "fast", "generation")
"""In order of value."""


@dataclass(frozen=True)
class ProofPart:
    """A module with `LIMIT_S`, `CORRECTNESS` and `run(results, device, seconds)`."""

    name: str
    module: str
    shows: str
    """The first line of its docstring."""
    limit_s: float
    correctness: bool
    """Whether `make test-gpu` runs it."""


def read_part(name: str, package: str = PACKAGE) -> ProofPart | None:
    """None where there is no such module yet.

    Raises:
        ValueError: the module lacks what a part has.
    """
    module = f"{package}.{name}"
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        return None
    tree = ast.parse(Path(found.origin).read_text())
    constants = {target: value for node in tree.body for target, value in _constants(node)}
    try:
        limit_s, correctness = float(constants["LIMIT_S"]), bool(constants["CORRECTNESS"])
    except KeyError as missing:
        raise ValueError(f"{module} has no constant {missing.args[0]}") from None
    shows = (ast.get_docstring(tree) or "").partition("\n")[0]
    return ProofPart(name, module, shows, limit_s, correctness)


def _constants(node: ast.stmt) -> list[tuple[str, Any]]:
    """(name, value) of `NAME = 1` and of `NAME: float = 1`."""
    if isinstance(node, ast.AnnAssign):
        targets: list[ast.expr] = [node.target]
    elif isinstance(node, ast.Assign):
        targets = node.targets
    else:
        return []
    if not isinstance(node.value, ast.Constant):
        return []
    return [(target.id, node.value.value) for target in targets if isinstance(target, ast.Name)]

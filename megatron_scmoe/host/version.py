"""Which megatron-core is installed: the table of replacements is written for one minor version."""

import importlib.util
import runpy
from pathlib import Path

from packaging.specifiers import SpecifierSet

SUPPORTED = ">=0.19.2,<0.20"  # as in pyproject.toml


def megatron_core_folder() -> Path:
    """Where an import would find it; a source tree on PYTHONPATH comes before the wheel.

    Raises:
        ImportError: nowhere.
    """
    found = importlib.util.find_spec("megatron") and importlib.util.find_spec("megatron.core")
    if not found or not found.submodule_search_locations:
        raise ImportError(
            f"megatron-core is not installed: pip install 'megatron-core{SUPPORTED}'."
        )
    return Path(found.submodule_search_locations[0])


def megatron_core_version() -> str:
    """Read without importing megatron-core: torch's symbols are replaced first."""
    package_info = runpy.run_path(str(megatron_core_folder() / "package_info.py"))
    version: str = package_info["__version__"]
    return version.partition("+")[0]  # without the revision of whatever repository it lies in


def check_megatron_core() -> None:
    """Refuse a megatron-core that this package was not written for.

    Raises:
        ImportError: one line that says which one is needed and where the other one lies.
    """
    version = megatron_core_version()
    if version not in SpecifierSet(SUPPORTED):
        raise ImportError(
            f"megatron-core {version} in {megatron_core_folder()}: this package extends "
            f"{SUPPORTED}, so pip install 'megatron-core{SUPPORTED}' and take other copies off "
            "PYTHONPATH."
        )

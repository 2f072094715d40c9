"""The one place that adapts the installed megatron-core to this machine.

`prepare` runs before anything of Megatron does (start.py); `apply_cpu_defaults` runs between the
host's `parse_args` and `validate_args`.
"""

from megatron_scmoe.host import cpu
from megatron_scmoe.host.cpu import apply_cpu_defaults, switch_kernels
from megatron_scmoe.host.replace import Replacement, format_table, replace_symbols
from megatron_scmoe.host.table import TABLE
from megatron_scmoe.host.version import check_megatron_core

__all__ = [
    "TABLE",
    "apply_cpu_defaults",
    "format_table",
    "prepare",
    "replace_symbols",
    "switch_kernels",
]


def prepare() -> list[Replacement]:
    """Replace the host's symbols that this machine cannot use as they are; the rows applied.

    Raises:
        ImportError: no megatron-core, or one of another minor version.
    """
    check_megatron_core()
    if cpu.no_cuda_device():
        cpu.silence_noise()
        cpu.hide_gpu_libraries()
    return replace_symbols(TABLE)

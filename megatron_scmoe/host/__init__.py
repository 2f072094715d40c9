"""The one place that adapts the installed megatron-core to this machine.

`prepare` runs before anything of Megatron does (start.py); `apply_cpu_defaults` runs between the
host's `parse_args` and `validate_args`; `user_errors` turns a refusal into one line.
"""

from megatron_scmoe.host import cpu
from megatron_scmoe.host.cpu import apply_cpu_defaults, switch_kernels
from megatron_scmoe.host.errors import (
    USER_ERRORS,
    leave,
    one_line,
    one_line_usage_errors,
    printable_help,
    user_errors,
)
from megatron_scmoe.host.replace import Replacement, format_table, replace_symbols, restore
from megatron_scmoe.host.table import TABLE
from megatron_scmoe.host.version import check_megatron_core

__all__ = [
    "TABLE",
    "USER_ERRORS",
    "apply_cpu_defaults",
    "format_table",
    "leave",
    "one_line",
    "one_line_usage_errors",
    "prepare",
    "printable_help",
    "replace_symbols",
    "restore",
    "switch_kernels",
    "user_errors",
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

"""The one place that adapts the installed megatron-core to this machine.

`apply_replacements` runs before anything of Megatron does; `apply_cpu_defaults` runs between the
host's `parse_args` and `validate_args`; `user_errors` turns a refusal into one line.
`python -m megatron_scmoe.host` prints what is replaced here and why.
"""

from megatron_scmoe.host.cpu import apply_cpu_defaults, switch_kernels
from megatron_scmoe.host.errors import (
    USER_ERRORS,
    leave,
    one_line,
    one_line_usage_errors,
    printable_help,
    user_errors,
)
from megatron_scmoe.host.table import apply_replacements, format_table, restore

__all__ = [
    "USER_ERRORS",
    "apply_cpu_defaults",
    "apply_replacements",
    "format_table",
    "leave",
    "one_line",
    "one_line_usage_errors",
    "printable_help",
    "restore",
    "switch_kernels",
    "user_errors",
]

"""The one place that adapts the installed megatron-core to this machine.

`apply_replacements` runs before anything of Megatron does; `apply_cpu_defaults` runs between the
host's `parse_args` and `validate_args`; `user_errors` turns a refusal into one line;
`store_of_this_attempt` lets torchrun restart a job.
`python -m megatron_scmoe.host` prints what is replaced here and why.
"""

from megatron_scmoe.host.cpu import apply_cpu_defaults
from megatron_scmoe.host.errors import one_line_usage_errors, user_errors
from megatron_scmoe.host.launcher import store_of_this_attempt
from megatron_scmoe.host.table import apply_replacements, format_table, restore

__all__ = [
    "apply_cpu_defaults",
    "apply_replacements",
    "format_table",
    "one_line_usage_errors",
    "restore",
    "store_of_this_attempt",
    "user_errors",
]

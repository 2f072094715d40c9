"""Print the table of replaced host symbols: `python -m megatron_scmoe.host`."""

from megatron_scmoe.host.table import format_table

print(format_table())

"""What the server of forked ranks does once, after its imports, so that no rank does it again.

Ranks build the host's parser twice, which parses the sources of its config classes for the help of
their fields; and they collect garbage, among a million objects that modules made and keep.
"""

import gc
from argparse import ArgumentParser
from functools import cache

from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.arguments import add_megatron_arguments

_read = ArgumentGroupFactory._get_field_docstrings


@cache
def _read_once(config: type) -> dict[str, str]:
    return _read(ArgumentGroupFactory, config)  # asks itself for the parent class


ArgumentGroupFactory._get_field_docstrings = staticmethod(_read_once)
add_megatron_arguments(ArgumentParser())
gc.collect()
gc.freeze()

"""Silence while Megatron is imported."""

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Imports without their warnings: Megatron's and PyTorch's modules remark on stderr that a
    machine has no GPU and no Transformer Engine, which preprocessing does not need."""

    with warnings.catch_warnings(action="ignore"):
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)

"""What the dispatcher hands to the exchange."""

import pytest
import torch

from megatron_scmoe.moe import token_dispatcher
from tests.models import BATCH, SEQUENCE, Case, build_block, run_block


def test_the_small_exchange_goes_first(single_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Router weights, then tokens: behind a large exchange on one hardware queue the small one
    would hold up the dense work enqueued after it."""
    sizes: list[list[int]] = []
    start = token_dispatcher.start

    def recording(plan, *tensors):
        sizes.append([tensor.numel() for tensor in tensors])
        return start(plan, *tensors)

    monkeypatch.setattr(token_dispatcher, "start", recording)
    run_block(build_block(Case()), torch.randn(SEQUENCE, BATCH, 16, dtype=torch.float64))
    rows, hidden = SEQUENCE * BATCH, 16
    dispatch, combine = [rows, rows * hidden], [rows * hidden]
    assert sizes == [dispatch, combine] * 2

"""What the dispatchers hand to the exchange."""

import pytest
import torch

from megatron_scmoe.overlap.branch import RoutedBranch
from tests.models import BATCH, SEQUENCE, Case, build_block, run_block

ROWS, HIDDEN, EXPERTS = SEQUENCE * BATCH, 16, 4
# Numbers of elements, in the order in which they are sent.
DISPATCH = {
    "alltoall": [ROWS, ROWS * HIDDEN],
    "allgather": [ROWS * EXPERTS, ROWS * EXPERTS, ROWS * HIDDEN],
}


@pytest.mark.parametrize("dispatcher", DISPATCH)
def test_the_small_exchange_goes_first(
    single_rank: None, monkeypatch: pytest.MonkeyPatch, dispatcher: str
) -> None:
    """Router weights, then tokens: behind a large exchange on one hardware queue the small one
    would hold up the dense work enqueued after it."""
    sizes: list[list[int]] = []
    depart = RoutedBranch.depart

    def recording(self, cargo):
        sizes.extend([tensor.numel() for tensor in chunk] for chunk in cargo)
        depart(self, cargo)

    monkeypatch.setattr(RoutedBranch, "depart", recording)
    block = build_block(Case(host={"moe_token_dispatcher_type": dispatcher}))
    run_block(block, torch.randn(SEQUENCE, BATCH, HIDDEN, dtype=torch.float64))
    assert sizes == [DISPATCH[dispatcher]] * 2


def test_a_router_that_selects_another_number_is_refused(single_rank: None) -> None:
    """The numbers of rows are computed before the ranks tell each other."""
    block = build_block(Case())
    moe = block.layers[0].mlp
    z = torch.randn(ROWS, HIDDEN, dtype=torch.float64)
    probs = torch.rand(ROWS, EXPERTS, dtype=torch.float64)
    trip = moe.token_dispatcher.prepare(z, probs, probs > 2)
    with pytest.raises(RuntimeError, match="selected 0 rows, not tokens x top-k = 12"):
        trip.collective()

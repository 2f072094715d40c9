"""What the dispatchers hand to the exchange."""

import pytest
import torch

from megatron_scmoe.model.dispatch import token_dispatcher
from megatron_scmoe.model.dispatch.token_dispatcher import Chunk
from megatron_scmoe.overlap.branch import RoutedBranch
from megatron_scmoe.overlap.recorder import UnitRecorder
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
        return depart(self, cargo)

    monkeypatch.setattr(RoutedBranch, "depart", recording)
    block = build_block(Case(host={"moe_token_dispatcher_type": dispatcher}))
    run_block(block, torch.randn(SEQUENCE, BATCH, HIDDEN, dtype=torch.float64))
    assert sizes == [DISPATCH[dispatcher]] * 2


def forget(_seconds: float) -> None:
    pass


@pytest.mark.parametrize("selected", [0, 1])
def test_fewer_rows_than_k_for_each_token(single_rank: None, selected: int) -> None:
    """Those that exist are sent, from the first on, and the others have no gradient."""
    moe = build_block(Case()).layers[0].mlp
    z = torch.randn(ROWS, HIDDEN, dtype=torch.float64, requires_grad=True)
    probs = torch.rand(ROWS, EXPERTS, dtype=torch.float64)
    routing_map = torch.zeros(ROWS, EXPERTS, dtype=torch.bool)
    routing_map[:selected, 1] = True
    (trip,) = moe.token_dispatcher.prepare([Chunk(z, probs, routing_map)], forget)
    branch = RoutedBranch()
    (leg,) = branch.depart([trip.cargo()])
    leg.send(trip.collective())
    rows = trip.expert_input(leg.receive())
    assert rows.tokens_per_expert.tolist() == [0, selected, 0, 0]
    assert torch.equal(rows.hidden_states, z[:selected])
    leg.send_back(*trip.reply(rows.hidden_states * 2))
    branch.wait()
    output = trip.restore(branch.arrive()[0])
    expected = torch.zeros_like(z)
    expected[:selected] = 2 * z[:selected]
    assert torch.equal(output, expected)
    output.sum().backward()
    assert torch.equal(z.grad, expected / z.detach())


def test_more_than_k_experts_for_a_token_are_refused(single_rank: None) -> None:
    moe = build_block(Case()).layers[0].mlp
    z = torch.randn(ROWS, HIDDEN, dtype=torch.float64)
    probs = torch.rand(ROWS, EXPERTS, dtype=torch.float64)
    (trip,) = moe.token_dispatcher.prepare([Chunk(z, probs, probs >= 0)], forget)
    with pytest.raises(RuntimeError, match="selected 48 rows, 12 at most fit"):
        trip.collective()


def test_padding_for_quantisation_changes_no_result(
    single_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are added to every expert, with no weight: here to a multiple of 4."""
    monkeypatch.setattr(token_dispatcher, "get_align_size_for_quantization", lambda _: 4)
    block = build_block(Case())
    counts = []
    routed = UnitRecorder.routed
    monkeypatch.setattr(
        UnitRecorder, "routed", lambda self, rows: (counts.append(rows), routed(self, rows))
    )
    x = torch.randn(SEQUENCE, BATCH, HIDDEN, dtype=torch.float64)
    results = []
    for padded in (False, True):
        for layer in block.layers:
            layer.mlp.token_dispatcher.config.moe_router_padding_for_quantization = padded
        block.zero_grad()
        output = run_block(block, x)
        output.square().sum().backward()
        results.append([output, *(parameter.grad for parameter in block.parameters())])
    for plain, padded in zip(*results, strict=True):
        torch.testing.assert_close(padded, plain, rtol=1e-12, atol=1e-14)
    before, after = counts[:2], counts[2:]
    assert [rows.tolist() for rows in after] == [(-(-rows // 4) * 4).tolist() for rows in before]

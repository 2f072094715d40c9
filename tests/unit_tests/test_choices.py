"""Statistics of what routers choose, against counts by hand."""

import math
from typing import Any

import pytest
import torch

from megatron_scmoe.model.dispatch import COPIES
from megatron_scmoe.overlap.measure.choices import (
    Choices,
    copies_per_token,
    in_words,
    over_layers,
    statistics,
)
from tests.models import run_block
from tests.unit_tests.test_moepp import KINDS, LOSS, case
from tests.unit_tests.test_variants import EXPERTS, FULL, K, hidden_states, toy_block


def test_counts_by_hand() -> None:
    """Five tokens of two slots: three routed experts, one zero, one copy; one slot was dropped."""
    choices = Choices()
    routed = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0], [0, 1, 0]]).bool()
    at_home = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1], [0, 0]]).bool()
    logits = torch.tensor([[0.0] * 5, [50.0, 0, 0, 0, 0]])
    for part in (slice(0, 2), slice(2, 5)):
        choices.add(routed[part], at_home[part], slots=2)
    choices.watching(lambda found: found)(logits[:, None])
    with torch.no_grad():
        choices.add(routed, at_home, slots=2)  # no gradient, no count
        choices.watching(lambda found: found)(logits[:, None])
    for part in (routed[:2], routed[2:]):
        choices.visited(part, nodes=[0, 0, 1])  # an expert on each of three ranks
    row = choices.take(torch.tensor([0.5, -0.25, 0, 0, 0]))
    assert row is not None and choices.take(None) is None
    found = statistics(row.tolist(), {"zero": 1, "copy": 1}, biased=True)
    per_token = [2, 1, 1, 0, 1]
    assert found == pytest.approx(
        {
            "tokens-per-expert-min": 0,
            "tokens-per-expert-mean": 5 / 3,
            "tokens-per-expert-max": 3,
            "load-violation": 0.8,
            "routed-per-token": 1,
            "routed-per-token-spread": torch.tensor(per_token).double().std(correction=0).item(),
            "ranks-per-token": 1.0,
            "nodes-per-token": 0.8,
            "dropped": 0.1,
            "slots-of-zero": 0.2,
            "slots-of-copy": 0.2,
            "router-entropy": math.log(5) / 2,
            "bias-range": 0.75,
        }
    )
    copies = [copies_per_token(found, copies) for copies in COPIES]
    assert copies == pytest.approx([1.0, 1.0, 0.8])
    assert in_words(found) == " routed per token: 1.00 | slots at home: 40.0% | dropped: 10.0% |"
    assert in_words({"dropped": 0.0}) == ""
    assert over_layers({1: {"a": 1.0}, 3: {"a": 3.0, "b": 5.0}}) == {"a": 2.0, "b": 5.0}


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("host", [{}, FULL], ids=["", "recomputed"])
def test_a_unit_counts_its_tokens_once(host: dict[str, Any]) -> None:
    block = toy_block(case(router="heterogeneous", **LOSS, **host))
    x = hidden_states()
    run_block(block, x).sum().backward()
    tokens = x.shape[0] * x.shape[1]
    for layer in block.layers:
        row = layer.choices.take(layer.bias)
        assert row is not None
        counts, sums = row[: EXPERTS + sum(KINDS.values())], row[EXPERTS + sum(KINDS.values()) :]
        assert counts.sum() == tokens * K and sums[0] == sums[4] == tokens
    block.eval()
    run_block(block, x)
    assert all(layer.choices.take(layer.bias) is None for layer in block.layers)

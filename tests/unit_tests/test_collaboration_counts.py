"""What a running model chooses is counted as by hand: pairs, sets, padding, recomputation."""

from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_scmoe.c2r.collaboration import NOBODY, LayerCounts
from megatron_scmoe.overlap.measure import chosen_together
from megatron_scmoe.overlap.measure.chosen_together import Collector
from tests.models import BATCH, SEQUENCE, Case, build_block, run_block
from tests.unit_tests.test_variants import FULL, hidden_states

EXPERTS = 6


def block_of(topk: int, position: str = "pos2", **host: Any) -> Any:
    scmoe = {"scmoe_shortcut_position": position, "scmoe_combine": "add"}
    if position == "none":
        scmoe["scmoe_router"] = "longcat"
    options = {"num_moe_experts": EXPERTS, "moe_router_topk": topk, **host}
    return build_block(Case(scmoe=scmoe, host=options))


def maps_of(block: Any) -> dict[int, list[torch.Tensor]]:
    """Every map that a router will answer, by layer."""
    found: dict[int, list[torch.Tensor]] = {}
    for module in block.modules():
        if isinstance(module, MoELayer):
            router: Any = module.router
            router.register_forward_hook(
                lambda made, _, out: found.setdefault(made.layer_number, []).append(out[1])
            )
    return found


def counted(maps: list[torch.Tensor], topk: int) -> LayerCounts:
    """By hand, token by token; a token of padding has no expert."""
    chosen, together = np.zeros(EXPERTS, int), np.zeros((EXPERTS, EXPERTS), int)
    sets: dict[tuple[int, ...], int] = {}
    tokens = [row.nonzero().flatten().tolist() for routing_map in maps for row in routing_map]
    for experts in tokens:
        for i in experts:
            chosen[i] += 1
            for j in experts:
                together[i, j] += i != j
        row = (*experts, *[NOBODY] * (topk - len(experts)))
        sets[row] = sets.get(row, 0) + 1
    ordered = sorted(sets)
    layer = LayerCounts(len(tokens), chosen, together)
    if topk > 2:
        layer.sets, layer.set_tokens = np.array(ordered), np.array([sets[row] for row in ordered])
    return layer


def assert_same(found: LayerCounts, wanted: LayerCounts) -> None:
    for name, value in vars(wanted).items():
        np.testing.assert_array_equal(getattr(found, name), value)


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("topk", [1, 2, 3])
@pytest.mark.parametrize("position", ["pos2", "none"])
def test_every_pass_is_counted_since_the_last_time(topk: int, position: str) -> None:
    block = block_of(topk, position)
    maps, collector = maps_of(block), Collector([block], lambda: True)
    for _ in range(2):
        for states in (hidden_states(), -hidden_states()):
            run_block(block, states)
        counts = collector.gather()
        assert counts is not None
        assert (counts.experts, counts.topk, [*counts.layers]) == (EXPERTS, topk, [2, 4])
        for number, layer in counts.layers.items():
            assert layer.tokens == 2 * SEQUENCE * BATCH
            assert_same(layer, counted(maps[number], topk))
        maps.clear()


@pytest.mark.usefixtures("single_rank")
def test_padding_does_not_count() -> None:
    block = block_of(3)
    maps, collector = maps_of(block), Collector([block], lambda: True)
    padding = torch.zeros(SEQUENCE, BATCH, dtype=torch.bool)
    padding[4:, 1] = True
    block.layers[0].mlp.router(hidden_states(), padding)
    counts = collector.gather()
    assert counts is not None
    own = [routing_map[~padding.flatten()] for routing_map in maps[2]]
    assert_same(counts.layers[2], counted(own, 3))
    assert counts.layers[4].tokens == 0


@pytest.mark.usefixtures("single_rank")
def test_a_capacity_counts_what_is_kept() -> None:
    block = block_of(3, moe_expert_capacity_factor=0.5)
    maps, collector = maps_of(block), Collector([block], lambda: True)
    run_block(block, hidden_states())
    counts = collector.gather()
    assert counts is not None and counts.layers[2].sets is not None
    assert (counts.layers[2].sets == NOBODY).any()
    assert_same(counts.layers[2], counted(maps[2], 3))


@pytest.mark.usefixtures("single_rank")
def test_a_run_counts_once_where_gradients_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither evaluation nor the first of two passes of recomputed layers."""
    monkeypatch.setattr(chosen_together, "_of_run", None)
    assert chosen_together.of_run() is None
    block = block_of(2, **FULL)
    chosen_together.watch_run([block])
    collector = chosen_together.of_run()
    assert collector is not None
    run_block(block, hidden_states()).sum().backward()
    with torch.no_grad():
        run_block(block, hidden_states())
    counts = collector.gather()
    assert counts is not None and counts.layers[2].tokens == SEQUENCE * BATCH


@pytest.mark.usefixtures("single_rank")
def test_experts_at_home_do_not_count() -> None:
    block = build_block(
        Case(
            scmoe={"scmoe_combine": "add", "scmoe_experts_at_home": {"zero": 2, "copy": 1}},
            host={"num_moe_experts": EXPERTS, "moe_router_topk": 3},
        )
    )
    maps, collector = maps_of(block), Collector([block], lambda: True)
    run_block(block, hidden_states())
    counts = collector.gather()
    assert counts is not None and counts.experts == EXPERTS
    assert_same(counts.layers[2], counted([m[:, :EXPERTS] for m in maps[2]], 3))


@pytest.mark.usefixtures("single_rank")
def test_of_sets_the_last_tokens_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen_together, "SET_TOKENS", 2 * SEQUENCE * BATCH)
    block = block_of(3)
    maps, collector = maps_of(block), Collector([block], lambda: True)
    for factor in (1, -1, 2, -2, 3):
        run_block(block, factor * hidden_states())
    counts = collector.gather()
    assert counts is not None
    last, whole = counted(maps[2][-2:], 3), counted(maps[2], 3)
    np.testing.assert_array_equal(counts.layers[2].sets, last.sets)
    np.testing.assert_array_equal(counts.layers[2].together, whole.together)


@pytest.mark.usefixtures("single_rank")
def test_stock_layers_are_counted_too() -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.transformer_block import TransformerBlock

    config = Case(host={"num_moe_experts": EXPERTS, "moe_router_topk": 2}).host_config()
    stock = TransformerBlock(
        config=config,
        spec=get_gpt_decoder_block_spec(config, use_transformer_engine=False),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    ).double()
    maps, collector = maps_of(stock), Collector([stock], lambda: True)
    run_block(stock, hidden_states())
    counts = collector.gather()
    assert counts is not None and [*counts.layers] == [2, 4]
    assert_same(counts.layers[4], counted(maps[4], 2))

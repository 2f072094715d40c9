"""The planner against the host's memory, sums by hand and the paper.

Weights, gradients and optimizer state exactly, without ranks; the paper's speed-ups from its stated
shares, misses listed.
"""

import copy
import json
import math
import re
import shlex
import sys
from argparse import Namespace
from dataclasses import replace
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.training.theoretical_memory_usage import compute_weight_and_optimizer_memory
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from megatron_scmoe.arguments import model_config_from_args
from megatron_scmoe.c2r import collaboration, placement
from megatron_scmoe.c2r.collaboration import Collaboration, LayerCounts
from megatron_scmoe.c2r.placement import Placement
from megatron_scmoe.commands import plan_overlap
from megatron_scmoe.commands.examination import judge_gradients
from megatron_scmoe.model.builder import ScMoEModelConfig
from megatron_scmoe.overlap.measure.cost import RoutedTimes, UnitTimes, slot_seconds
from megatron_scmoe.overlap.schedule import POSITIONS, Slots, Step, window
from megatron_scmoe.planner.cluster import PRESETS, Cluster
from megatron_scmoe.planner.copies import copies_of, expected
from megatron_scmoe.planner.iteration import micro_batches_to_win
from megatron_scmoe.planner.memory import training_from_args
from megatron_scmoe.planner.plan import Plan, make_plan
from megatron_scmoe.planner.plan_arguments import parse_command_line, source_from_args
from megatron_scmoe.planner.predict import (
    MOE_LAYER,
    PAIR,
    Model,
    PassTimes,
    predict,
    predict_best,
    stock_seconds,
)
from megatron_scmoe.planner.times import exchange_bytes
from megatron_scmoe.planner.twin import Twin, twin, what_the_flag_changes
from tools.benchmarks import paper_table as paper

DOCS = Path(__file__).parents[2] / "docs"

# The command line. --------------------------------------------------------------------------------

MODEL = (
    "--num-layers 4 --hidden-size 64 --ffn-hidden-size 160 --num-attention-heads 8 "
    "--group-query-attention --num-query-groups 2 --swiglu --normalization RMSNorm "
    "--disable-bias-linear --position-embedding-type rope --seq-length 128 "
    "--max-position-embeddings 128 --micro-batch-size 2 --global-batch-size 4096 --bf16 "
    "--use-distributed-optimizer --vocab-size 500 --untie-embeddings-and-output-weights "
    "--num-experts 16 --moe-ffn-hidden-size 96 --moe-layer-freq ([0,1]*2) --moe-router-topk 1 "
    "--moe-token-dispatcher-type alltoall"
)
CLUSTER = (
    "--cluster-nodes 4 --cluster-gpus-per-node 4 --cluster-tflops 100 "
    "--cluster-intra-node-gbytes 100 --cluster-network-gbytes 10 "
    "--cluster-flops-efficiency 0.5 --cluster-bandwidth-efficiency 0.8"
)
POS2 = "--scmoe-shortcut-position pos2"


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch):
    """Options as the tool reads them, without a cluster's number of ranks."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def read(*options: str) -> tuple[Namespace, ScMoEModelConfig]:
        monkeypatch.setattr(sys, "argv", ["plan_overlap.py", *shlex.split(" ".join(options))])
        args, config, _ = parse_command_line()
        return args, config

    return read


@pytest.fixture
def planned(command_line):
    """The plan of a command line."""

    def plan(*options: str) -> tuple[Namespace, Plan]:
        args, config = command_line(*options)
        source = source_from_args(args)
        return args, make_plan(args, config, source, args.extrapolate)

    return plan


@pytest.fixture
def output(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """What the tool prints."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def run(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["plan_overlap.py", *shlex.split(" ".join(options))])
        plan_overlap.main()
        return capsys.readouterr().out

    return run


LAYOUTS = {
    "dp": "",
    "ep": "--expert-model-parallel-size 8",
    "tp": "--tensor-model-parallel-size 4 --sequence-parallel",
    "tp-ep": "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 4",
    "etp-1": "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1 "
    "--expert-model-parallel-size 8",
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("optimizer", ["", "--use-distributed-optimizer"])
def test_weights_gradients_and_optimizer_are_the_hosts(
    planned, layout: str, optimizer: str
) -> None:
    model = MODEL.replace("--use-distributed-optimizer", optimizer)
    # The host does not know the shortcut's own norm.
    args, plan = planned(model, CLUSTER, POS2, layout, "--scmoe-shortcut-norm shared")
    ours = plan.memory.weight_and_optimizer_bytes
    assert ours == pytest.approx(compute_weight_and_optimizer_memory(args), rel=1e-12)


def test_activations_are_those_of_the_clusters_kernels(planned) -> None:
    """Here the local attention runs; a cluster's keeps no score matrices, unless it is asked to."""
    *_, fused = planned(MODEL, CLUSTER, POS2)
    *_, local = planned(MODEL, CLUSTER, POS2, "--transformer-impl local")
    # At least the softmax, in bf16, of 4 layers and 8 heads.
    scores = 2 * 4 * 2 * 8 * 128 * 128
    assert local.memory.activation_bytes >= fused.memory.activation_bytes + scores


def test_optimizer_instances_must_fit(planned) -> None:
    options = "--expert-model-parallel-size 8 --num-distributed-optimizer-instances 2"
    *_, plan = planned(MODEL, CLUSTER, POS2, options)
    *_, whole = planned(MODEL, CLUSTER, POS2, "--expert-model-parallel-size 8")
    assert plan.memory.optimizer_bytes == 2 * whole.memory.optimizer_bytes
    with pytest.raises(ValueError, match="2 does not divide 1, the ranks"):
        planned(MODEL, CLUSTER, POS2, options.replace("size 8", "size 16"))


def test_full_recomputation_keeps_less_and_computes_more(planned) -> None:
    recompute = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    _, kept = planned(MODEL, CLUSTER, POS2, "--expert-model-parallel-size 8")
    _, recomputed = planned(MODEL, CLUSTER, POS2, "--expert-model-parallel-size 8", recompute)
    assert recomputed.memory.activation_bytes < kept.memory.activation_bytes
    forward = kept.predictions["pos2"][1].passes[0].seconds
    assert recomputed.predictions["pos2"][1].seconds == pytest.approx(
        kept.predictions["pos2"][1].seconds
        + forward
        + sum(kept.model.passes[0].dense[step] for step in PAIR if step not in window("pos2"))
    )


# The cluster. -------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpus_per_node", [1, 4, 8])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4, 16])
def test_all_to_all_moves_what_it_must(ranks: int, stride: int, gpus_per_node: int) -> None:
    """Count the bytes of the first rank's messages one by one."""
    cluster = Cluster(gpus_per_node, 100.0, 10.0, 0.5, 1e-3)
    sent = {"node": 0.0, "network": 0.0}
    for peer in range(1, ranks):
        same_node = peer * stride // gpus_per_node == 0
        sent["node" if same_node else "network"] += 800 / ranks
    seconds = max(sent["node"] / 50, sent["network"] / 5) + (ranks - 1) * 1e-3
    assert cluster.all_to_all_seconds(800, ranks, stride) == pytest.approx(seconds)
    assert cluster.share_leaving_node(ranks, stride) == pytest.approx(sent["network"] / 800)


@pytest.mark.parametrize(("gpus_per_node", "stride"), [(1, 1), (4, 1), (4, 2), (8, 1), (16, 1)])
def test_a_ring_passes_on_what_it_must(gpus_per_node: int, stride: int) -> None:
    """Eight ranks, step by step: in each of seven every rank passes an eighth to the next one."""
    cluster = Cluster(gpus_per_node, 100.0, 10.0, 0.5)
    nodes = [rank * stride // gpus_per_node for rank in range(8)]
    sent = {"node": 0.0, "network": 0.0}
    for _ in range(7):
        for here, there in zip(nodes, nodes[1:] + nodes[:1], strict=True):
            sent["node" if here == there else "network"] += 800 / 8
    # All GPUs of the group share what leaves a node; the ring itself is one in each of them.
    leaving = sent["network"] / len(set(nodes)) / nodes.count(0) / 5 if len(set(nodes)) > 1 else 0
    within = 700 / 50 if nodes.count(0) > 1 else 0
    assert cluster.ring_seconds(800, 8, stride) == pytest.approx(max(leaving, within))


def test_presets_are_of_gpus_that_exist() -> None:
    for preset in PRESETS.values():
        assert preset.source and preset.tflops > 0
        assert preset.network_gbytes is None or preset.network_gbytes < preset.intra_node_gbytes


def test_bytes_of_an_exchange(command_line) -> None:
    args, config = command_line(MODEL, CLUSTER, POS2, "--moe-router-topk 2")
    tokens = 128 * 2
    sent = (2 * tokens * (64 * 2 + 4), 2 * tokens * 128)
    assert exchange_bytes(args, config.transformer, topk=2) == sent
    args, config = command_line(
        MODEL, CLUSTER, POS2, "--tensor-model-parallel-size 2 --sequence-parallel"
    )
    assert exchange_bytes(args, config.transformer, topk=1)[1] == tokens // 2 * 128
    # Experts at home, as many as routed ones, get half of the slots and send nothing.
    experts = config.transformer.num_moe_experts
    args, config = command_line(
        MODEL, CLUSTER, POS2, f"--moe-router-topk 2 --scmoe-num-copy-experts {experts}"
    )
    assert exchange_bytes(args, config.transformer, topk=2) == tuple(x / 2 for x in sent)


@pytest.mark.parametrize(
    ("ranks", "experts", "chosen"), [(4, 8, 2), (2, 8, 3), (4, 4, 3), (8, 8, 8)]
)
def test_copies_of_a_token_where_every_set_of_experts_is_as_likely(
    ranks: int, experts: int, chosen: int
) -> None:
    sets = list(combinations(range(experts), chosen))
    each = experts // ranks
    mean = sum(len({expert // each for expert in one}) for one in sets) / len(sets)
    assert expected(ranks, experts, chosen) == pytest.approx(mean)
    assert expected(ranks, experts, 1.5) == pytest.approx(1.5, rel=0.25)


def test_bytes_of_rows_for_ranks_and_nodes(command_line) -> None:
    """16 experts on 8 ranks of two nodes."""
    layout = "--cluster-nodes 2 --expert-model-parallel-size 8 --moe-router-topk 8"
    sets = comb(16, 8)
    rows = {
        "expert": (8, 1),
        "rank": (8 * (1 - comb(14, 8) / sets), 2),
        "node": (2 * (1 - 1 / sets), 8),
    }
    for copies, (of_token, weights) in rows.items():
        args, config = command_line(
            MODEL, CLUSTER, POS2, layout, f"--scmoe-dispatch-copies {copies}"
        )
        dispatch, combine = exchange_bytes(args, config.transformer, topk=8)
        assert combine == pytest.approx(256 * of_token * 128)
        assert dispatch == pytest.approx(256 * of_token * (128 + 4 * weights))


def test_a_row_for_every_node_makes_two_hops() -> None:
    cluster = Cluster(4, 100.0, 10.0, 0.5)
    across, inside = 800 / 2 / 10, 1000 * 3 / 4 / 100
    assert cluster.two_hops_seconds(800, 1000, 8) == pytest.approx((across + inside) / 0.5)
    assert cluster.two_hops_seconds(800, 1000, 4) == cluster.all_to_all_seconds(1000, 4)


def test_copies_as_a_run_counted_them_and_experts_as_they_are_placed(
    command_line, tmp_path: Path
) -> None:
    """Tokens of experts 0 and 8, or 0 and 1: two ranks of two nodes, or one rank."""
    layer = LayerCounts(
        tokens=4,
        chosen=np.bincount([0, 0, 0, 0, 8, 8, 8, 1], minlength=16),
        together=np.zeros((16, 16), np.int64),
        sets=np.array([[0, 1], [0, 8]]),
        set_tokens=np.array([1, 3]),
    )
    layer.together[[0, 8], [8, 0]], layer.together[[0, 1], [1, 0]] = 3, 1
    counts = tmp_path / "counts.json"
    collaboration.write(counts, Collaboration(16, 2, {2: layer, 4: layer}))
    args, config = command_line(
        MODEL,
        CLUSTER,
        f"{POS2} --cluster-nodes 2 --moe-router-topk 2 --expert-model-parallel-size 8",
        f"--collaboration {counts}",
    )
    found = copies_of(args, config.transformer, 2)
    assert (found.experts, found.ranks, found.nodes, found.counted) == (2, 1.75, 1.75, True)
    assert not copies_of(args, config.transformer, 3).counted
    ranks = ((0, 8), (1, 9), *((n, n + 8) for n in range(2, 8)))
    args.scmoe_expert_placement = tmp_path / "placement.json"
    placement.write(args.scmoe_expert_placement, Placement(16, 8, 4, {2: ranks, 4: ranks}))
    found = copies_of(args, config.transformer, 2)
    assert (found.ranks, found.nodes) == (1.25, 1.0)
    with pytest.raises(ValueError, match="counts 16 experts, and --num-experts is 8"):
        config.transformer.num_moe_experts = 8
        copies_of(args, config.transformer, 2)


# Predictions. -------------------------------------------------------------------------------------


def times(scale: float = 1.0, dispatch: float = 4.0, combine: float = 2.0) -> PassTimes:
    operators = (3.0, 4.0, 3.0, 4.0)
    return PassTimes(
        dense={
            step: scale * seconds
            for step, seconds in zip(PAIR, _spread(operators, len(PAIR)), strict=True)
        },
        routed=RoutedTimes(5 * scale, dispatch, combine),
        wider=RoutedTimes(10 * scale, 2 * dispatch, 2 * combine),
    )


def _spread(seconds: tuple[float, ...], count: int) -> list[float]:
    return [seconds[index % len(seconds)] for index in range(count)]


def test_pair_by_hand() -> None:
    model = Model([times(), times(2.0)], paired=True, rest=10.0)
    dense = sum(times().dense.values())
    shared_expert = times().dense[Step.SHARED_EXPERT]
    top_2 = (dense - shared_expert) * 3 + 30 + 2 * 12
    shared = dense * 3 + 15 + 2 * 6
    assert stock_seconds(model, wider=True, shared_expert=False) == top_2
    assert stock_seconds(model, wider=False, shared_expert=True) == shared
    hidden_at_slot = {0: 2.0, 1: 6.0}  # combine alone; both
    for slot, hidden in hidden_at_slot.items():
        prediction = predict(model, "pos2", Slots(slot, slot))
        assert prediction.seconds == shared - 2 * hidden
        assert prediction.hidden_share == pytest.approx(hidden / 6)
        assert prediction.exposed == 2 * (6 - hidden)
        assert prediction.fits == (slot == 1)
        assert prediction.over_wider == top_2 / prediction.seconds
        assert prediction.over_shared == shared / prediction.seconds
        assert prediction.model_over_wider == (top_2 + 10) / (prediction.seconds + 10)
    # Slots 1 to 4 hide everything; of these the one nearest the middle.
    assert predict_best(model, "pos2").slots == (2, 2)


def test_each_direction_has_its_best_slot() -> None:
    """Forward the dispatch is long, backward the combine; the window is 4, 3, 4, 3, 4."""
    forward, backward = times(dispatch=9.0, combine=0.0), times(dispatch=0.0, combine=9.0)
    model = Model([forward, forward, backward], paired=True)  # the forward pass is recomputed
    best = predict_best(model, "pos2")
    assert best.slots == Slots(forward=3, backward=2)
    assert best.fits and [cost.hidden for cost in best.passes] == [9.0, 9.0, 9.0]
    exposed = [cost.exposed for cost in predict(model, "pos2", Slots(2, 3)).passes]
    assert exposed == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("position", POSITIONS)
def test_dense_work_outside_the_window_counts(position: str) -> None:
    """Without communication every position takes the same time."""
    model = Model([times(dispatch=0, combine=0)], paired=True)
    seconds = {
        predict(model, position, Slots(slot, slot)).seconds
        for slot in range(len(window(position)) + 1)
    }
    assert seconds == {stock_seconds(model, wider=False, shared_expert=True)}


def test_moe_in_every_layer_has_no_dense_layer() -> None:
    model = Model([times()], paired=False)
    attention_and_shared = sum(times().dense[step] for step in MOE_LAYER)
    assert stock_seconds(model, wider=False, shared_expert=True) == attention_and_shared + 11


def test_plan_from_flops_and_bytes(planned) -> None:
    """One operator and one exchange, calculated here."""
    _, plan = planned(MODEL, CLUSTER, POS2, "--expert-model-parallel-size 16")
    forward, backward = plan.model.passes
    tokens = 128 * 2
    mlp = 2 * tokens * 64 * 160 * 3 / 50e12
    assert forward.dense[Step.DENSE_MLP] == pytest.approx(mlp)
    assert backward.dense[Step.DENSE_MLP] == pytest.approx(2 * mlp)
    combine = tokens * 64 * 2 * 12 / 16 / (10e9 * 0.8)
    assert forward.routed.combine == backward.routed.combine == pytest.approx(combine)
    assert forward.wider.combine == pytest.approx(2 * combine)
    unit = UnitTimes(
        tuple(forward.dense[step] for step in window("pos2")),
        forward.routed.experts,
        forward.routed.dispatch,
        forward.routed.combine,
    )
    for slot, prediction in enumerate(plan.predictions["pos2"]):
        assert prediction.passes[0] == slot_seconds(unit, slot)


def test_first_degree_that_does_not_fit(planned) -> None:
    """A network slow enough that communication fits in the node only."""
    slow = CLUSTER.replace("--cluster-network-gbytes 10", "--cluster-network-gbytes 1")
    fast = slow.replace("intra-node-gbytes 100", "intra-node-gbytes 10000")
    _, plan = planned(MODEL, fast, POS2)
    assert [degree.ranks for degree in plan.degrees] == [2**power for power in range(13)]
    assert plan.first_misfit("pos2") == 8  # the first that leaves a node of four
    _, plan = planned(MODEL, fast.replace("network-gbytes 1", "network-gbytes 9000"), POS2)
    assert plan.first_misfit("pos2") is None
    # More expert parallel ranks never hide more.
    for position in POSITIONS:
        shares = [degree.best[position].hidden_share for degree in plan.degrees]
        assert shares == sorted(shares, reverse=True)


def test_a_node_without_a_network_ends_the_degrees(planned) -> None:
    options = CLUSTER.replace("--cluster-network-gbytes 10", "")
    _, plan = planned(MODEL, options, POS2, "--expert-model-parallel-size 4")
    assert [degree.ranks for degree in plan.degrees] == [1, 2, 4]


def test_extrapolation_keeps_a_ranks_experts(planned) -> None:
    _, plan = planned(
        MODEL,
        CLUSTER,
        POS2,
        "--expert-model-parallel-size 8 --pipeline-model-parallel-size 2 --extrapolate",
    )
    assert [larger.gpus for larger in plan.larger] == [64, 128, 256, 512, 1024, 2048, 4096]
    for larger in plan.larger:
        assert larger.degree.ranks == larger.gpus // 2
        assert larger.experts == 2 * larger.degree.ranks
        # Weights of a GPU differ by the router's rows alone.
        router = (larger.experts - 16) * 64
        assert larger.memory.parameters == plan.memory.parameters + router
    assert plan.larger[-1].degree.leaving_node == 1 - 4 / 2048


def test_positions_that_the_pattern_refuses(planned) -> None:
    _, plan = planned(
        MODEL.replace("([0,1]*2)", "([1]*4)"), CLUSTER, "--scmoe-shortcut-position pos1"
    )
    assert list(plan.predictions) == ["pos1"]
    assert list(plan.refused) == ["pos2", "pos3"]
    assert not plan.model.paired


# Data parallelism. --------------------------------------------------------------------------------

SLOW = (
    MODEL.replace("--global-batch-size 4096", "--global-batch-size 4")
    .replace("--bf16 ", "")
    .replace("--seq-length 128", "--seq-length 32")
    + " --cluster-nodes 2 --cluster-gpus-per-node 1 --cluster-tflops 100 "
    "--cluster-intra-node-gbytes 100 --cluster-network-gbytes 0.01 "
    "--cluster-flops-efficiency 0.5 --cluster-bandwidth-efficiency 0.8 "
    "--expert-model-parallel-size 2 " + POS2
)


def test_traffic_by_hand(planned) -> None:
    """Two hosts hold the same dense weights and different experts, in fp32."""
    _, plan = planned(SLOW.replace("--use-distributed-optimizer", ""))
    attention = 4 * (64 * (64 + 2 * 16) + 64 * 64 + 64)  # 2 query groups of 8; the input norm
    dense = 2 * (3 * 64 * 160 + 64)
    moe = 2 * (16 * 64 + 64)  # router and norm
    rest = 2 * 512 * 64 + 64  # 500 tokens, padded
    wider = attention + dense + moe + rest
    shared = 2 * 3 * 64 * 160
    shortcut = 2 * (64 + 64)  # its norm, and the gate
    assert plan.race.wider.traffic.sent == 2 * wider * 4 / 2
    assert plan.race.shared.traffic.sent == 2 * (wider + shared) * 4 / 2
    assert plan.race.shortcut.traffic.sent == 2 * (wider + shared + shortcut) * 4 / 2
    all_reduce = plan.race.wider.traffic.sent / (0.01e9 * 0.8)
    assert plan.race.wider.traffic.gradients == pytest.approx(all_reduce)
    assert plan.race.wider.waiting.exposed == pytest.approx(all_reduce)
    # Reduce-scatter of gradients and all-gather of parameters are the same bytes here.
    _, sharded = planned(SLOW)
    assert sharded.race.wider.traffic.parameters == pytest.approx(all_reduce / 2)
    assert sharded.race.wider.traffic.sent == plan.race.wider.traffic.sent


def test_what_overlap_leaves(planned) -> None:
    """The gradients less the compute beside which no exchange travels, or the last bucket."""
    options = SLOW.replace("--cluster-network-gbytes 0.01", "--cluster-network-gbytes 1000")
    options = options.replace("--cluster-tflops 100", "--cluster-tflops 0.001")
    _, one = planned(options)
    assert one.race.shortcut.traffic.last_bucket == 1
    assert one.race.shortcut.overlapped == one.race.shortcut.waiting
    _, four = planned(options, "--ddp-num-buckets 4 --overlap-grad-reduce")
    own = four.race.shortcut
    assert own.waiting.exposed == pytest.approx(own.traffic.gradients + own.traffic.parameters)
    last = own.traffic.last_bucket * own.traffic.gradients
    assert own.overlapped.exposed == pytest.approx(last + own.traffic.parameters)
    _, gathers = planned(
        options, "--ddp-num-buckets 4 --overlap-grad-reduce --overlap-param-gather"
    )
    assert gathers.race.shortcut.overlapped.exposed == pytest.approx(
        own.traffic.last_bucket * (own.traffic.gradients + own.traffic.parameters)
    )
    _, link = planned(SLOW, "--ddp-num-buckets 1000 --overlap-grad-reduce")
    own, backward = link.race.wider, link.model.passes[-1]
    compute = sum(backward.dense.values()) - backward.dense[Step.SHARED_EXPERT]
    rest = link.model.rest * 2 / 3
    idle = 2 * (compute + backward.wider.experts + rest)
    left = own.traffic.gradients - idle + own.traffic.parameters
    assert own.overlapped.exposed == pytest.approx(left)


@pytest.mark.parametrize("overlap", ["", "--overlap-grad-reduce --ddp-num-buckets 100"])
@pytest.mark.parametrize("speed", [100, 0.05])
def test_the_crossing_is_where_it_is_said_to_be(planned, overlap: str, speed: float) -> None:
    args, plan = planned(SLOW.replace("tflops 100", f"tflops {speed}"), overlap)
    race = plan.race
    enough = race.now(race.shortcut).wins_from(race.now(race.wider))
    assert replace(race, num_microbatches=enough).over(race.wider) > 1
    if enough > 1:
        assert replace(race, num_microbatches=enough - 1).over(race.wider) <= 1
    if speed == 100:  # compute takes no time, and hides nothing: bytes decide
        config = model_config_from_args(args)
        bytes_decide = micro_batches_to_win(args, config, training_from_args(args, 1))
        assert 3 < bytes_decide < enough <= bytes_decide + 1.1


def test_a_plan_that_loses_an_iteration_says_so(output) -> None:
    """Few micro-batches on a slow link, many of them, and one GPU with nobody to reduce with."""
    few = output(SLOW)
    (warning,) = (line for line in few.splitlines() if "SLOWER than top-2" in line)
    assert warning.startswith("        SLOWER than top-2 in an iteration of 1 micro-batch, 0.")
    number = int(re.search(r"it takes (\d+) micro-batches \(", warning)[1])  # type: ignore[index]
    content = json.loads(output(SLOW, "--json"))["data_parallelism"]
    assert content["wider"]["wins_from"] == number
    assert content["wider"]["speedup_over_it"] < 1
    assert "take a smaller --ddp-bucket-size" in few
    many = output(SLOW.replace("--global-batch-size 4", f"--global-batch-size {4 * number}"))
    assert "SLOWER than top-2" not in many
    alone = output(MODEL, CLUSTER.replace("nodes 4", "nodes 1").replace("node 4", "node 1"), POS2)
    assert "Data parallelism" not in alone
    assert "collectives of TP, CP, PP and DP" in alone and "CP and PP" in few


def test_the_doctor_counts_bytes(command_line) -> None:
    """Enough micro-batches, or an overlap, and there is nothing to say."""
    args, _ = command_line(SLOW)
    (finding,) = judge_gradients(args, 3)
    assert "micro-batches a step: 3; " in finding.seen and "cost as much as 3.7 mic" in finding.seen
    assert not list(judge_gradients(args, 4))
    args, _ = command_line(SLOW, "--overlap-grad-reduce")
    assert not list(judge_gradients(args, 1))


# Measured times. ----------------------------------------------------------------------------------


def run_of(position: str, **values: Any) -> dict[str, Any]:
    return {"position": position, **values}


def measured_file() -> dict[str, Any]:
    """Times of a slow link, and runs of which one is 11 % from what they predict."""
    direction = {step.value: 0.010 for step in PAIR}
    direction |= {"experts": 0.010, "dispatch": 0.015, "combine": 0.012}
    dense = 0.010 * len(PAIR)
    behind_experts = 0.010 * (len(window("pos1")) - 1)
    one_pass = {
        "top-2": dense - 0.010 + 0.020 + 2 * 0.027,
        "shared": dense + 0.010 + 0.027,
        "pos1 slot 1": dense + 0.010 + 0.005 + max(0.0, 0.012 - behind_experts),
    }
    seconds = {name: 0.003 + 2 * value for name, value in one_pass.items()}
    return {
        "source": "synthetic",
        "topk": 1,
        "forward": direction,
        "backward": dict(direction),
        "rest": 0.003,
        "runs": [
            run_of("none", topk=2, shared_expert=False, seconds=seconds["top-2"] * 1.05),
            run_of("none", seconds=seconds["shared"] / 1.11),
            run_of("pos2", slot=1, overlap=False, seconds=seconds["shared"]),
            run_of("pos1", slot=1, seconds=seconds["pos1 slot 1"] * 0.92),
        ],
    }


@pytest.fixture
def write(tmp_path: Path):
    def to_file(content: Any) -> str:
        path = tmp_path / "measured.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return f"--measured {path}"

    return to_file


NODES = "--cluster-nodes 2 --cluster-gpus-per-node 4"


def test_measured_runs_are_compared(planned, output, write) -> None:
    options = (MODEL, NODES, POS2, write(measured_file()))
    _, plan = planned(*options)
    assert [comparison.name for comparison in plan.comparisons] == [
        "top-2",
        "top-1 + shared expert",
        "pos2 slot 1, no overlap",
        "pos1 slot 1",
    ]
    deviations = [comparison.deviation for comparison in plan.comparisons]
    assert deviations == pytest.approx([1 / 1.05 - 1, 0.11, 0, 1 / 0.92 - 1])
    assert [comparison.agrees for comparison in plan.comparisons] == [True, False, True, True]
    assert not plan.degrees  # no network is known
    text = output(*options)
    assert "3 of 4 within 10%" in text and "operator times measured: synthetic" in text


def test_slots_of_the_directions_are_shown(output, write) -> None:
    """Forward only the dispatch takes time, backward only the combine: two and a half operators."""
    content = measured_file()
    content["forward"] |= {"dispatch": 0.025, "combine": 0.0}
    content["backward"] |= {"dispatch": 0.0, "combine": 0.025}
    run = run_of("pos2", slot=3, backward_slot=2, seconds=0.003 + 2 * 0.010 * (len(PAIR) + 1))
    content["runs"] = [run]
    options = (MODEL, NODES, POS2, write(content))
    text, found = output(*options), json.loads(output(*options, "--json"))
    (best,) = (
        entry for entry in found["predictions"] if entry["best"] and entry["position"] == "pos2"
    )
    assert best["slots"] == {"forward": 3, "backward": 2} and best["hidden_share"] == 1
    # Before the experts three operators forward and two backward, behind them the rest.
    assert re.search(r"^pos2 +3,2\+ +50 \| 50 ", text, re.MULTILINE)
    (comparison,) = found["comparisons"]
    assert comparison["name"] == "pos2 slot 3,2"
    assert comparison["deviation"] == pytest.approx(0)


def test_measured_compute_with_the_clusters_network(planned, write) -> None:
    content = measured_file()
    for direction in ("forward", "backward"):
        del content[direction]["dispatch"], content[direction]["combine"]
    ep = "--expert-model-parallel-size 16"
    _, plan = planned(MODEL, CLUSTER, POS2, ep, write(content))
    _, analytic = planned(MODEL, CLUSTER, POS2, ep)
    ours, theirs = plan.model.passes[0], analytic.model.passes[0]
    assert ours.dense[Step.DENSE_MLP] == 0.010
    assert ours.routed.combine == theirs.routed.combine
    assert ours.wider.experts == 0.020


def changed_file(*path: str, value: Any = None) -> dict[str, Any]:
    """The file with one value changed, or left out for None."""
    content = copy.deepcopy(measured_file())
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return content


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "Expecting property name"),
        ([], "it holds a list and no object"),
        (changed_file("forward", value=[1]), "forward is [1], not an object"),
        (changed_file("source", value=1), "source is 1, not a text"),
        (changed_file("rest", value=math.nan), "NaN is no number to compute with"),
        (changed_file("rest", value=math.inf), "Infinity is no number to compute with"),
        (changed_file("rest", value=10**400), "is no number to compute with"),
        (changed_file("runs", value={"a": 1}), "runs is {'a': 1}, not a list"),
        (changed_file("runs", value=[run_of("pos2", slot=1.0, seconds=1)]), "slot of a run is 1.0"),
        ("[" * 100_000, "it is nested too deep"),
        (changed_file("topk"), "no 'topk'"),
        (changed_file("topk", value=2), "make them equal"),
        (changed_file("forward", "experts"), "no 'experts'"),
        (changed_file("forward", "combine"), "no 'combine'"),
        (changed_file("backward", "dispatch"), "no 'dispatch'"),
        (changed_file("forward", "expert", value=1), "unknown key 'expert'"),
        (changed_file("forward", "experts", value=-1), "experts is -1, not a time in seconds"),
        (changed_file("runs", value=[{"position": "pos2"}]), "no 'seconds'"),
        (changed_file("runs", value=[run_of("pos2", seconds=1)]), "slot of a run is None"),
        (
            changed_file("runs", value=[run_of("pos2", slot=1, backward_slot=6, seconds=1)]),
            "with slot 1,6",
        ),
        (changed_file("runs", value=[run_of("pos4", seconds=1)]), "at position 'pos4'"),
        (changed_file("runs", value=[run_of("none", topk=4, seconds=1)]), "only 1 and 2"),
        (changed_file("runs", value=[run_of("pos1", topk=2, slot=1, seconds=1)]), "parts have 1"),
        (changed_file("runs", value=[run_of("none", seconds=0)]), "seconds of a run is 0"),
    ],
)
def test_wrong_files_are_one_line(output, write, capsys, content: Any, expected: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        output(MODEL, NODES, POS2, write(content))
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.count("\n") == 1 and expected in error and error.startswith("plan_overlap.py: ")


# What is printed. ---------------------------------------------------------------------------------


def test_text_and_json_say_the_same(output) -> None:
    options = (MODEL, CLUSTER, POS2, "--expert-model-parallel-size 16 --extrapolate")
    text, content = output(*options), json.loads(output(*options, "--json"))
    assert {entry["position"] for entry in content["predictions"]} == set(POSITIONS)
    assert len(content["predictions"]) == sum(len(window(name)) + 1 for name in POSITIONS)
    for position in POSITIONS:
        best = [
            entry
            for entry in content["predictions"]
            if entry["best"] and entry["position"] == position
        ]
        assert len(best) == 1
        (line,) = (
            line
            for line in text.splitlines()
            if line.startswith(position) and "+ " in line.partition("|")[0]
        )
        assert f"{best[0]['speedup_over_wider']:.2f}x" in line
        assert f"{best[0]['hidden_share']:.0%}" in line
    assert content["layout"]["GPUs"] == 16 and "GPUs 16" in text
    for assumption in content["assumptions"]:
        assert f"- {assumption}" in text
    for kind in ("compute", "all-to-all", "routing", "memory", "more GPUs"):
        assert any(line.startswith(kind) for line in content["assumptions"]), kind
    assert len(content["extrapolated"]) == 7 and "Extrapolated, not measured" in text
    memory = content["memory"]
    parts = ("weights", "gradients", "optimizer", "activations_estimate")
    assert math.isclose(memory["total"], sum(memory[name] for name in parts))


MIXTRAL = (
    "--num-layers 4 --hidden-size 64 --ffn-hidden-size 224 --num-attention-heads 8 --swiglu "
    "--disable-bias-linear --seq-length 128 --max-position-embeddings 128 --micro-batch-size 2 "
    "--global-batch-size 4096 --bf16 --vocab-size 500 --num-experts 8 "
    "--moe-token-dispatcher-type alltoall --scmoe-shortcut-position pos1 "
)
EQUAL = "--moe-router-topk 1 --moe-shared-expert-intermediate-size 224"


def test_what_one_flag_does_to_a_published_model(output) -> None:
    """top-2 without a shared expert gets one: the plan says that it is slower, and what is not."""
    first, second, changed, advice, *_ = output(MIXTRAL, "--moe-router-topk 2", CLUSTER).split("\n")
    assert first.startswith("Best    pos1, slot ") and "0." in first.split("top-3, ")[1]
    assert second.strip() == "SLOWER than stock as it stands"
    small = output(MIXTRAL, EQUAL, CLUSTER, "--cluster-memory-gib 0.001").splitlines()[0]
    assert small.endswith(" GiB, which do not fit in 0.001")
    ratio = float(re.search(r"and ([\d.]+) x the FLOPs", changed)[1])  # type: ignore[index]
    assert 1.2 < ratio < 1.5
    assert advice.endswith(f"the same FLOPs as before: {EQUAL}")


def test_the_advice_keeps_flops_and_activated_parameters(command_line) -> None:
    def sizes(*options: str) -> Twin:
        args, _ = command_line(MIXTRAL, *options, CLUSTER)
        both = twin(args)
        assert both is not None
        return both

    wider, equal = sizes("--moe-router-topk 2"), sizes(EQUAL)
    assert equal.after.activated_parameters == pytest.approx(
        wider.before.activated_parameters, rel=2e-2
    )
    assert equal.after.model_flops == pytest.approx(wider.before.model_flops, rel=1e-2)


PUBLISHED = {
    "Mixtral": (
        "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 "
        "--group-query-attention --num-query-groups 8 --vocab-size 32000 --num-experts 8 "
        "--moe-router-topk 2",
        "46.7 B parameters, 12.9 B activated",
    ),
    "Qwen3-MoE": (
        "--num-layers 48 --hidden-size 2048 --ffn-hidden-size 6144 --moe-ffn-hidden-size 768 "
        "--num-attention-heads 32 --kv-channels 128 --qk-layernorm --group-query-attention "
        "--num-query-groups 4 --vocab-size 151936 --num-experts 128 --moe-router-topk 8",
        "30.5 B parameters, 3.35 B activated",
    ),
    "DeepSeek": (
        "--num-layers 60 --hidden-size 5120 --ffn-hidden-size 12288 --moe-ffn-hidden-size 1536 "
        "--num-attention-heads 128 --multi-latent-attention --q-lora-rank 1536 --kv-lora-rank 512 "
        "--qk-head-dim 128 --qk-pos-emb-head-dim 64 --v-head-dim 128 --kv-channels 16 "
        "--qk-layernorm --vocab-size 102400 --num-experts 160 --moe-layer-freq ([0]*1+[1]*59) "
        "--moe-router-topk 6 --moe-shared-expert-intermediate-size 3072",
        "236 B parameters, 21.4 B activated",
    ),
}
"""Command lines of Mixtral 8x7B, Qwen3-30B-A3B and DeepSeek-V2, and the sizes that they state."""
OF_ALL = (
    "--swiglu --disable-bias-linear --normalization RMSNorm --position-embedding-type rope --bf16 "
    "--seq-length 4096 --max-position-embeddings 4096 --untie-embeddings-and-output-weights "
    "--micro-batch-size 1 --global-batch-size 256 --expert-model-parallel-size 8"
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_command_lines_are_planned(output, name: str) -> None:
    """As they are, without the flag; and with README's line, which keeps the FLOPs."""
    options, size = PUBLISHED[name]
    text = output(options, OF_ALL, CLUSTER)
    assert text.startswith("Best    pos1, ") and f"without it {size}" in text
    assert "- --scmoe-shortcut-position pos1 for the memory: the command line has none" in text
    readme = (DOCS.parent / "README.md").read_text("utf-8")
    advised = re.search(rf"^{name} +(--scmoe.*?)(?:   \(.*)?$", readme, re.MULTILINE)[1]  # type: ignore[index]
    assert "and 1.00 x the FLOPs" in output(options, OF_ALL, CLUSTER, advised)
    if "it has its shared expert" not in readme.split(name)[-1].splitlines()[0]:
        assert f"--moe-router-topk {advised.split()[3]} " in text  # the plan advises the same


def test_a_variant_without_a_shortcut_is_counted_as_it_stands(planned, output) -> None:
    """MoE++ has no shared expert, which the position whose times are predicted would imply."""
    moepp = MODEL.replace("--moe-router-topk 1", "--moe-layer-freq 1 --scmoe-preset moepp")
    args, plan = planned(moepp, CLUSTER)
    both = twin(args)
    assert both is not None and plan.parameters == both.before.parameters
    shared, norm, gate = 3 * 64 * args.ffn_hidden_size, 64, 64
    assert both.after.parameters - plan.parameters == args.num_layers * (shared + norm + gate)
    _, moved = planned(moepp, CLUSTER, "--scmoe-shortcut-position pos1")
    assert moved.memory.total_bytes > plan.memory.total_bytes
    assert moved.predictions == plan.predictions and moved.typed == plan.typed
    text = output(moepp, CLUSTER)
    assert "MoE with 16 experts, top-2\n" in text
    assert "pos1 for times, not for parameters and memory: the command line has none" in text


def test_a_shared_expert_that_was_there_is_nothing_new(planned) -> None:
    args, plan = planned(MIXTRAL, EQUAL, CLUSTER)
    assert plan.typed == stock_seconds(plan.model, wider=False, shared_expert=True)
    (line,) = what_the_flag_changes(args)
    assert "1.00 x the FLOPs" in line


def test_a_local_tokenizer_is_read(output, tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<eod>": 2}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eod>").save_pretrained(tmp_path)
    options = MIXTRAL.replace("--vocab-size 500", "--tokenizer-type HuggingFaceTokenizer")
    text = output(options, f"--tokenizer-model {tmp_path}", EQUAL, CLUSTER)
    assert text == output(MIXTRAL.replace("500", "3"), EQUAL, CLUSTER)


def test_stock_command_lines_are_planned_too(output) -> None:
    text = output(MODEL, CLUSTER)
    assert "--scmoe-shortcut-position pos2 for the memory" in text
    assert "over top-2" in text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (f"{MODEL} {POS2}", "The layout needs --cluster-nodes, --cluster-gpus-per-node"),
        (f"{MODEL} {POS2} --cluster-nodes 0 --cluster-gpus-per-node 8", "--cluster-nodes"),
        (
            f"{MODEL} {POS2} --cluster-nodes 1 --cluster-preset a800-nvlink",
            "Times need --cluster-flops-efficiency, --cluster-bandwidth-efficiency",
        ),
        (f"{MODEL} {POS2} {CLUSTER} --cluster-flops-efficiency 1.5", "at most 1"),
        (f"{MODEL} {POS2} {CLUSTER} --cluster-bandwidth-efficiency 40", "at most 1"),
        (
            f"{MODEL} {POS2} {CLUSTER} --cluster-network-gbytes -1",
            "gbytes -1 is not above 0",
        ),
        (
            f"{MODEL} {POS2} {CLUSTER} --cluster-message-us -1",
            "-1 is not at least 0",
        ),
        (
            f"{MODEL} {POS2} {CLUSTER} --expert-model-parallel-size 32",
            "no multiple of --expert-model-parallel-size 32",
        ),
        (f"{MODEL} {POS2} {CLUSTER} --global-batch-size 48", "48"),
        (f"{MODEL} {POS2} {CLUSTER} --moe-layer-freq 1", "use pos1"),
        (f"{MODEL} {POS2} {CLUSTER} --optimizer muon", "--optimizer muon is not counted"),
        (f"{MODEL} {POS2} {CLUSTER} --use-checkpoint-args --load x", "reads no checkpoint"),
        (f"{MODEL} {POS2} {CLUSTER} --clusters 1", "unrecognized arguments: --clusters 1"),
        (f"{MODEL} {POS2} {CLUSTER} --measured nowhere.json", "nowhere.json"),
        (f"{MODEL.replace('--vocab-size 500', '')} {POS2} {CLUSTER}", "--vocab-size"),
        (
            f"{MODEL} {POS2} --cluster-preset a30-pcie --cluster-nodes 2 "
            "--cluster-flops-efficiency 0.5 --cluster-bandwidth-efficiency 0.5 "
            "--expert-model-parallel-size 16",
            "add --cluster-network-gbytes",
        ),
    ],
)
def test_impossible_input_is_one_line(output, capsys, options: str, expected: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        output(options)
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.count("\n") == 1 and expected in error and error.startswith("plan_overlap.py: ")


# The paper. ---------------------------------------------------------------------------------------


def test_two_gates_have_the_rows_and_flops_of_top_2(planned, output) -> None:
    """And the exchanges of both routes; over top-2 they win what they hide."""
    layout = f"{MODEL} --expert-model-parallel-size 8"
    _, plan = planned(layout, CLUSTER, POS2)
    dual = "--scmoe-dual-gating separate"
    _, two = planned(layout, CLUSTER, POS2, dual)
    one, times = plan.model.passes[0], two.model.passes[0]
    assert times.routed == one.routed and times.dense[Step.SHARED_EXPERT] == 0
    unit = two.model.units("pos2")[0]
    assert unit.communication == 2 * plan.model.units("pos2")[0].communication
    best = two.best("pos2")
    wider = stock_seconds(two.model, wider=True, shared_expert=False)
    hidden = sum(cost.hidden for cost in best.passes)
    assert hidden > 0 and wider - best.seconds == pytest.approx(hidden)
    text = output(layout, CLUSTER, POS2, dual)
    assert "two top-1 gates" in text and "over top-1 " in text
    assert "two gates of one expert each have the FLOPs of --moe-router-topk 2" in text


def test_reported_speedups_are_reproduced_but_for_the_documented_ones() -> None:
    rows = [*paper.rows_by_flops(), *paper.rows_by_table()]
    missed = {row.what for row in rows if max(abs(deviation) for deviation in row.deviations) > 0.1}
    # Table 4 states no share; with 15 % the formula has top-3 far too slow.
    assert missed == {"top-3 over top-2", "ScMoE-2 over top-2"}
    # What stands on a stated share of communication and a stated hidden share.
    stated = [row for row in rows if "hidden" in row.what]
    assert len(stated) == 5
    assert max(abs(deviation) for row in stated for deviation in row.deviations) < 0.041


def test_rows_that_calibrate_come_out_as_they_went_in() -> None:
    for what, (top_1, shared_expert) in {
        "training": (1.27, 1.24),
        "inference": (1.39, 1.35),
    }.items():
        model = paper.TABLE_1[what]
        assert model.top_2 / (model.rest + 0.5) == pytest.approx(top_1)
        assert model.speedup(0) == pytest.approx(shared_expert)
        assert model.hidden(model.speedup(0.3)) == pytest.approx(0.3)


def test_share_of_a_pair_is_the_stated_one() -> None:
    routed = paper.pair_by_flops(paper.GPT2_MEDIUM, 0.15).passes[0].wider
    assert routed.total == pytest.approx(1)
    assert routed.dispatch + routed.combine == pytest.approx(0.15)


def test_documented_tables_are_those_of_the_program() -> None:
    assert paper.format_table() in (DOCS / "planner.md").read_text()

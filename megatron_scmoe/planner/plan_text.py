"""A plan as text and as JSON, with everything that was assumed."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scmoe.model.specs import moe_layer_pattern
from megatron_scmoe.overlap.schedule import default_slots
from megatron_scmoe.planner.cluster import PRESETS
from megatron_scmoe.planner.copies import copies_of
from megatron_scmoe.planner.iteration import Race, Racer
from megatron_scmoe.planner.measured import TOLERANCE
from megatron_scmoe.planner.memory import RankMemory, activation_remarks
from megatron_scmoe.planner.plan import LARGEST_EP, Degree, Plan, TimesFrom
from megatron_scmoe.planner.predict import Model, Prediction
from megatron_scmoe.planner.times import exchange_bytes, tokens_per_rank
from megatron_scmoe.planner.twin import what_the_flag_changes
from megatron_scmoe.words import size, table

GIB = 2**30
LARGE_BUCKET = 0.5
"""Share of the gradients in the last bucket that is worth a word."""


def as_text(
    args: Namespace, config: TransformerConfig, source: TimesFrom, plan: Plan, notes: Sequence[str]
) -> str:
    """Tables to read."""
    parts = [
        "\n".join([_verdict(args, config, plan), *what_the_flag_changes(args)]),
        _head(args, config, plan),
        _parts_table(config, plan.model),
        _copies_table(args, config),
        _positions_table(config, plan),
        _race_table(args, config, plan),
        _degrees_table(plan),
        _larger_table(plan),
        _comparison_table(source, plan),
        _memory_table(args, plan),
        "Assumed\n"
        + "\n".join(f"- {line}" for line in assumptions(args, config, source, plan, notes)),
    ]
    return "\n\n".join(part for part in parts if part)


def as_json(
    args: Namespace, config: TransformerConfig, source: TimesFrom, plan: Plan, notes: Sequence[str]
) -> dict[str, Any]:
    """The same numbers; seconds and bytes."""
    forward, backward = plan.model.passes[0], plan.model.passes[-1]
    return {
        "layout": _layout(args, config),
        "parameters": plan.parameters,
        "tokens_per_rank": tokens_per_rank(args, config),
        "rows_of_a_token": asdict(copies_of(args, config, config.moe_router_topk)),
        "seconds": {
            name: {
                **{step.value: times.dense[step] for step in plan.model.operators},
                **times.routed._asdict(),
                "wider": times.wider._asdict(),
            }
            for name, times in (("forward", forward), ("backward", backward))
        },
        "rest_seconds": plan.model.rest,
        "communication_share": communication_share(plan.model),
        "predictions": [
            {
                **_prediction(prediction, prediction.slots == plan.best(position).slots),
                "speedup_over_typed": plan.over_typed(prediction),
            }
            for position, slots in plan.predictions.items()
            for prediction in slots
        ],
        "refused": plan.refused,
        "first_misfit": {position: plan.first_misfit(position) for position in plan.predictions},
        "degrees": [_degree(degree) for degree in plan.degrees],
        "extrapolated": [
            {
                "gpus": larger.gpus,
                "num_experts": larger.experts,
                "parameters": larger.parameters,
                **_degree(larger.degree),
                "memory": _memory(larger.memory),
            }
            for larger in plan.larger
        ],
        "comparisons": [
            {**comparison._asdict(), "deviation": comparison.deviation}
            for comparison in plan.comparisons
        ],
        "data_parallelism": None if plan.race is None else _race(plan.race),
        "memory": _memory(plan.memory),
        "assumptions": assumptions(args, config, source, plan, notes),
    }


def communication_share(model: Model) -> float:
    """Of the time of the top-(K+1) MoE, experts and exchanges: what the paper states."""
    total = sum(times.wider.total for times in model.passes)
    experts = sum(times.wider.experts for times in model.passes)
    return 1 - experts / total if total else 0.0


def assumptions(
    args: Namespace, config: TransformerConfig, source: TimesFrom, plan: Plan, notes: Sequence[str]
) -> list[str]:
    """One line each."""
    lines = list(notes)
    if source.measurement is not None:
        lines.append(f"operator times measured: {source.measurement.source}")
    else:
        lines.append(
            f"compute: FLOPs at {args.cluster_flops_efficiency:.0%} of "
            f"{args.cluster_tflops:g} TFLOP/s, the same share for every operator and for backward, "
            "which has twice the FLOPs; norms, routing, permutation and merge take no time"
        )
        lines.append("attention is causal over the whole sequence; no document masks, no windows")
    if source.cluster is not None:
        network = args.cluster_network_gbytes
        lines.append(
            f"all-to-all: {args.cluster_intra_node_gbytes:g} GB/s in the node, "
            f"{'unknown' if network is None else f'{network:g} GB/s'} between nodes, for each GPU "
            f"and direction, at {args.cluster_bandwidth_efficiency:.0%}; both at the same time; "
            f"{args.cluster_message_us:g} us for each peer; full bisection, no other traffic"
        )
    if args.cluster_preset is not None:
        lines.append(f"preset {args.cluster_preset}: {PRESETS[args.cluster_preset].source}")
    lines += [
        "routing is uniform, so that every rank has the same load; no rank is late",
        "an all-to-all runs at full speed beside compute, and slows it down by nothing",
        "experts and exchanges of the baselines grow with the number of rows"
        if source.measurement is not None
        else "the baselines wait for every exchange where it starts",
        f"collectives of TP, CP{', PP and DP' if plan.race is None else ' and PP'}, and the "
        "pipeline's bubble, take no time",
        "forward and backward have an expert slot each (1,3, or 1 if equal); the best slots "
        "minimise the time of each direction on its own",
    ]
    if plan.race is not None:
        lines.append(
            "gradients and gathered parameters: rings at the all-to-all's share of the bandwidths, "
            "between nodes over the links of all GPUs of the group; with overlap they travel where "
            "no all-to-all does, and the last bucket beside nothing; optimizer steps take no time"
        )
    if config.recompute_granularity == "full":
        lines.append(
            "full recomputation: every micro-batch runs the forward pass twice, at the forward slot"
        )
    lines.append(
        f"memory: --optimizer {args.optimizer}; activations are {activation_remarks(config)}"
    )
    if args.extrapolate:
        lines.append(
            "more GPUs: one expert parallel group over all GPUs of a pipeline stage, experts of a "
            "rank and tokens of a rank as here, so that model and batch grow; none of it was "
            "measured"
        )
    return lines


# Text. --------------------------------------------------------------------------------------------


def _verdict(args: Namespace, config: TransformerConfig, plan: Plan) -> str:
    """What to do, in one line."""
    best = plan.fastest
    if best is None:
        return "Best    none: no position can be had, see below"
    over, typed = best.over_wider, plan.over_typed(best)
    hidden = "all hidden" if best.fits else f"{best.hidden_share:.0%} hidden"
    line = (
        f"Best    {best.position}, slot {best.slots}: {over:.2f}x over {_wider(config)}, "
        f"{typed:.2f}x over the command line as it stands, {hidden}, "
        f"{plan.memory.total_bytes / GIB:.0f} GiB"
    )
    memory = args.cluster_memory_gib
    if memory is not None and plan.memory.total_bytes > memory * GIB:
        line += f", which do not fit in {memory:g}"
    lines = [line]
    if typed < 1:
        lines.append("        SLOWER than stock as it stands")
    if plan.race is not None:
        lines += _lost_iteration(_wider(config), plan.race)
    return "\n".join(lines)


def _lost_iteration(wider: str, race: Race) -> list[str]:
    """A line where micro-batches are faster and an iteration of them is not, with what helps."""
    enough = race.now(race.shortcut).wins_from(race.now(race.wider))
    if enough is None or enough <= race.num_microbatches:
        return []
    cures = [f"{enough} micro-batches (--global-batch-size)"]
    with_overlap = race.shortcut.overlapped.wins_from(race.wider.overlapped)
    if not race.overlaps and with_overlap is not None and with_overlap < enough:
        few = with_overlap <= race.num_microbatches
        cures.insert(0, "--overlap-grad-reduce" + ("" if few else f" with {with_overlap}"))
    return [
        f"        SLOWER than {wider} in an iteration of {_micro_batches(race.num_microbatches)}, "
        f"{race.over(race.wider):.2f}x: the gradients of its shared experts cross the link too; "
        f"it takes {', or '.join(cures)}, or a smaller --moe-shared-expert-intermediate-size"
    ]


def _head(args: Namespace, config: TransformerConfig, plan: Plan) -> str:
    pattern = moe_layer_pattern(config)
    layout = _layout(args, config)
    shared = plan.counted.transformer.moe_shared_expert_intermediate_size
    one = f"top-{config.moe_router_topk}" + (" and a shared expert" if shared else "")
    gates = "two top-1 gates" if plan.model.further else one
    return "\n".join(
        [
            f"Model   {plan.parameters / 1e9:.3g} B parameters; {len(pattern)} layers, "
            f"{sum(pattern)} of them MoE with {config.num_moe_experts} experts, "
            f"{gates}",
            "Layout  " + ", ".join(f"{name} {ranks}" for name, ranks in layout.items()),
            f"Batch   {args.micro_batch_size} x {args.seq_length} tokens, "
            f"{tokens_per_rank(args, config)} on a rank",
        ]
    )


def _parts_table(config: TransformerConfig, model: Model) -> str:
    passes = (model.passes[0], model.passes[-1])
    rows = [[step.value, *(_ms(times.dense[step]) for times in passes)] for step in model.operators]
    for name in ("experts", "dispatch", "combine"):
        rows.append([name, *(_ms(getattr(times.routed, name)) for times in passes)])
    return (
        "Times of one pair of layers, one micro-batch (ms)\n"
        + table(["", "forward", "backward"], rows)
        + f"\ncommunication is {communication_share(model):.0%} of the MoE's time with "
        f"{_wider(config)}"
    )


def _copies_table(args: Namespace, config: TransformerConfig) -> str:
    own = copies_of(args, config, config.moe_router_topk)
    ranks, local = config.expert_model_parallel_size, own.ranks_per_node
    if ranks == 1:
        return ""
    each = ("expert", own.experts), ("rank", own.ranks), ("node", own.nodes)
    rows = []
    handed_on = sum(exchange_bytes(args, config, config.moe_router_topk, "rank"))
    for name, copies in each:
        sent = sum(exchange_bytes(args, config, config.moe_router_topk, name))
        between_nodes = sent * (1 - local / ranks)
        between_ranks = sent * (1 - 1 / ranks)
        if name == "node":
            between_ranks = between_nodes + handed_on * (1 - 1 / local)
        mark = "*" if name == args.scmoe_dispatch_copies else ""
        rows.append([name + mark, f"{copies:.2f}", size(between_ranks), size(between_nodes)])
    how = "counted" if own.counted else "any experts equally likely"
    return (
        f"Rows of a token ({how}), and what a rank sends in a dispatch and a combine of a "
        "micro-batch; * --scmoe-dispatch-copies\n"
        + table(["a row for every", "rows", "to other ranks", "to other nodes"], rows)
    )


def _positions_table(config: TransformerConfig, plan: Plan) -> str:
    shared = _top_k(config)
    header = ["position", "slot", "window", "communication", "exposed", "hidden", "pair"]
    header += [f"over {_wider(config)}", f"over {shared}", "over yours", "model"]
    rows = []
    for position, slots in plan.predictions.items():
        units = plan.model.units(position)
        default = default_slots(position)
        for prediction in slots:
            marks = "*" if prediction.slots == default else ""
            marks += "+" if prediction.slots == plan.best(position).slots else ""
            rows.append(
                [
                    position,
                    f"{prediction.slots}{marks}",
                    _sides(plan.model, prediction),
                    " | ".join(
                        _ms(sum(getattr(route, n) for unit in units for route in unit.routes))
                        for n in ("dispatch", "combine")
                    ),
                    _ms(prediction.exposed),
                    f"{prediction.hidden_share:.0%}",
                    _ms(prediction.seconds),
                    f"{prediction.over_wider:.2f}x",
                    f"{prediction.over_shared:.2f}x",
                    f"{plan.over_typed(prediction):.2f}x",
                    f"{prediction.model_over_wider:.2f}x",
                ]
            )
    refused = "".join(f"\n{position}: {why}" for position, why in plan.refused.items())
    return (
        "Positions and slots, forward and backward together (ms; window before | after the "
        "experts, dispatch | combine)\n"
        + table(header, rows)
        + "\n* default slot, + best slots; yours: the command line as it stands; "
        f"model: over {_wider(config)} with all other layers" + refused
    )


def _race_table(args: Namespace, config: TransformerConfig, plan: Plan) -> str:
    """Iterations, with what data parallelism sends."""
    race, best = plan.race, plan.fastest
    if race is None or best is None:
        return ""
    names = {
        f"{best.position}, slot {best.slots}": race.shortcut,
        _wider(config): race.wider,
        _top_k(config): race.shared,
    }
    rows = [
        [
            name,
            size(each.traffic.sent),
            _ms(each.traffic.gradients),
            _ms(each.traffic.parameters),
            _ms(each.waiting.exposed),
            _ms(each.overlapped.exposed),
            _ms(race.now(each).seconds(race.num_microbatches)),
            f"{race.over(each):.2f}x",
        ]
        for name, each in names.items()
    ]
    header = ["", "a GPU sends", "gradients", "parameters", "exposed"]
    header += ["overlapped", "iteration", "shortcut over it"]
    used = "with" if race.overlaps else "without"
    return "\n".join(
        [
            f"Data parallelism: an iteration of {_micro_batches(race.num_microbatches)}, {used} "
            "--overlap-grad-reduce (ms)",
            table(header, rows),
            "exposed: what compute waits for without overlap; overlapped: with "
            f"--overlap-grad-reduce{' --overlap-param-gather' * args.overlap_param_gather}",
            f"faster than {_wider(config)} {_wins(race.shortcut, race.wider)}",
            *(
                [
                    f"the last bucket has {last:.0%} of it, which nothing is left to hide: "
                    "take a smaller --ddp-bucket-size"
                ]
                if (last := race.shortcut.traffic.last_bucket) > LARGE_BUCKET
                else []
            ),
        ]
    )


def _wins(ours: Racer, theirs: Racer) -> str:
    waiting = ours.waiting.wins_from(theirs.waiting)
    overlapped = ours.overlapped.wins_from(theirs.overlapped)
    if waiting is None or overlapped is None:
        return "at no number of micro-batches"
    return f"from {_micro_batches(waiting)} on, from {overlapped} on with --overlap-grad-reduce"


def _micro_batches(number: int) -> str:
    return f"{number} micro-batch{'' if number == 1 else 'es'}"


def _degrees_table(plan: Plan) -> str:
    if not plan.degrees:
        return ""
    positions = list(plan.predictions)
    rows = [
        [
            str(degree.ranks),
            f"{degree.leaving_node:.0%}",
            _ms(degree.times.routed.dispatch),
            _ms(degree.times.routed.combine),
            *(f"{degree.best[position].hidden_share:.0%}" for position in positions),
        ]
        for degree in plan.degrees
    ]
    header = ["EP", "leaves node", "dispatch", "combine"]
    lines = [
        "EP degrees: one all-to-all (ms), and the share that the best slots hide",
        table([*header, *positions], rows),
    ]
    largest = plan.degrees[-1].ranks
    for position in positions:
        misfit = plan.first_misfit(position)
        if misfit is None:
            lines.append(
                f"{position}: communication fits up to EP {largest}, the largest looked at"
            )
        else:
            lines.append(f"{position}: communication no longer fits from EP {misfit} on")
    if largest < LARGEST_EP:
        lines.append("beyond that a group leaves the node, and no network is known")
    return "\n".join(lines)


def _larger_table(plan: Plan) -> str:
    if not plan.larger:
        return ""
    positions = list(plan.predictions)
    rows = [
        [
            str(larger.gpus),
            str(larger.degree.ranks),
            str(larger.experts),
            f"{larger.parameters / 1e9:.3g}",
            f"{larger.degree.leaving_node:.0%}",
            _ms(larger.degree.times.routed.dispatch),
            *(
                f"{best.hidden_share:.0%} {best.over_wider:.2f}x"
                for best in map(larger.degree.best.__getitem__, positions)
            ),
            f"{larger.memory.total_bytes / GIB:.1f}",
        ]
        for larger in plan.larger
    ]
    header = ["GPUs", "EP", "experts", "B params", "leaves node", "dispatch", *positions, "GiB/GPU"]
    return (
        "Extrapolated, not measured: hidden share and speed-up of the pair at the best slots (ms)\n"
        + table(header, rows)
    )


def _comparison_table(source: TimesFrom, plan: Plan) -> str:
    if not plan.comparisons:
        return ""
    rows = [
        [
            comparison.name,
            _ms(comparison.predicted),
            _ms(comparison.measured),
            f"{comparison.deviation:+.1%}",
        ]
        for comparison in plan.comparisons
    ]
    agree = sum(comparison.agrees for comparison in plan.comparisons)
    return (
        "Predicted against measured (ms)\n"
        + table(["run", "predicted", "measured", "deviation"], rows)
        + f"\n{agree} of {len(rows)} within {TOLERANCE:.0%}"
    )


def _memory_table(args: Namespace, plan: Plan) -> str:
    memory = plan.memory
    rows = [
        [name.replace("_estimate", " (estimate)"), f"{number / GIB:.2f}"]
        for name, number in _memory_parts(memory).items()
    ]
    text = (
        f"Memory of a GPU (GiB), pipeline stage {memory.pipeline_rank}, which needs most; "
        f"{memory.parameters / 1e9:.3g} B parameters\n" + table(["", "GiB"], rows)
    )
    if args.cluster_memory_gib is not None:
        fits = memory.total_bytes <= args.cluster_memory_gib * GIB
        text += f"\n{'fits' if fits else 'does not fit'} in {args.cluster_memory_gib:g} GiB"
    return text


def _layout(args: Namespace, config: TransformerConfig) -> dict[str, int]:
    return {
        "GPUs": args.world_size,
        "per node": args.cluster_gpus_per_node,
        "TP": config.tensor_model_parallel_size,
        "CP": config.context_parallel_size,
        "PP": config.pipeline_model_parallel_size,
        "EP": config.expert_model_parallel_size,
        "expert TP": config.expert_tensor_parallel_size,
        "DP": args.data_parallel_size,
    }


def _top_k(config: TransformerConfig) -> str:
    has_shared = config.moe_shared_expert_intermediate_size is not None
    return f"top-{config.moe_router_topk}" + ("+shared" if has_shared else "")


def _wider(config: TransformerConfig) -> str:
    return f"top-{config.moe_router_topk + 1}"


def _sides(model: Model, prediction: Prediction) -> str:
    before = after = 0.0
    for times, (slot, _) in zip(model.passes, model.slots_of_passes(prediction.slots), strict=True):
        dense = times.unit(prediction.position).dense
        before += sum(dense[:slot])
        after += sum(dense[slot:])
    return f"{_ms(before)} | {_ms(after)}"


def _ms(seconds: float) -> str:
    """Milliseconds, three digits."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


# JSON. --------------------------------------------------------------------------------------------


def _prediction(prediction: Prediction, best: bool) -> dict[str, Any]:
    return {
        "position": prediction.position,
        "slots": prediction.slots._asdict(),
        "best": best,
        "passes": [cost._asdict() for cost in prediction.passes],
        "seconds": prediction.seconds,
        "exposed_seconds": prediction.exposed,
        "hidden_share": prediction.hidden_share,
        "speedup_over_wider": prediction.over_wider,
        "speedup_over_shared": prediction.over_shared,
        "model_speedup_over_wider": prediction.model_over_wider,
    }


def _degree(degree: Degree) -> dict[str, Any]:
    return {
        "expert_model_parallel_size": degree.ranks,
        "leaving_node": degree.leaving_node,
        **degree.times.routed._asdict(),
        "best": [_prediction(best, True) for best in degree.best.values()],
    }


def _race(race: Race) -> dict[str, Any]:
    """Seconds and bytes of an iteration."""
    ours = race.shortcut
    return {
        "num_microbatches": race.num_microbatches,
        "overlap_grad_reduce": race.overlaps,
        **{
            name: {
                **each.traffic._asdict(),
                "micro_batch": each.waiting.micro_batch,
                "exposed": each.waiting.exposed,
                "exposed_with_overlap": each.overlapped.exposed,
                "speedup_over_it": race.over(each),
                "wins_from": ours.waiting.wins_from(each.waiting),
                "wins_from_with_overlap": ours.overlapped.wins_from(each.overlapped),
            }
            for name, each in (("shortcut", ours), ("wider", race.wider), ("shared", race.shared))
        },
    }


def _memory(memory: RankMemory) -> dict[str, float]:
    return {
        "stage": memory.pipeline_rank,
        "parameters": memory.parameters,
        **_memory_parts(memory),
    }


def _memory_parts(memory: RankMemory) -> dict[str, float]:
    """Bytes."""
    return {
        "weights": memory.weight_bytes,
        "gradients": memory.gradient_bytes,
        "optimizer": memory.optimizer_bytes,
        "activations_estimate": memory.activation_bytes,
        "total": memory.total_bytes,
    }

"""Every layout that cannot work, in one line before any process group exists.

Megatron finds most of these too, but late (process groups, model, first batch), on every rank, or
without naming an option. TYPED looks at the command line as it was typed, in front of the host's
own checks, and leaves what is missing to the host; RESOLVED looks at what they resolved. A cut unit
is refused where units are made (model/specs.py). Host lines are those of megatron-core 0.19.2.
"""

import math
import os
import socket
from argparse import Namespace
from collections.abc import Callable, Iterable

from megatron.core.transformer.moe import fused_a2a
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron_scmoe.checks.refusal import Found, Refusal
from megatron_scmoe.words import flag

TP, CP, PP = ("tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size")
EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"
STAGES = "give every stage its layers with --pipeline-model-parallel-layout"


def _product(args: Namespace, sizes: Iterable[str]) -> tuple[int, str]:
    """The product of some sizes, and how it is written: '4 = --this-size 2 x --that-size 2'."""
    values = {dest: getattr(args, dest) for dest in sizes}
    product = math.prod(values.values())
    factors = [f"{flag(dest)} {value}" for dest, value in values.items() if value > 1]
    text = " x ".join(factors)
    return product, text if len(factors) == 1 else f"{product} = {text}"


def _next_multiple(value: int, of: int) -> int:
    return -(-value // of) * of


def _has_experts(args: Namespace) -> bool:
    return bool(args.num_experts)


# As typed. --------------------------------------------------------------------------------------


def _sides(args: Namespace) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Sizes of the dense layers' ranks and of the experts' (core/parallel_state.py:822, 880)."""
    dense = (TP, CP, PP)
    return dense, (ETP if args.expert_tensor_parallel_size else TP, EP, PP)


def _ranks(side: int) -> Callable[[Namespace], Found]:
    def when(args: Namespace) -> Found:
        ranks, text = _product(args, _sides(args)[side])
        if args.world_size % ranks == 0 or (side and not _has_experts(args)):
            return False
        return {"text": text, "enough": _next_multiple(args.world_size, ranks)}

    return when


def _other_data_parallel_ranks(args: Namespace) -> Found:
    if not args.use_tp_pp_dp_mapping or not _has_experts(args) or getattr(args, PP) == 1:
        return False
    dense, experts = (args.world_size // _product(args, side)[0] for side in _sides(args))
    return dense != experts and {"dense": dense, "experts": experts}


def _uneven_experts(args: Namespace) -> Found:
    experts, size = args.num_experts, args.expert_model_parallel_size
    if not experts or experts % size == 0:
        return False
    return {"fits": math.gcd(experts, size), "enough": _next_multiple(experts, size)}


def _batch(kind: str) -> Refusal:
    """A step is a whole number of micro-batches on every data parallel rank."""
    option = flag(f"{kind}global_batch_size")

    def when(args: Namespace) -> Found:
        batch = getattr(args, f"{kind}global_batch_size") or args.global_batch_size
        micro_dest = f"{kind}micro_batch_size"
        if getattr(args, micro_dest) is None:
            micro_dest = "micro_batch_size"
        micro, ranks = getattr(args, micro_dest), args.world_size // _product(args, (TP, CP, PP))[0]
        if batch is None or micro is None or (not kind and args.decrease_batch_size_if_needed):
            return False
        step = micro * ranks
        return (batch < 1 or batch % step != 0) and {
            "batch": batch,
            "step": step,
            "micro": f"{flag(micro_dest)} {micro}",
            "ranks": ranks,
            "nearest": max(_next_multiple(batch, step), step),
        }

    return Refusal(
        when,
        f"{option} {{batch}} is no multiple of {{step}} = {{micro}} x {{ranks}} data parallel "
        "ranks",
        f"use for example {option} {{nearest}}",
    )


def _unfit_stage_layout(args: Namespace) -> Found:
    if args.num_layers is None or args.hybrid_layer_pattern is not None:
        return False
    if (layout := args.pipeline_model_parallel_layout) is None:
        return False
    try:
        PipelineParallelLayerLayout.from_str(layout, getattr(args, PP)).validate_layer_layout(
            args.num_layers, args.mtp_num_layers
        )
    except (AssertionError, ValueError) as error:
        return {"error": str(error).removesuffix(".")}
    return False


def _splits_layers(args: Namespace) -> bool:
    """Whether the host counts out the layers of every (virtual) stage."""
    return (
        args.num_layers is not None
        and args.hybrid_layer_pattern is None
        and args.pipeline_model_parallel_layout is None
    )


def _split(args: Namespace) -> tuple[int, int, list[int]]:
    """Layers left for stages without a number of their own, these stages, the others' layers."""
    first, last = args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers
    own = [count for count in (first, last) if count is not None]
    rest = args.num_layers - sum(own)
    rest += int(args.account_for_embedding_in_pipeline_split)
    rest += int(args.account_for_loss_in_pipeline_split)
    return rest, getattr(args, PP) - len(own), own


def _split_text(args: Namespace) -> dict[str, object]:
    rest, equal, _ = _split(args)
    layers = f"--num-layers {args.num_layers}"
    what = layers if rest == args.num_layers else f"{rest} layers (of {layers})"
    return {"what": what, "equal": equal}


def _unfilled_stages(args: Namespace) -> Found:
    if not _splits_layers(args):
        return False
    rest, equal, own = _split(args)
    unfilled = min([rest, equal, *own]) < 0 or 0 in own or bool(rest) != bool(equal)
    return unfilled and _split_text(args)


def _uneven_stages(args: Namespace) -> Found:
    if not _splits_layers(args):
        return False
    rest, equal, _ = _split(args)
    return equal > 0 and rest % equal != 0 and _split_text(args)


def _virtual_alone(args: Namespace) -> bool:
    layers = args.num_layers_per_virtual_pipeline_stage
    return (
        _splits_layers(args)
        and getattr(args, PP) == 1
        and (
            (args.num_virtual_stages_per_pipeline_rank or 1) > 1
            or (layers or args.num_layers) < args.num_layers
        )
    )


def _uneven_virtual(dest: str) -> Callable[[Namespace], Found]:
    def when(args: Namespace) -> Found:
        if not _splits_layers(args) or (size := getattr(args, dest)) is None:
            return False
        rest, equal, own = _split(args)
        counts = [*own, *([rest // equal] if equal else [])]
        uneven = [count for count in counts if count % size]
        return bool(uneven) and {"count": uneven[0], "fits": math.gcd(uneven[0], size)}

    return when


def _no_blocks(args: Namespace) -> Found:
    """Nodes are blocks of consecutive ranks; so are expert parallel ranks, each of them as many as
    share its experts (core/parallel_state.py:880)."""
    if args.scmoe_dispatch_copies != "node":
        return False
    local = args.scmoe_ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", 0))
    each = args.expert_tensor_parallel_size or getattr(args, TP)
    group = getattr(args, EP) * each
    if not local or (group % local == 0 and local % each == 0):  # else no launcher has told
        return False
    return {"local": local, "group": group, "text": _product(args, (_sides(args)[1][0], EP))[1]}


def _no_interface(args: Namespace) -> Found:
    """gloo would end on this node, with a line of its C++, while the other nodes wait."""
    there = [name for _, name in socket.if_nameindex()]
    asked = os.environ.get("GLOO_SOCKET_IFNAME", "")
    missing = [name for name in asked.split(",") if name and name not in there]
    if not missing or args.world_size == 1:
        return False
    return {"missing": ",".join(missing), "host": socket.gethostname(), "there": ", ".join(there)}


TYPED = (
    Refusal(
        _no_interface,
        "GLOO_SOCKET_IFNAME names {missing}, which {host} does not have",
        "name one of {there} there, or unset it",
    ),
    *(
        Refusal(
            _ranks(side),
            "The number of ranks, {world_size}, is no multiple of {text}",
            "start {enough} (torchrun --nnodes, --nproc-per-node) or use smaller sizes",
        )
        for side in (0, 1)
    ),
    *(
        Refusal(
            lambda args, dest=dest: getattr(args, dest) is not None and getattr(args, PP) == 1,
            f"{flag(dest)} {{{dest}}} speaks of pipeline stages, and there is one",
            "drop it, or add --pipeline-model-parallel-size",
        )
        for dest in ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
    ),
    Refusal(
        _other_data_parallel_ranks,
        "--use-tp-pp-dp-mapping with pipeline parallelism wants as many data parallel ranks for "
        "experts as for the rest, and there are {experts} and {dense}",
        "drop it",
    ),
    Refusal(
        _no_blocks,
        "--scmoe-dispatch-copies node wants expert parallel groups that fill whole nodes, and "
        "{text} does not fill nodes of {local} ranks",
        "use rank, other sizes, or say how many ranks share a node with --scmoe-ranks-per-node",
    ),
    Refusal(
        lambda args: args.expert_model_parallel_size > 1 and not args.num_experts,
        "--expert-model-parallel-size {expert_model_parallel_size} without experts",
        "add --num-experts, or use --expert-model-parallel-size 1",
    ),
    Refusal(
        _uneven_experts,
        "--num-experts {num_experts} is no multiple of --expert-model-parallel-size "
        "{expert_model_parallel_size}, and every rank holds as many experts",
        "use --expert-model-parallel-size {fits}, or --num-experts {enough}",
    ),
    _batch(""),
    _batch("eval_"),
    Refusal(
        _unfit_stage_layout,
        "--pipeline-model-parallel-layout '{pipeline_model_parallel_layout}' does not fit "
        "--num-layers {num_layers} and --pipeline-model-parallel-size "
        "{pipeline_model_parallel_size}",
        "{error}",
    ),
    Refusal(
        _virtual_alone,
        "Virtual pipeline stages need --pipeline-model-parallel-size > 1",
        "raise it, or drop --num-layers-per-virtual-pipeline-stage and "
        "--num-virtual-stages-per-pipeline-rank",
    ),
    Refusal(
        _unfilled_stages,
        "{what} do not fill {equal} pipeline stages of --pipeline-model-parallel-size "
        "{pipeline_model_parallel_size}",
        "change --decoder-first-pipeline-num-layers or --decoder-last-pipeline-num-layers, or "
        f"{STAGES}",
    ),
    Refusal(
        _uneven_stages,
        "{what} cannot be split evenly over {equal} pipeline stages of "
        "--pipeline-model-parallel-size {pipeline_model_parallel_size}",
        STAGES,
    ),
    Refusal(
        _uneven_virtual("num_virtual_stages_per_pipeline_rank"),
        "The {count} layers of a pipeline rank cannot be split evenly over "
        "--num-virtual-stages-per-pipeline-rank {num_virtual_stages_per_pipeline_rank}",
        f"use {{fits}}, or {STAGES}",
    ),
    Refusal(
        _uneven_virtual("num_layers_per_virtual_pipeline_stage"),
        "The {count} layers of a pipeline rank are no multiple of "
        "--num-layers-per-virtual-pipeline-stage {num_layers_per_virtual_pipeline_stage}",
        f"use {{fits}}, or {STAGES}",
    ),
)


# As resolved by the host. -----------------------------------------------------------------------


def _share(
    dest: str, *over: str, applies: Callable[[Namespace], bool] = lambda args: True
) -> Refusal:
    """A number that is divided evenly between ranks: `over` names the sizes."""

    def when(args: Namespace) -> Found:
        value = getattr(args, dest)
        if not applies(args) or value is None:
            return False
        ranks, text = _product(args, over)
        return value % ranks != 0 and {"text": text, "fits": math.gcd(value, ranks)}

    another = f"another {flag(dest)}"
    return Refusal(
        when,
        f"{flag(dest)} {{{dest}}} is no multiple of {{text}}, and every rank takes an equal part",
        f"use {flag(over[0])} {{fits}}, or {another}" if len(over) == 1 else f"use {another}",
    )


def _groups(args: Namespace) -> tuple[int, int, int] | None:
    """Query groups, heads, and tensor parallel ranks, where groups are counted."""
    if not args.group_query_attention or args.multi_latent_attention:
        return None
    return args.num_query_groups, args.num_attention_heads, getattr(args, TP)


def _uneven_groups(args: Namespace) -> Found:
    groups, heads, _ = _groups(args) or (1, 1, 1)
    return heads % groups != 0 and {"fits": math.gcd(heads, groups)}


def _groups_between_ranks(args: Namespace) -> Found:
    groups, _, ranks = _groups(args) or (1, 1, 1)
    return groups % ranks != 0 and ranks % groups != 0 and {"fits": math.gcd(groups, ranks)}


# What --moe-flex-dispatcher-backend needs: the host's name for it, and what to install.
_FLEX_BACKENDS = {
    "deepep": ("HAVE_DEEP_EP", "DeepEP"),
    "hybridep": ("HAVE_HYBRIDEP", "HybridEP (DeepEP's hybrid-ep branch)"),
    "ncclep": ("HAVE_TE_EP", "a Transformer Engine built with NVTE_BUILD_WITH_NCCL_EP=1"),
}


def _flex_backend(args: Namespace) -> str | None:
    if not _has_experts(args) or args.moe_token_dispatcher_type != "flex":
        return None
    return "deepep" if args.moe_enable_deepep else args.moe_flex_dispatcher_backend


def _missing_backend(args: Namespace) -> Found:
    if (backend := _flex_backend(args)) is None:
        return False
    installed, name = _FLEX_BACKENDS[backend]
    return not getattr(fused_a2a, installed) and {"backend": backend, "name": name}


def _micro_batch_groups(kind: str) -> Refusal:
    """core/pipeline_parallel/schedules.py:1133: the interleaved pipeline's groups are full."""
    option = flag(f"{kind}global_batch_size")

    def when(args: Namespace) -> Found:
        if args.virtual_pipeline_model_parallel_size is None:
            return False
        stages = getattr(args, PP)
        group = args.microbatch_group_size_per_vp_stage or stages
        batch = getattr(args, f"{kind}global_batch_size")
        step = getattr(args, f"{kind}micro_batch_size") * args.data_parallel_size
        count = batch // step
        return (count < group or 0 < count % group < stages) and {
            "group": group,
            "batch": batch,
            "count": count,
            "nearest": _next_multiple(count, group) * step,
        }

    return Refusal(
        when,
        f"Virtual pipeline stages take micro-batches in groups of {{group}}, and {option} "
        "{batch} makes {count} for each data parallel rank",
        f"use for example {option} {{nearest}}",
    )


def _optimizer_instances(whose: str, ranks_of: Callable[[Namespace], int]) -> Refusal:
    def when(args: Namespace) -> Found:
        instances, ranks = args.num_distributed_optimizer_instances, ranks_of(args)
        return ranks % instances != 0 and {"ranks": ranks, "fits": math.gcd(instances, ranks)}

    return Refusal(
        when,
        "--num-distributed-optimizer-instances {num_distributed_optimizer_instances} does not "
        f"divide the {{ranks}} {whose}data parallel ranks",
        "use {fits}",
    )


RESOLVED = (
    _share("num_attention_heads", TP),
    _share("ffn_hidden_size", TP),
    _share("padded_vocab_size", TP),
    _share("moe_shared_expert_intermediate_size", TP, applies=_has_experts),
    _share("moe_ffn_hidden_size", ETP, applies=_has_experts),
    _share("seq_length", TP, CP, applies=lambda args: args.sequence_parallel),
    Refusal(
        _uneven_groups,
        "--num-attention-heads {num_attention_heads} is no multiple of --num-query-groups "
        "{num_query_groups}",
        "use --num-query-groups {fits}",
    ),
    Refusal(
        _groups_between_ranks,
        "--num-query-groups {num_query_groups} neither divides --tensor-model-parallel-size "
        "{tensor_model_parallel_size} nor is divided by it",
        "use --tensor-model-parallel-size {fits}",
    ),
    Refusal(
        lambda args: _has_experts(args) and not 1 <= args.moe_router_topk <= args.num_experts,
        "--moe-router-topk {moe_router_topk} is outside 1..{num_experts}, which is --num-experts",
    ),
    Refusal(
        lambda args: (
            _has_experts(args)
            and isinstance(pattern := args.moe_layer_freq, list)
            and len(pattern) != args.num_layers
            and {"listed": len(pattern)}
        ),
        "--moe-layer-freq lists {listed} layers and --num-layers is {num_layers}",
        "make them equal",
    ),
    # core/transformer/moe/moe_layer.py:629 refuses it in the first forward pass.
    Refusal(
        lambda args: (
            _has_experts(args)
            and args.tensor_model_parallel_size > 1
            and not args.sequence_parallel
        ),
        "--tensor-model-parallel-size {tensor_model_parallel_size} with experts needs "
        "--sequence-parallel, or every token would be sent once per tensor parallel rank",
        "add --sequence-parallel",
    ),
    Refusal(
        lambda args: args.context_parallel_size > 1 and args.transformer_impl == "local",
        "--context-parallel-size {context_parallel_size} needs Transformer Engine's attention, and "
        "that a GPU; --transformer-impl local has none that exchanges keys and values",
        "use --context-parallel-size 1",
    ),
    Refusal(
        _missing_backend,
        "--moe-token-dispatcher-type flex with --moe-flex-dispatcher-backend {backend} needs "
        "{name}, which is not installed",
        "install it, or use --moe-token-dispatcher-type alltoall",
    ),
    Refusal(
        lambda args: (
            _flex_backend(args) not in (None, "hybridep")
            and args.expert_tensor_parallel_size * args.expert_model_parallel_size == 1
        ),
        "--moe-token-dispatcher-type flex has nobody to send to with "
        "--expert-model-parallel-size 1",
        "raise it, or use --moe-token-dispatcher-type alltoall",
    ),
    Refusal(
        lambda args: (
            args.virtual_pipeline_model_parallel_size is not None
            and 0 < (args.microbatch_group_size_per_vp_stage or 0) < getattr(args, PP)
        ),
        "--microbatch-group-size-per-virtual-pipeline-stage {microbatch_group_size_per_vp_stage} "
        "is smaller than --pipeline-model-parallel-size {pipeline_model_parallel_size}",
        "use at least {pipeline_model_parallel_size}",
    ),
    _micro_batch_groups(""),
    _micro_batch_groups("eval_"),
    _optimizer_instances("", lambda args: args.data_parallel_size * args.context_parallel_size),
    _optimizer_instances(
        "experts' ", lambda args: args.world_size // _product(args, (ETP, EP, PP))[0]
    ),
)

"""Every layout that cannot work, in one line before any process group exists.

Megatron finds most of these too, but late (process groups, model, first batch), on every rank, or
without naming an option. `check_ranks` looks at the command line as it was typed, in front of the
host's own checks; `check_shares` at what they resolved. A cut unit is refused where units are made
(layer_specs.py). Host lines are those of megatron-core 0.19.2.
"""

import math
from argparse import Namespace
from collections.abc import Callable, Iterable
from typing import NamedTuple

from megatron.core.transformer.moe import fused_a2a
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

TP, CP, PP = ("tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size")
EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"


def check_ranks(args: Namespace) -> None:
    """Refuse a number of ranks, experts, samples or layers that the layout does not divide.

    Args:
        args: parsed, not validated yet; what is missing on it is for the host to say.

    Raises:
        ValueError: one line that says what is wrong and which option mends it.
    """
    _check_positive(args, (TP, CP, PP, EP, ETP, "num_layers", "micro_batch_size"))
    _check_world(args)
    _check_experts(args)
    for kind in ("", "eval_"):
        _check_batch(args, kind)
    _check_stages(args)


def check_shares(args: Namespace) -> None:
    """Refuse dimensions that ranks cannot share, and attention or dispatchers that are not here.

    Args:
        args: parsed and validated.

    Raises:
        ValueError: one line that says what is wrong and which option mends it.
    """
    for share in _SHARES:
        if share.applies(args):
            _check_share(args, share)
    _check_query_groups(args)
    _check_routing(args)
    _check_sequence_parallel(args)
    _check_context_parallel(args)
    _check_dispatcher(args)
    _check_micro_batch_groups(args)
    _check_optimizer_instances(args)


def check_vocabulary(args: Namespace, tokens: int) -> None:
    """Refuse an embedding with fewer rows than the tokenizer has tokens.

    Args:
        args: as the host left it after it has built the tokenizer.
        tokens: the tokenizer's vocabulary size.

    Raises:
        ValueError: one line that says what is wrong and which option mends it.
    """
    if args.padded_vocab_size < tokens:
        enough = _next_multiple(tokens, args.tensor_model_parallel_size)
        raise ValueError(
            f"--padded-vocab-size {args.padded_vocab_size} is less than the {tokens} tokens of the "
            f"tokenizer: use at least {enough}."
        )


class _Share(NamedTuple):
    """A number that is divided evenly between ranks: `over` names the sizes."""

    dest: str
    over: tuple[str, ...]
    applies: Callable[[Namespace], bool] = lambda args: True


def _has_experts(args: Namespace) -> bool:
    return bool(args.num_experts)


_SHARES = (
    _Share("num_attention_heads", (TP,)),
    _Share("ffn_hidden_size", (TP,)),
    _Share("padded_vocab_size", (TP,)),
    _Share("moe_shared_expert_intermediate_size", (TP,), _has_experts),
    _Share("moe_ffn_hidden_size", (ETP,), _has_experts),
    _Share("seq_length", (TP, CP), lambda args: args.sequence_parallel),
)


def _flag(dest: str) -> str:
    return "--" + dest.replace("_", "-")


def _product(args: Namespace, sizes: Iterable[str]) -> tuple[int, str]:
    """The product of some sizes, and how it is written: '4 = --this-size 2 x --that-size 2'."""
    values = {dest: getattr(args, dest) for dest in sizes}
    product = math.prod(values.values())
    factors = [f"{_flag(dest)} {value}" for dest, value in values.items() if value > 1]
    text = " x ".join(factors)
    return product, text if len(factors) == 1 else f"{product} = {text}"


def _check_positive(args: Namespace, dests: Iterable[str]) -> None:
    for dest in dests:
        value = getattr(args, dest)
        if value is not None and value < 1:
            raise ValueError(f"{_flag(dest)} {value} is not at least 1: give it a positive number.")


def _check_share(args: Namespace, share: _Share) -> None:
    value = getattr(args, share.dest)
    ranks, text = _product(args, share.over)
    if value is None or value % ranks == 0:
        return
    remedy = (
        f"use {_flag(share.over[0])} {math.gcd(value, ranks)}, or another {_flag(share.dest)}"
        if len(share.over) == 1
        else f"use another {_flag(share.dest)}"
    )
    raise ValueError(
        f"{_flag(share.dest)} {value} is no multiple of {text}, and every rank takes an equal "
        f"part: {remedy}."
    )


def _check_world(args: Namespace) -> None:
    """core/parallel_state.py:822 and 880: the dense layers' ranks, and the experts'."""
    sides = [(TP, CP, PP)]
    if _has_experts(args):
        sides.append((ETP if args.expert_tensor_parallel_size else TP, EP, PP))
    for sizes in sides:
        ranks, text = _product(args, sizes)
        if args.world_size % ranks:
            raise ValueError(
                f"The number of ranks, {args.world_size}, is no multiple of {text}: start "
                f"{_next_multiple(args.world_size, ranks)} (torchrun --nnodes, --nproc-per-node) "
                "or use smaller sizes."
            )
    dense, experts = (args.world_size // _product(args, side)[0] for side in (sides[0], sides[-1]))
    if args.use_tp_pp_dp_mapping and args.pipeline_model_parallel_size > 1 and dense != experts:
        raise ValueError(
            "--use-tp-pp-dp-mapping with pipeline parallelism wants as many data parallel ranks "
            f"for experts as for the rest, and there are {experts} and {dense}: drop it."
        )


def _check_experts(args: Namespace) -> None:
    experts, size = args.num_experts, args.expert_model_parallel_size
    if size > 1 and not experts:
        raise ValueError(
            f"--expert-model-parallel-size {size} without experts: add --num-experts, or use "
            "--expert-model-parallel-size 1."
        )
    if experts and experts % size:
        raise ValueError(
            f"--num-experts {experts} is no multiple of --expert-model-parallel-size {size}, and "
            f"every rank holds as many experts: use --expert-model-parallel-size "
            f"{math.gcd(experts, size)}, or --num-experts {_next_multiple(experts, size)}."
        )


def _next_multiple(value: int, of: int) -> int:
    return -(-value // of) * of


def _data_parallel_size(args: Namespace) -> int:
    return args.world_size // _product(args, (TP, CP, PP))[0]


def _check_batch(args: Namespace, kind: str) -> None:
    """A step is a whole number of micro-batches on every data parallel rank."""
    batch = getattr(args, f"{kind}global_batch_size") or args.global_batch_size
    micro_dest = f"{kind}micro_batch_size"
    if getattr(args, micro_dest) is None:
        micro_dest = "micro_batch_size"
    micro, ranks = getattr(args, micro_dest), _data_parallel_size(args)
    if batch is None or micro is None or (batch > 0 and batch % (micro * ranks) == 0):
        return
    if not kind and args.decrease_batch_size_if_needed:
        return
    flag = _flag(f"{kind}global_batch_size")
    nearest = max(_next_multiple(batch, micro * ranks), micro * ranks)
    raise ValueError(
        f"{flag} {batch} is no multiple of {micro * ranks} = {_flag(micro_dest)} {micro} x {ranks} "
        f"data parallel ranks: use for example {flag} {nearest}."
    )


def _check_stages(args: Namespace) -> None:
    """Every (virtual) pipeline stage gets layers, and those without a number of their own the
    same."""
    stages, layers = args.pipeline_model_parallel_size, args.num_layers
    if layers is None or args.hybrid_layer_pattern is not None:
        return
    if args.pipeline_model_parallel_layout is not None:
        _check_stage_layout(args)
        return
    virtual = args.num_virtual_stages_per_pipeline_rank or 1
    of_virtual = args.num_layers_per_virtual_pipeline_stage or layers
    if stages == 1 and (virtual > 1 or of_virtual < layers):
        raise ValueError(
            "Virtual pipeline stages need --pipeline-model-parallel-size > 1: raise it, or drop "
            "--num-layers-per-virtual-pipeline-stage and --num-virtual-stages-per-pipeline-rank."
        )
    first, last = args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers
    own = [count for count in (first, last) if count is not None]
    rest, equal_stages = layers - sum(own), stages - len(own)
    rest += int(args.account_for_embedding_in_pipeline_split)
    rest += int(args.account_for_loss_in_pipeline_split)
    what = (
        f"--num-layers {layers}" if rest == layers else f"{rest} layers (of --num-layers {layers})"
    )
    advice = "give every stage its layers with --pipeline-model-parallel-layout"
    if min([rest, equal_stages, *own]) < 0 or 0 in own or bool(rest) != bool(equal_stages):
        raise ValueError(
            f"{what} do not fill {equal_stages} pipeline stages of "
            f"--pipeline-model-parallel-size {stages}: change --decoder-first-pipeline-num-layers "
            f"or --decoder-last-pipeline-num-layers, or {advice}."
        )
    if equal_stages and rest % equal_stages:
        raise ValueError(
            f"{what} cannot be split evenly over {equal_stages} pipeline stages of "
            f"--pipeline-model-parallel-size {stages}: {advice}."
        )
    for count in [*own, *([rest // equal_stages] if equal_stages else [])]:
        if count % virtual:
            raise ValueError(
                f"The {count} layers of a pipeline rank cannot be split evenly over "
                f"--num-virtual-stages-per-pipeline-rank {virtual}: use "
                f"{math.gcd(count, virtual)}, or {advice}."
            )
        if args.num_layers_per_virtual_pipeline_stage is not None and count % of_virtual:
            raise ValueError(
                f"The {count} layers of a pipeline rank are no multiple of "
                f"--num-layers-per-virtual-pipeline-stage {of_virtual}: use "
                f"{math.gcd(count, of_virtual)}, or {advice}."
            )


def _check_stage_layout(args: Namespace) -> None:
    layout = args.pipeline_model_parallel_layout
    try:
        PipelineParallelLayerLayout.from_str(
            layout, args.pipeline_model_parallel_size
        ).validate_layer_layout(args.num_layers, args.mtp_num_layers)
    except (AssertionError, ValueError) as error:
        raise ValueError(
            f"--pipeline-model-parallel-layout '{layout}' does not fit --num-layers "
            f"{args.num_layers} and --pipeline-model-parallel-size "
            f"{args.pipeline_model_parallel_size}: {error}"
        ) from error


def _check_query_groups(args: Namespace) -> None:
    if not args.group_query_attention or args.multi_latent_attention:
        return
    groups, heads = args.num_query_groups, args.num_attention_heads
    ranks = args.tensor_model_parallel_size
    if heads % groups:
        raise ValueError(
            f"--num-attention-heads {heads} is no multiple of --num-query-groups {groups}: use "
            f"--num-query-groups {math.gcd(heads, groups)}."
        )
    if groups % ranks and ranks % groups:
        raise ValueError(
            f"--num-query-groups {groups} neither divides --tensor-model-parallel-size {ranks} nor "
            f"is divided by it: use --tensor-model-parallel-size {math.gcd(groups, ranks)}."
        )


def _check_routing(args: Namespace) -> None:
    if not _has_experts(args):
        return
    if not 1 <= args.moe_router_topk <= args.num_experts:
        raise ValueError(
            f"--moe-router-topk {args.moe_router_topk} is outside 1..{args.num_experts}, which is "
            "--num-experts."
        )
    pattern = args.moe_layer_freq
    if isinstance(pattern, list) and len(pattern) != args.num_layers:
        raise ValueError(
            f"--moe-layer-freq lists {len(pattern)} layers and --num-layers is {args.num_layers}: "
            "make them equal."
        )


def _check_sequence_parallel(args: Namespace) -> None:
    """core/transformer/moe/moe_layer.py:629 refuses it in the first forward pass."""
    ranks = args.tensor_model_parallel_size
    if _has_experts(args) and ranks > 1 and not args.sequence_parallel:
        raise ValueError(
            f"--tensor-model-parallel-size {ranks} with experts needs --sequence-parallel, or "
            "every token would be sent once per tensor parallel rank: add --sequence-parallel."
        )


def _check_context_parallel(args: Namespace) -> None:
    ranks = args.context_parallel_size
    if ranks > 1 and args.transformer_impl == "local":
        raise ValueError(
            f"--context-parallel-size {ranks} needs Transformer Engine's attention, and that a "
            "GPU; --transformer-impl local has none that exchanges keys and values: use "
            "--context-parallel-size 1."
        )


# What --moe-flex-dispatcher-backend needs: the host's name for it, and what to install.
_FLEX_BACKENDS = {
    "deepep": ("HAVE_DEEP_EP", "DeepEP"),
    "hybridep": ("HAVE_HYBRIDEP", "HybridEP (DeepEP's hybrid-ep branch)"),
    "ncclep": ("HAVE_TE_EP", "a Transformer Engine built with NVTE_BUILD_WITH_NCCL_EP=1"),
}


def _check_dispatcher(args: Namespace) -> None:
    if not _has_experts(args) or args.moe_token_dispatcher_type != "flex":
        return
    backend = "deepep" if args.moe_enable_deepep else args.moe_flex_dispatcher_backend
    installed, name = _FLEX_BACKENDS[backend]
    if not getattr(fused_a2a, installed):
        raise ValueError(
            f"--moe-token-dispatcher-type flex with --moe-flex-dispatcher-backend {backend} needs "
            f"{name}, which is not installed: install it, or use --moe-token-dispatcher-type "
            "alltoall."
        )
    alone = args.expert_tensor_parallel_size * args.expert_model_parallel_size == 1
    if alone and backend != "hybridep":
        raise ValueError(
            "--moe-token-dispatcher-type flex has nobody to send to with "
            "--expert-model-parallel-size 1: raise it, or use --moe-token-dispatcher-type alltoall."
        )


def _check_micro_batch_groups(args: Namespace) -> None:
    """core/pipeline_parallel/schedules.py:1133: the interleaved pipeline's groups are full."""
    if args.virtual_pipeline_model_parallel_size is None:
        return
    stages = args.pipeline_model_parallel_size
    group = args.microbatch_group_size_per_vp_stage or stages
    if group < stages:
        raise ValueError(
            f"--microbatch-group-size-per-virtual-pipeline-stage {group} is smaller than "
            f"--pipeline-model-parallel-size {stages}: use at least {stages}."
        )
    for kind in ("", "eval_"):
        micro = getattr(args, f"{kind}micro_batch_size")
        batch = getattr(args, f"{kind}global_batch_size")
        count = batch // (micro * args.data_parallel_size)
        if count < group or 0 < count % group < stages:
            flag = _flag(f"{kind}global_batch_size")
            nearest = _next_multiple(count, group) * micro * args.data_parallel_size
            raise ValueError(
                f"Virtual pipeline stages take micro-batches in groups of {group}, and {flag} "
                f"{batch} makes {count} for each data parallel rank: use for example {flag} "
                f"{nearest}."
            )


def _check_optimizer_instances(args: Namespace) -> None:
    instances = args.num_distributed_optimizer_instances
    dense = args.data_parallel_size * args.context_parallel_size
    experts = args.world_size // _product(args, (ETP, EP, PP))[0]
    for ranks, whose in ((dense, ""), (experts, "experts' ")):
        if ranks % instances:
            raise ValueError(
                f"--num-distributed-optimizer-instances {instances} does not divide the {ranks} "
                f"{whose}data parallel ranks: use {math.gcd(instances, ranks)}."
            )

"""Every row that refuses something is reached, each by options that no row before it refuses.

That the lists are asked at all, and in time, is seen through the entry script:
tests/functional_tests/test_refusals.py.
"""

import importlib
import pkgutil
import shlex
import shutil
from argparse import ArgumentParser, Namespace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.transformer.moe import fused_a2a
from megatron.training.arguments import add_megatron_arguments

import megatron_scmoe
from megatron_scmoe.arguments import add_scmoe_args
from megatron_scmoe.c2r import placement
from megatron_scmoe.c2r.placement import Placement, contiguous
from megatron_scmoe.checks import command_line, data, generation, layout, shortcut
from megatron_scmoe.checks.ranges import NUMBERS, RANGES, Range
from megatron_scmoe.checks.refusal import Refusal, complaints, refuse_all
from megatron_scmoe.commands import generation_options, profile_options
from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.huggingface import fields
from megatron_scmoe.model import norm, specs
from megatron_scmoe.planner import cluster_options as planner
from tests.models import Case
from tests.toy_variants import registered
from tests.unit_tests.test_huggingface_fields import CONFIG as DIRECTORY

Rows = tuple[Refusal, ...]

# Of a Pos-2 model: the beginning of the line, and what is changed on the host's config. The host
# would refuse some of it itself, so it is set on the finished config.
UNSUPPORTED: dict[str, dict[str, Any]] = {
    "A model without --num-experts": {"num_moe_experts": None},
    "A model without --moe-shared-expert-intermediate-size": {
        "moe_shared_expert_intermediate_size": None
    },
    "Leaving out --disable-bias-linear": {"add_bias_linear": True},
    "--moe-flex-dispatcher-backend ncclep": {
        "moe_flex_dispatcher_backend": "ncclep",
        "moe_token_dispatcher_type": "flex",
    },
    "--moe-router-padding-for-quantization with --moe-token-dispatcher-type allgather": {
        "moe_router_padding_for_quantization": True,
        "moe_token_dispatcher_type": "allgather",
    },
    "--moe-shared-expert-overlap": {"moe_shared_expert_overlap": True},
    "--overlap-moe-expert-parallel-comm": {"overlap_moe_expert_parallel_comm": True},
    "--delay-wgrad-compute": {"delay_wgrad_compute": True},
    "--overlap-dispatch-backward-with-experts-wgrad": {
        "overlap_dispatch_backward_with_experts_wgrad": True
    },
    "--cuda-graph-impl": {"cuda_graph_impl": "local"},
    "--mtp-num-layers": {"mtp_num_layers": 1},
    "--moe-latent-size": {"moe_latent_size": 8},
    "--heterogeneous-layers-config-path": {"heterogeneous_block_specs": True},
    "--experimental-attention-variant": {"experimental_attention_variant": "dsa"},
    "--transformer-impl inference_optimized": {"transformer_impl": "inference_optimized"},
    "--fused-residual-rmsnorm": {"fused_residual_rmsnorm": True},
    "--fine-grained-activation-offloading": {"fine_grained_activation_offloading": True},
    "Kitchen quantization": {"use_kitchen": True},
    "--recompute-modules moe with FP8 or FP4": {
        "fp8": "e4m3",
        "recompute_granularity": "selective",
        "recompute_modules": ["moe"],
    },
    "--first-last-layers-bf16": {"first_last_layers_bf16": True},
    "--qk-clip": {"qk_clip": True},
    "--log-max-attention-logit": {"log_max_attention_logit": True},
    "--mlp-chunks-for-training": {"mlp_chunks_for_training": 2},
    "CPU offloading": {"cpu_offloading": True},
}
WEIGHED = {"moe_router_load_balancing_type": "aux_loss"}
HETEROGENEOUS = {"scmoe_router": "heterogeneous", "scmoe_experts_at_home": {"zero": 1}}
LONGCAT = {"scmoe_router": "longcat", "scmoe_experts_at_home": {"copy": 1}}
C2R = {"scmoe_router": "c2r", "scmoe_c2r_top_t": 2}
DUAL = {"scmoe_dual_gating": "shared", "scmoe_combine": "add"}
ALONE: dict[str, Any] = {
    "moe_shared_expert_intermediate_size": None,
    "moe_shared_expert_gate": False,
}
OF_MODEL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "--scmoe-expert-placement CORPUS.json is not one of this model: it has 2 ranks, and": (
        {},
        {"scmoe_expert_placement": "CORPUS.json"},
    ),
    "--no-scmoe-distinct-experts is an option of": ({}, {"scmoe_distinct_experts": False}),
    "--scmoe-dual-gating shared has two gates of one expert each, and --moe-router-topk is 2": (
        {**ALONE, "moe_router_topk": 2},
        DUAL,
    ),
    "--scmoe-dual-gating shared has no shared expert, and --moe-shared-expert": (
        {"moe_shared_expert_gate": False},
        DUAL,
    ),
    "--scmoe-combine cg2 weighs a shared expert, and --scmoe-dual-gating shared has none": (
        ALONE,
        {**DUAL, "scmoe_combine": "cg2"},
    ),
    "--scmoe-dual-gating shared does not work with experts at home or --scmoe-router topk": (
        ALONE,
        {**DUAL, "scmoe_experts_at_home": {"zero": 1}},
    ),
    "--scmoe-dual-gating shared does not work with --moe-router-load-balancing-type sinkhorn": (
        {**ALONE, "moe_router_load_balancing_type": "sinkhorn"},
        DUAL,
    ),
    "--scmoe-dual-gating shared does not work with --moe-router-fusion": (
        {**ALONE, "moe_router_fusion": True},
        DUAL,
    ),
    "--scmoe-dual-gating shared does not work with the replay of routings": (
        {**ALONE, "moe_enable_routing_replay": True},
        DUAL,
    ),
    "--scmoe-dual-gating shared sends a token to two experts, and --num-experts is 1": (
        {**ALONE, "num_moe_experts": 1},
        DUAL,
    ),
    "--scmoe-expert-slot 1.5: write auto": ({}, {"scmoe_expert_slot": "1.5"}),
    "--scmoe-expert-slot 6 is outside": ({}, {"scmoe_expert_slot": "6"}),
    "--scmoe-num-chunks 0 is": ({}, {"scmoe_num_chunks": 0}),
    "--scmoe-num-chunks > 1 does not": (
        {"moe_pad_expert_input_to_capacity": True},
        {"scmoe_num_chunks": 2},
    ),
    "--moe-pad-expert-input-to-capacity does not work with experts at home": (
        {"moe_pad_expert_input_to_capacity": True, "moe_router_topk": 2},
        {"scmoe_experts_at_home": {"fixed": 1}},
    ),
    "--moe-router-num-groups does not work with experts at home": (
        {"moe_router_num_groups": 2, "moe_router_topk": 2},
        {"scmoe_experts_at_home": {"fixed": 1}},
    ),
    "--scmoe-router heterogeneous has nothing to weigh": (
        WEIGHED,
        {"scmoe_router": "heterogeneous"},
    ),
    "--scmoe-tau 2.0 is not above 0 and at most 1": (
        WEIGHED,
        {"scmoe_tau": 2.0, **HETEROGENEOUS},
    ),
    "--scmoe-router longcat takes a softmax, and --moe-router-score-function is sigmoid": (
        {"moe_router_score_function": "sigmoid"},
        LONGCAT,
    ),
    "--scmoe-router longcat takes the softmax of all": (
        {"moe_router_pre_softmax": False, "moe_router_topk": 2},
        LONGCAT,
    ),
    "--scmoe-router longcat has a balancing loss of its own": (
        {"moe_router_load_balancing_type": "seq_aux_loss"},
        LONGCAT,
    ),
    "--scmoe-router longcat works neither with": ({"moe_router_fusion": True}, LONGCAT),
    "--scmoe-routed-topk leaves slots": ({}, {"scmoe_routed_topk": 1.0, "scmoe_router": "longcat"}),
    "--scmoe-routed-topk 1.0 is not between": ({}, {"scmoe_routed_topk": 1.0, **LONGCAT}),
    "--scmoe-balance-groups 3 does not divide": ({}, {"scmoe_balance_groups": 3, **LONGCAT}),
    "--scmoe-bias-decay is an option of --scmoe-router longcat": (
        {},
        {"scmoe_bias_decay": "linear"},
    ),
    "--scmoe-dispatch-copies rank is about --moe-token-dispatcher-type alltoall, and this one is": (
        {"moe_token_dispatcher_type": "allgather"},
        {"scmoe_dispatch_copies": "rank"},
    ),
    "--scmoe-router c2r does not work with experts at home": (
        {},
        {**C2R, "scmoe_experts_at_home": {"zero": 1}},
    ),
    "--scmoe-router c2r does not work with --moe-router-load-balancing-type sinkhorn": (
        {"moe_router_load_balancing_type": "sinkhorn"},
        C2R,
    ),
    "--scmoe-router c2r works neither with": ({"moe_router_fusion": True}, C2R),
    "--scmoe-router c2r does not work with the replay": ({"moe_enable_routing_replay": True}, C2R),
    "--scmoe-router c2r lets a token's experts be": ({}, {"scmoe_router": "c2r"}),
    "--scmoe-c2r-top-t 4 is not in 1..3: a token of --moe-router-topk 1": (
        {},
        {**C2R, "scmoe_c2r_top_t": 4},
    ),
    "--scmoe-c2r-lists missing.json: ": ({}, {**C2R, "scmoe_c2r_lists": "missing.json"}),
    "--scmoe-c2r-top-t is an option of --scmoe-router c2r": ({}, {"scmoe_c2r_top_t": 2}),
    "--scmoe-mla-scale scales": ({"multi_latent_attention": False}, {"scmoe_mla_scale": True}),
    "--scmoe-combine cg1 weighs a shared expert, and there is none": (
        {"moe_shared_expert_intermediate_size": None},
        {"scmoe_shortcut_position": "none", "scmoe_router": "longcat"},
    ),
    "--scmoe-dual-gating shared does not work without a shortcut": (
        {},
        {"scmoe_shortcut_position": "none", **DUAL},
    ),
    "--scmoe-gate-layers 3 is neither": (WEIGHED, {"scmoe_gate_layers": 3, **HETEROGENEOUS}),
    "--scmoe-gating-residual does not work with --pipeline-model-parallel-size 2": (
        {"pipeline_model_parallel_size": 2, **WEIGHED},
        {"scmoe_gating_residual": True, **HETEROGENEOUS},
    ),
    "--scmoe-router heterogeneous weighs a balancing loss, and --moe-router-load-balancing-type "
    "is none": ({}, HETEROGENEOUS),
    "--moe-shared-expert-gate is --scmoe-combine cg1": (
        {"moe_shared_expert_gate": True},
        {"scmoe_combine": "add"},
    ),
    "--scmoe-combine cg1 is the host's": ({"moe_shared_expert_gate": False}, {}),
    "--moe-router-topk 1 with a softmax": ({"moe_router_pre_softmax": False}, {}),
    "--moe-layer-freq 2 puts the MoE first": ({"moe_layer_freq": 2}, {}),
    "--moe-layer-freq lists no MoE layer": ({"moe_layer_freq": [0] * 8}, {}),
    "--scmoe-shortcut-position pos2 needs a dense layer": ({"moe_layer_freq": [1] * 8}, {}),
}
OF_NORM: dict[str, dict[str, Any]] = {
    "--transformer-impl local uses torch's norms: drop --apply": {
        "layernorm_zero_centered_gamma": True
    },
    "--transformer-impl local uses torch's norms: add": {"persist_layer_norm": True},
    "--transformer-impl local uses torch's norms: drop --memory": {
        "memory_efficient_layer_norm": True
    },
    "--normalization L2Norm: choose": {"normalization": "L2Norm"},
}

MODEL = (
    "--num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --seq-length 32 "
    "--micro-batch-size 2 --global-batch-size 16 --num-experts 4 --transformer-impl local "
    "--tokenizer-type NullTokenizer --vocab-size 64 --lr 1 --train-iters 1 --eval-interval 1 "
)
POS2 = "--scmoe-shortcut-position pos2 "
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel "
PP2 = "--pipeline-model-parallel-size 2 "
STACKED = "--moe-grouped-gemm --disable-bias-linear "
FLEX = "--moe-token-dispatcher-type flex "


class Typed(NamedTuple):
    """Of the command line, four ranks; what the host would have derived is changed afterwards."""

    rows: Rows
    options: str
    changes: dict[str, Any] = {}  # noqa: RUF012 (a NamedTuple's default, never changed)


TYPED, RESOLVED = layout.TYPED, layout.RESOLVED
COMPLETE, OPTIONS = command_line.COMPLETE, shortcut.OPTIONS
STACKED_EXPERTS, WANDB = command_line.STACKED_EXPERTS, command_line.WANDB
# What tools/generate.py asks beside these options.
ASKED: dict[str, Any] = {
    "load": "a",
    "prompt": ["a"],
    "prompt_file": None,
    "max_new_tokens": 8,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "scmoe_offload_experts": "none",
}


# And tools/plan_overlap.py.
PLANNED: dict[str, Any] = {
    **dict.fromkeys(("cluster_nodes", *planner.COMPUTE, *planner.NETWORK), 1),
    "cluster_gpus_per_node": 4,
    "measured": None,
    "collaboration": None,
}


# And tools/c2r.py profile.
PROFILED: dict[str, Any] = {
    "load": "a",
    "text": ["a"],
    "data_path": None,
    "output": "a.json",
    "tokens": 8,
    "picture": None,
}


def asked(options: str = "", **changes: Any) -> "Typed":
    return Typed(generation_options.ASKED + generation.TYPED, options, ASKED | changes)


def profiled(**changes: Any) -> "Typed":
    return Typed(profile_options.ASKED, "", PROFILED | changes)


def planned(options: str = "", **changes: Any) -> "Typed":
    return Typed(planner.ASKED, options, PLANNED | changes)


WANDB_RUN = "--wandb-project a --wandb-exp-name b --save a"
OF_COMMAND_LINE: dict[str, Typed] = {
    "--yaml-cfg has no place": Typed(command_line.PARSED, "--yaml-cfg a.yaml"),
    "--save s3://a and --load gs://b is an address": Typed(
        command_line.PARSED, "--save s3://a --load gs://b --tensorboard-dir s3://c"
    ),
    "--save and --load is empty: a variable": Typed(command_line.PARSED, "--save '' --load ''"),
    "--save CORPUS.loop is a link to itself": Typed(command_line.PARSED, "--save CORPUS.loop"),
    "--transformer-impl transformer_engine, the default, needs": Typed(
        COMPLETE, "--transformer-impl transformer_engine"
    ),
    "--tokenizer-type NullTokenizer needs": Typed(COMPLETE, "", {"vocab_size": None}),
    "How long to train": Typed(COMPLETE, "", {"train_iters": None}),
    "The learning rate": Typed(COMPLETE, "", {"lr": None}),
    "When to evaluate": Typed(COMPLETE, "", {"eval_interval": None}),
    "--optimizer muon wants": Typed(STACKED_EXPERTS, f"{STACKED} --optimizer muon"),
    "--moe-use-upcycling wants": Typed(STACKED_EXPERTS, f"{STACKED} --moe-use-upcycling"),
    "--ckpt-format torch wants": Typed(STACKED_EXPERTS, f"{STACKED} --ckpt-format torch --save a"),
    "--spec does not": Typed(OPTIONS, f"{POS2} --spec module layer"),
    "--hybrid-layer-pattern does not": Typed(OPTIONS, f"{POS2} --hybrid-layer-pattern M*-M"),
    "--use-megatron-fsdp does not": Typed(OPTIONS, f"{POS2} --use-megatron-fsdp"),
    "--use-torch-fsdp2 does not": Typed(OPTIONS, f"{POS2} --use-torch-fsdp2"),
    "--scmoe-expert-placement works neither with": Typed(
        OPTIONS, "--scmoe-expert-placement a.json --non-persistent-ckpt-type local"
    ),
    "--moe-use-upcycling does not": Typed(OPTIONS, f"{POS2} --moe-use-upcycling"),
    "--num-layers 0 is not from 1 to 10000; --lr nan is no number": Typed(
        NUMBERS, "--num-layers 0 --lr nan"
    ),
    "A batch size that grows": Typed(COMPLETE, "--rampup-batch-size 2 2 16"),
    "--lr-warmup-iters 1 does not end before --train-iters 1": Typed(
        COMPLETE, "--lr-warmup-iters 1"
    ),
    "--lr-warmup-samples 8 does not end before --lr-decay-samples 8": Typed(
        COMPLETE, "--train-samples 16 --lr-decay-samples 8 --lr-warmup-samples 8"
    ),
    "--seq-length 32 is longer than the model's 16 positions: use a shorter": Typed(
        COMPLETE, "--max-position-embeddings 16"
    ),
    "--reset-position-ids changes nothing with --position-embedding-type rope": Typed(
        COMPLETE, "--reset-position-ids --position-embedding-type rope"
    ),
    "--reset-attention-mask changes nothing with --no-create": Typed(
        COMPLETE,
        "--reset-attention-mask --no-create-attention-mask-in-dataloader "
        "--no-masked-softmax-fusion",
    ),
    "--reset-attention-mask changes nothing with --transformer-impl local": Typed(
        COMPLETE, "--reset-attention-mask"
    ),
    "--optimizer muon needs the package": Typed(COMPLETE, "--optimizer muon"),
    "--optimizer-cpu-offload has nothing": Typed(COMPLETE, "--optimizer-cpu-offload"),
    "--scmoe-collaboration-dir would stay empty": Typed(
        COMPLETE, f"{POS2} --scmoe-collaboration-dir /dev/null"
    ),
    "--scmoe-trace-dir would stay empty: it begins at": Typed(
        COMPLETE, f"{POS2} --scmoe-trace-dir a --profile-step-start 1"
    ),
    "--tensorboard-dir /dev/null/a cannot be written: /dev/null is no folder": Typed(
        COMPLETE, "--tensorboard-dir /dev/null/a"
    ),
    "--scmoe-trace-dir would stay empty: /proc takes no file": Typed(
        COMPLETE,
        f"{POS2} --scmoe-trace-dir /proc/a --profile-step-start 1 --profile-step-end 2 "
        "--train-iters 3",
    ),
    "--wandb-project needs the package": Typed(WANDB, WANDB_RUN),
    "--wandb-project needs a name": Typed(WANDB, "--wandb-project a --save a"),
    "--wandb-project has no folder": Typed(WANDB, "--wandb-project a --wandb-exp-name b"),
    "--wandb-project finds no key": Typed(WANDB, WANDB_RUN),
    "--decoder-first-pipeline-num-layers 1 speaks of": Typed(
        TYPED, "--decoder-first-pipeline-num-layers 1"
    ),
    "--decoder-last-pipeline-num-layers 1 speaks of": Typed(
        TYPED, "--decoder-last-pipeline-num-layers 1"
    ),
    "GLOO_SOCKET_IFNAME names eth7, which": Typed(TYPED, ""),
    "The number of ranks, 4, is no multiple of --context-parallel-size 3": Typed(
        TYPED, "--context-parallel-size 3"
    ),
    "The number of ranks, 4, is no multiple of --expert-model-parallel-size 8: start 8": Typed(
        TYPED, "--expert-model-parallel-size 8"
    ),
    "--use-tp-pp-dp-mapping with pipeline": Typed(
        TYPED, f"{TP2} {PP2} --use-tp-pp-dp-mapping --expert-tensor-parallel-size 1"
    ),
    "--scmoe-dispatch-copies node wants expert parallel groups that fill whole nodes": Typed(
        TYPED,
        "--expert-model-parallel-size 2 --scmoe-dispatch-copies node --scmoe-ranks-per-node 4",
    ),
    "--expert-model-parallel-size 2 without": Typed(
        TYPED, "--expert-model-parallel-size 2", {"num_experts": None}
    ),
    "--num-experts 3 is no multiple": Typed(
        TYPED, "--num-experts 3 --expert-model-parallel-size 2"
    ),
    "--global-batch-size 12 is no multiple of 8 = --micro-batch-size 2 x 4 data": Typed(
        TYPED, "--global-batch-size 12"
    ),
    "--eval-global-batch-size 12 is no multiple": Typed(TYPED, "--eval-global-batch-size 12"),
    "--pipeline-model-parallel-layout 'Ett|tttL' does not fit": Typed(
        TYPED, f"{PP2} --pipeline-model-parallel-layout Ett|tttL"
    ),
    "Virtual pipeline stages need": Typed(TYPED, "--num-layers-per-virtual-pipeline-stage 2"),
    "--num-layers 4 do not fill 1 pipeline": Typed(
        TYPED, f"{PP2} --decoder-first-pipeline-num-layers 0"
    ),
    "--num-layers 5 cannot be split": Typed(TYPED, f"{PP2} --num-layers 5"),
    "The 2 layers of a pipeline rank cannot": Typed(
        TYPED, f"{PP2} --num-virtual-stages-per-pipeline-rank 3"
    ),
    "The 2 layers of a pipeline rank are": Typed(
        TYPED, f"{PP2} --num-layers-per-virtual-pipeline-stage 3"
    ),
    "--num-attention-heads 5 is no multiple": Typed(RESOLVED, f"{TP2} --num-attention-heads 5"),
    "--ffn-hidden-size 63 is": Typed(RESOLVED, f"{TP2} --ffn-hidden-size 63"),
    "--padded-vocab-size 65 is no": Typed(RESOLVED, f"{TP2} --padded-vocab-size 65"),
    "--moe-shared-expert-intermediate-size 15 is": Typed(
        RESOLVED, f"{TP2} --moe-shared-expert-intermediate-size 15"
    ),
    "--moe-ffn-hidden-size 15 is": Typed(
        RESOLVED, "--expert-tensor-parallel-size 2 --moe-ffn-hidden-size 15"
    ),
    "--seq-length 31 is": Typed(RESOLVED, f"{TP2} --seq-length 31"),
    "--num-attention-heads 4 is no multiple of --num-query-groups 3": Typed(
        RESOLVED, "--group-query-attention --num-query-groups 3"
    ),
    "--num-query-groups 3 neither": Typed(
        RESOLVED, f"{TP2} --num-attention-heads 6 --group-query-attention --num-query-groups 3"
    ),
    "--moe-router-topk 5 is outside 1..4": Typed(RESOLVED, "--moe-router-topk 5"),
    "--moe-layer-freq lists 2 layers": Typed(RESOLVED, "--moe-layer-freq [0,1]"),
    "--tensor-model-parallel-size 2 with experts": Typed(
        RESOLVED, "--tensor-model-parallel-size 2"
    ),
    "--context-parallel-size 2 needs": Typed(RESOLVED, "--context-parallel-size 2"),
    "--moe-token-dispatcher-type flex with --moe-flex-dispatcher-backend hybridep": Typed(
        RESOLVED, f"{FLEX} --moe-flex-dispatcher-backend hybridep"
    ),
    "--moe-token-dispatcher-type flex has nobody": Typed(RESOLVED, FLEX),
    "--microbatch-group-size-per-virtual-pipeline-stage 1 is": Typed(
        RESOLVED,
        f"{PP2} --microbatch-group-size-per-virtual-pipeline-stage 1",
        {"virtual_pipeline_model_parallel_size": 2},
    ),
    "Virtual pipeline stages take micro-batches in groups of 2, and --global-batch-size 12": Typed(
        RESOLVED, f"{PP2} --global-batch-size 12", {"virtual_pipeline_model_parallel_size": 2}
    ),
    "Virtual pipeline stages take micro-batches in groups of 2, and --eval-global-batch-": Typed(
        RESOLVED,
        f"{PP2} --eval-global-batch-size 12 --eval-micro-batch-size 2",
        {"virtual_pipeline_model_parallel_size": 2},
    ),
    "--num-distributed-optimizer-instances 3 does not divide the 4 data": Typed(
        RESOLVED, "--num-distributed-optimizer-instances 3"
    ),
    "--num-distributed-optimizer-instances 4 does not divide the 2 experts'": Typed(
        RESOLVED,
        "--num-distributed-optimizer-instances 4 --expert-model-parallel-size 2",
    ),
    **{
        f"--{name} is not supported": Typed(data.DATA, f"--mock-data --{name}")
        for name in (
            "sft",
            "fim-data",
            "hybrid-context-parallel",
            "dataloader-inter-document-masking",
        )
    },
    "b has the weight 0 among the data": Typed(data.DATA, "--data-path 0 b 1 CORPUS"),
    "s3://bucket/text is read through": Typed(data.DATA, "--data-path s3://bucket/text"),
    "no dataset /nowhere/corpus.bin": Typed(data.DATA, "--data-path /nowhere/corpus"),
    "CORPUS.cut.bin and CORPUS.cut.idx cannot be trained on: the index ends at byte 48 and": Typed(
        data.DATA, "--data-path CORPUS.cut"
    ),
    "--split 98,1,1 leaves the valid data none of the 3": Typed(
        data.DATA, "--data-path CORPUS --split 98,1,1"
    ),
    "--padded-vocab-size 32 is less": Typed(data.VOCABULARY, "--padded-vocab-size 32"),
    "--yaml-cfg has no place for the --scmoe options: use": planned("--yaml-cfg a"),
    "--use-checkpoint-args: the planner reads no": planned("--use-checkpoint-args"),
    "A model without --num-experts has no all-to-all": planned(num_experts=None),
    "--num-layers 0 is not from 1 to 10000; --cluster-nodes 0 is not": planned(
        "--num-layers 0", cluster_nodes=0
    ),
    "The layout needs --cluster-nodes:": planned(cluster_nodes=None),
    "Times need --cluster-tflops:": planned(cluster_tflops=None),
    "--measured nowhere: no such file": planned(measured=Path("nowhere")),
    "profile runs a checkpoint": profiled(load=None),
    "profile counts over one text": profiled(data_path=["a"]),
    "--tokens 0 is not": profiled(tokens=0),
    "profile writes a file": profiled(output=None),
    "--output a.txt ends neither": profiled(output="a.txt"),
    "--picture a.png is written as SVG": profiled(picture="a.png"),
    "--output nowhere/a.json: there is no such folder": profiled(output="nowhere/a.json"),
    "A checkpoint is missing": asked(load=None),
    "Prompts stand in --prompt and in": asked(prompt_file="-"),
    "--max-new-tokens 0 is not": asked(max_new_tokens=0),
    "--temperature 0.0 is not": asked(temperature=0.0),
    "--top-k -1 is not": asked(top_k=-1),
    "--top-p 0.0 is not": asked(top_p=0.0),
    "--inference-max-requests 0 is not": asked("--inference-max-requests 0"),
    "--context-parallel-size 2 does not split": asked("--context-parallel-size 2"),
    "--inference-dynamic-batching needs": asked("--inference-dynamic-batching"),
    "--inference-dynamic-batching does not work": Typed(
        generation.ADOPTED,
        "--inference-dynamic-batching --multi-latent-attention --position-embedding-type rope",
        ASKED,
    ),
    "--scmoe-offload-experts disk is for machines": asked(scmoe_offload_experts="disk"),
    "--scmoe-offload-experts cpu has nothing to move": Typed(
        generation.ADOPTED,
        "--position-embedding-type rope",
        ASKED | {"scmoe_offload_experts": "cpu", "num_experts": None},
    ),
    "Virtual pipeline stages do not generate": Typed(
        generation.ADOPTED, "", ASKED | {"virtual_pipeline_model_parallel_size": 2}
    ),
    "The longest prompt and --max-new-tokens 8 are 72 tokens": Typed(
        generation.ADOPTED, "--max-position-embeddings 71", ASKED
    ),
}
# What rows ask beside the options: the tokenizer's tokens, the tokens of the longest prompt.
BESIDE = {data.VOCABULARY: [64], generation.ADOPTED: [64]}

# Of a config.json that comes in: the beginning of the line, and the fields that are changed.
OF_DIRECTORY: dict[str, dict[str, Any]] = {
    "hidden_size is 0 and not a whole number": {"hidden_size": 0},
    "num_attention_heads 4 is no multiple of num_key_value_heads 3": {"num_key_value_heads": 3},
    "num_experts_per_tok 5 is more than there are experts": {"num_experts_per_tok": 5},
    "layer 2 of moe_layers has no dense layer in front": {"moe_layers": [1, 2]},
    "n_group 3 and topk_group 1 are no groups of 4 experts": {"n_group": 3, "topk_group": 1},
    "c2r_top_t 4 is not in 1..3": {"router": "c2r", "c2r_top_t": 4},
    "fields that contradict the others, or that no option says: combine 'cg1' (not 'add')": {
        "combine": "cg1"
    },
}

ALL = [
    *UNSUPPORTED,
    *OF_MODEL,
    *OF_NORM,
    *OF_COMMAND_LINE,
    *OF_DIRECTORY,
    "pipeline stage 1 would start at layer 4",
]


@cache
def parser() -> ArgumentParser:
    return add_scmoe_args(add_megatron_arguments(ArgumentParser()))


def parsed(options: str, changes: dict[str, Any]) -> Namespace:
    args = parser().parse_args(shlex.split(f"{MODEL} {options}"))
    args.rank, args.world_size = 0, 4
    args.virtual_pipeline_model_parallel_size = None
    if args.expert_tensor_parallel_size is None:
        args.expert_tensor_parallel_size = args.tensor_model_parallel_size
    ranks = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    args.data_parallel_size = args.world_size // max(ranks, 1)
    vars(args).update(changes)
    return args


def host_config(**changes: Any) -> Any:
    config = Case(num_layers=8).host_config()
    for name, value in changes.items():
        assert hasattr(config, name)
        setattr(config, name, value)
    return config


def first_complaint(line: str, corpus: Path) -> tuple[Refusal, str]:
    """The row that refuses a case, and what it says."""
    if line in UNSUPPORTED or line in OF_MODEL:
        host, own = OF_MODEL.get(line) or (UNSUPPORTED[line], {})
        own = {
            name: value.replace("CORPUS", str(corpus)) if isinstance(value, str) else value
            for name, value in own.items()
        }
        scmoe = ScMoEConfig(**{"scmoe_shortcut_position": "pos2", **own})
        config = host_config(**host)
        with registered():
            rows = (*shortcut.WITHOUT_EFFECT, *shortcut.of_shortcut(config, scmoe))
            return next(complaints(rows, config, scmoe))
    if line in OF_DIRECTORY:
        return next(complaints(fields.CONFIG, {**DIRECTORY, **OF_DIRECTORY[line]}))
    if line in OF_NORM:
        return next(complaints(norm.REFUSALS, host_config(**OF_NORM[line])))
    if line not in OF_COMMAND_LINE:
        scmoe = ScMoEConfig(scmoe_shortcut_position="pos2")
        host = {"moe_layer_freq": [0, 1] * 3, "pipeline_model_parallel_size": 2}
        config = Case(host=host, num_layers=6).host_config()
        return next(complaints((specs.CUT_UNIT,), config, specs.block_layers(config, scmoe)))
    rows, options, changes = OF_COMMAND_LINE[line]
    args = parsed(options.replace("CORPUS", str(corpus)), changes)
    with pytest.MonkeyPatch.context() as patch:
        if line.endswith("is for machines"):
            patch.setattr(generation, "no_cuda_device", lambda: False)
        if line.startswith("GLOO_SOCKET_IFNAME"):
            patch.setenv("GLOO_SOCKET_IFNAME", "lo,eth7")
        if line.endswith("needs the package"):
            patch.setattr(command_line, "find_spec", lambda name: None)
        return next(complaints(rows, args, *BESIDE.get(rows, [])))


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three documents; of the GPU's libraries only DeepEP is here."""
    monkeypatch.setattr(shortcut, "HAVE_TE", False)
    monkeypatch.setattr(fused_a2a, "HAVE_DEEP_EP", True)
    monkeypatch.setattr(fused_a2a, "HAVE_HYBRIDEP", False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no key of Weights & Biases
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    prefix = tmp_path / "corpus"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.int32)
    for _ in range(3):
        builder.add_document(numpy.arange(4), [4])
    builder.finalize(f"{prefix}.idx")
    shutil.copy(f"{prefix}.idx", f"{prefix}.cut.idx")
    Path(f"{prefix}.cut.bin").write_bytes(Path(f"{prefix}.bin").read_bytes()[:-1])
    Path(f"{prefix}.loop").symlink_to(f"{prefix}.loop")
    placed = Placement(4, 2, 2, {2: contiguous(4, 2), 4: contiguous(4, 2)})
    placement.write(Path(f"{prefix}.json"), placed)
    return prefix


@pytest.mark.parametrize("line", ALL)
def test_a_row_refuses_in_one_line(line: str, corpus: Path) -> None:
    _, text = first_complaint(line, corpus)
    assert text.startswith(line.replace("CORPUS", str(corpus)))
    assert text.endswith(".") and "\n" not in text and "{" not in text


def every_row() -> set[Refusal]:
    """All rows of the package: in lists, alone, or beside a variant."""
    rows: set[Refusal] = set()
    for module in pkgutil.walk_packages(megatron_scmoe.__path__, "megatron_scmoe."):
        if not module.name.endswith("__main__"):
            for value in vars(importlib.import_module(module.name)).values():
                several = getattr(value, "refusals", value) if isinstance(value, type) else value
                items = several if isinstance(several, tuple) else (several,)
                rows |= {item for item in items if isinstance(item, Refusal)}
    return rows


def test_every_row_is_reached(corpus: Path) -> None:
    reached = {first_complaint(line, corpus)[0] for line in ALL}
    assert sorted(row.line for row in every_row() - reached) == []


def test_what_is_wrong_is_said_all_at_once(corpus: Path) -> None:
    args = parsed("--seed 0 --optimizer muon", {"lr": None})
    with pytest.raises(ValueError) as refused:
        refuse_all(NUMBERS + COMPLETE, args)
    said = str(refused.value)
    assert "--seed 0 is not from 1" in said and "add --lr." in said and "--optimizer muon" in said


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "text"),
    [
        (Range(1), (1, 5), (0, -3), "at least 1"),
        (Range(1, 10_000), (1, 10_000), (0, 10_001), "from 1 to 10000"),
        (Range(0, open_least=True), (1e-9,), (0, -1), "above 0"),
        (Range(0, 1, open_most=True), (0, 0.9), (1, -0.1), "at least 0 and below 1"),
        (Range(0, 1, open_least=True), (1, 0.1), (0, 1.1), "above 0 and at most 1"),
    ],
)
def test_range(
    bounds: Range, inside: tuple[float, ...], outside: tuple[float, ...], text: str
) -> None:
    assert all(number in bounds for number in inside)
    assert not any(number in bounds for number in outside)
    assert str(bounds) == text


def test_every_option_with_a_range_exists_and_has_a_sound_default() -> None:
    args = vars(parsed("", {}))
    assert RANGES.keys() <= args.keys()
    for dest, bounds in RANGES.items():
        assert args[dest] is None or args[dest] in bounds, dest


def test_what_is_sound_is_refused_by_no_row(corpus: Path) -> None:
    args = parsed("--mock-data --padded-vocab-size 64", {})
    for rows in (command_line.PARSED, NUMBERS, COMPLETE, TYPED, RESOLVED, OPTIONS, STACKED_EXPERTS):
        assert list(complaints(rows, args)) == []
    assert list(complaints(data.DATA, args)) == list(complaints(data.VOCABULARY, args, 64)) == []
    scmoe = ScMoEConfig(scmoe_shortcut_position="pos2")
    config = host_config()
    assert list(complaints(shortcut.of_shortcut(config, scmoe), config, scmoe)) == []

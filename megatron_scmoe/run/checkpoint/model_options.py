"""Which options make a model, by their destination on the parsed command line."""

from argparse import Namespace
from typing import Any

from megatron_scmoe import words

# Ours; all but the first two decide which tensors there are.
SCMOE = (
    "scmoe_shortcut_position",
    "scmoe_c2r_top_t",
    "scmoe_combine",
    "scmoe_router",
    "scmoe_experts_at_home",
    "scmoe_dual_gating",
    "scmoe_distinct_experts",
    "scmoe_shortcut_norm",
    "scmoe_post_norm",
    "scmoe_gating_residual",
    "scmoe_renormalise",
    "scmoe_gate_layers",
    "scmoe_input_scale",
    "scmoe_scaled_experts",
    "scmoe_mla_scale",
)

# The host's. A checkpoint of a model that differs in one of them cannot be gone on with: either
# the tensors have other shapes or they mean something else.
ARCHITECTURE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "position_embedding_type",
    "max_position_embeddings",
    "rotary_base",
    "rotary_percent",
    "rotary_interleaved",
    "rotary_seq_len_interpolation_factor",
    "use_rope_scaling",
    "rope_scaling_factor",
    "no_rope_freq",
    "add_bias_linear",
    "add_qkv_bias",
    "swiglu",
    "squared_relu",
    "openai_gelu",
    "quick_geglu",
    "activation_func_clamp_value",
    "glu_linear_offset",
    "untie_embeddings_and_output_weights",
    "normalization",
    "layernorm_epsilon",
    "layernorm_zero_centered_gamma",
    "apply_residual_connection_post_layernorm",
    "qk_layernorm",
    "qk_l2_norm",
    "attention_output_gate",
    "softmax_type",
    "window_size",
    "window_attn_skip_freq",
    "use_mup",
    # Mixture of experts.
    "num_experts",
    "moe_layer_freq",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate",
    "moe_router_topk",
    "moe_router_pre_softmax",
    "moe_router_score_function",
    "moe_router_enable_expert_bias",
    "moe_router_topk_scaling_factor",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_apply_probs_on_input",
    "moe_latent_size",
    # Multi-latent attention.
    "multi_latent_attention",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "rope_type",
    "rotary_scaling_factor",
    "mscale",
    "mscale_all_dim",
    "yarn_original_max_position_embeddings",
    "yarn_beta_fast",
    "yarn_beta_slow",
)

# A run may change these on purpose; it says which.
WORTH_A_NOTE = (
    "seq_length",
    "micro_batch_size",
    "global_batch_size",
    "seed",
    "data_path",
    "split",
    "bf16",
    "fp16",
    "attention_dropout",
    "hidden_dropout",
    "moe_router_load_balancing_type",
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
    "moe_expert_capacity_factor",
    "moe_token_drop_policy",
    "moe_router_bias_update_rate",
    "adam_beta1",
    "adam_beta2",
    "adam_eps",
    "clip_grad",
    "transformer_impl",
)

# The ranks of a model; data parallel ranks make no difference on disk.
LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)

# What decides how long a unit's operators and exchanges take, beside the layout and the machine
# (record.machine_facts). One micro-batch is timed, so the global batch does not matter.
TIMES = (
    "scmoe_shortcut_position",
    "scmoe_dual_gating",
    "scmoe_num_chunks",
    "seq_length",
    "micro_batch_size",
    "context_parallel_size",
    "cp_comm_type",
    "sequence_parallel",
    "transformer_impl",
    "attention_backend",
    "bf16",
    "fp16",
    "fp8",
    "fp8_recipe",
    "fp4",
    # Experts and their exchanges.
    "distributed_backend",
    "moe_grouped_gemm",
    "moe_permute_fusion",
    "moe_token_dispatcher_type",
    "scmoe_dispatch_copies",
    "scmoe_ranks_per_node",
    "scmoe_expert_placement",
    "moe_flex_dispatcher_backend",
    "moe_flex_dispatcher_num_sms",
    "moe_deepep_num_sms",
    "moe_hybridep_num_sms",
    "moe_expert_capacity_factor",
    "moe_pad_expert_input_to_capacity",
    "moe_router_force_load_balancing",
    # The backward pass recomputes.
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
    # Other communication at the same time.
    "tp_comm_overlap",
    "tp_comm_overlap_cfg",
    "tp_comm_overlap_ag",
    "tp_comm_overlap_rs",
    "tp_comm_overlap_rs_dgrad",
    "tp_comm_bulk_dgrad",
    "tp_comm_bulk_wgrad",
    "overlap_grad_reduce",
    "overlap_param_gather",
)

_FLAGS = {
    "scmoe_experts_at_home": "--scmoe-num-KIND-experts",
    "scmoe_distinct_experts": "--no-scmoe-distinct-experts (off is True)",
    "add_bias_linear": "--disable-bias-linear (off is True)",
    "layernorm_epsilon": "--norm-epsilon",
    "layernorm_zero_centered_gamma": "--apply-layernorm-1p",
    "fp8": "--fp8-format",
    "fp4": "--fp4-format",
    "tp_comm_overlap_ag": "--no-tp-comm-overlap-ag (off is True)",
    "tp_comm_overlap_rs": "--no-tp-comm-overlap-rs (off is True)",
    "tp_comm_bulk_dgrad": "--no-tp-comm-bulk-dgrad (off is True)",
    "tp_comm_bulk_wgrad": "--no-tp-comm-bulk-wgrad (off is True)",
}


def flag(dest: str) -> str:
    """The option as it is written on the command line."""
    return _FLAGS.get(dest, words.flag(dest))


def differences(saved: Namespace, args: Namespace, dests: tuple[str, ...]) -> list[str]:
    """`--flag saved there, current here` for every option that both know and that differs."""
    return [
        f"{flag(dest)} {getattr(saved, dest)} there, {getattr(args, dest)} here"
        for dest in dests
        if hasattr(saved, dest)
        and hasattr(args, dest)
        and _comparable(saved, dest) != _comparable(args, dest)
    ]


def _comparable(args: Namespace, dest: str) -> Any:
    value = getattr(args, dest)
    if dest == "scmoe_router" and value == "c2r":
        return "topk"  # the same weights; a run may take the rule up and drop it
    if dest == "moe_layer_freq":
        # 1 is the same model as a list of ones.
        every = range(args.num_layers or 0)
        return [int(i % value == 0) for i in every] if isinstance(value, int) else list(value)
    if dest == "max_position_embeddings" and args.position_embedding_type != "learned_absolute":
        return None  # no tensor and no angle depends on it
    if dest == "num_query_groups" and not args.group_query_attention:
        return None
    return list(value) if isinstance(value, tuple) else value

"""What cannot be generated from, before anything is loaded."""

from argparse import Namespace
from importlib.util import find_spec

from megatron.core.transformer import attention
from megatron.core.utils import is_fa_min_version

from megatron_scmoe.checks.refusal import Found, Refusal
from megatron_scmoe.host.cpu import no_cuda_device


def has_flash_attention() -> bool:
    """Whether Megatron finds kernels that read keys and values from blocks."""
    if no_cuda_device():
        return False
    second = find_spec("flash_attn") is not None and is_fa_min_version("2.7.3")
    return attention.HAVE_FA4 or attention.HAVE_FA3 or second


# Before the checkpoint is looked at.
TYPED = (
    Refusal(
        lambda args: args.inference_max_requests < 1,
        "--inference-max-requests {inference_max_requests} is not at least 1",
        "it is the number of prompts that a rank computes together",
    ),
    Refusal(
        lambda args: args.context_parallel_size > 1,
        "--context-parallel-size {context_parallel_size} does not split keys and values that are "
        "kept",
        "use --tensor-model-parallel-size",
    ),
    Refusal(
        lambda args: args.inference_dynamic_batching and not has_flash_attention(),
        "--inference-dynamic-batching needs a CUDA device and flash-attn 2.7.3 or newer",
        "drop it",
        "its keys and values are in blocks that no other kernel of Megatron reads",
    ),
    Refusal(
        lambda args: args.scmoe_offload_experts == "disk" and not no_cuda_device(),
        "--scmoe-offload-experts disk is for machines without a CUDA device",
        "use cpu",
        "a GPU would wait for every page of the file",
    ),
)


def _long(args: Namespace, longest: int) -> Found:
    length = longest + args.max_new_tokens
    learned = args.position_embedding_type == "learned_absolute"
    return learned and length > args.max_position_embeddings and {"length": length}


# Of the options with those of the checkpoint, and the number of tokens of the longest prompt.
ADOPTED = (
    Refusal(
        lambda args, _: args.virtual_pipeline_model_parallel_size is not None,
        "Virtual pipeline stages do not generate",
        "leave them out: the checkpoint loads without",
    ),
    Refusal(
        _long,
        "The longest prompt and --max-new-tokens {max_new_tokens} are {length} tokens, the model "
        "has learned {max_position_embeddings} positions",
        "ask for less",
    ),
    Refusal(
        lambda args, _: args.inference_dynamic_batching and args.multi_latent_attention,
        "--inference-dynamic-batching does not work with --multi-latent-attention",
        "drop it",
        "Megatron asks for latents in its cache there, and for FlashMLA",
    ),
    Refusal(
        lambda args, _: args.scmoe_offload_experts != "none" and args.num_experts is None,
        "--scmoe-offload-experts {scmoe_offload_experts} has nothing to move",
        "leave it out",
        "the checkpoint's model has no experts",
    ),
)

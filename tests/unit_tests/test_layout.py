"""What no command line of a CPU machine can show: dispatchers of a GPU, and rare options.

The others are in tests/functional_tests/test_refusals.py, through the entry script.
"""

import shlex
import sys
from argparse import Namespace

import pytest
from megatron.core.transformer.moe import fused_a2a
from megatron.training.arguments import parse_args

from megatron_scmoe.arguments import add_scmoe_args
from megatron_scmoe.checks.layout import RESOLVED, TYPED
from megatron_scmoe.checks.refusal import refuse

MODEL = (
    "--num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --seq-length 32 "
    "--micro-batch-size 2 --global-batch-size 16 --num-experts 4 --transformer-impl local"
)


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch):
    """Options as RESOLVED meets them, on four ranks; the host has filled in what it derives."""

    def parse(options: str = "") -> Namespace:
        monkeypatch.setenv("WORLD_SIZE", "4")
        monkeypatch.setattr(sys, "argv", ["train.py", *shlex.split(f"{MODEL} {options}")])
        args = parse_args(add_scmoe_args)
        if args.expert_tensor_parallel_size is None:
            args.expert_tensor_parallel_size = args.tensor_model_parallel_size
        sizes = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
        args.virtual_pipeline_model_parallel_size = None
        args.data_parallel_size = args.world_size // sizes
        return args

    return parse


@pytest.mark.parametrize(
    ("backend", "flag", "expected"),
    [
        ("--moe-enable-deepep", "HAVE_DEEP_EP", "needs DeepEP"),
        ("--moe-flex-dispatcher-backend deepep", "HAVE_DEEP_EP", "needs DeepEP"),
        ("--moe-flex-dispatcher-backend hybridep", "HAVE_HYBRIDEP", "needs HybridEP"),
        ("--moe-flex-dispatcher-backend ncclep", "HAVE_TE_EP", "NVTE_BUILD_WITH_NCCL_EP=1"),
    ],
)
def test_dispatcher_that_is_not_installed(
    parsed, monkeypatch: pytest.MonkeyPatch, backend: str, flag: str, expected: str
) -> None:
    args = parsed(f"--moe-token-dispatcher-type flex --expert-model-parallel-size 2 {backend}")
    monkeypatch.setattr(fused_a2a, flag, False)
    with pytest.raises(ValueError, match=r"use --moe-token-dispatcher-type alltoall\.") as error:
        refuse(RESOLVED, args)
    assert expected in str(error.value)
    monkeypatch.setattr(fused_a2a, flag, True)
    refuse(RESOLVED, args)


def test_flex_dispatcher_alone(parsed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_a2a, "HAVE_DEEP_EP", True)
    monkeypatch.setattr(fused_a2a, "HAVE_HYBRIDEP", True)
    with pytest.raises(ValueError, match="nobody to send to"):
        refuse(RESOLVED, parsed("--moe-token-dispatcher-type flex"))
    refuse(
        RESOLVED, parsed("--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend hybridep")
    )


def test_rank_order_of_the_host(parsed) -> None:
    layout = (
        "--pipeline-model-parallel-size 2 --tensor-model-parallel-size 2 --use-tp-pp-dp-mapping"
    )
    refuse(TYPED, parsed(layout))
    with pytest.raises(ValueError, match="for experts as for the rest, and there are 2 and 1"):
        refuse(TYPED, parsed(f"{layout} --expert-tensor-parallel-size 1"))


def test_small_groups_of_micro_batches(parsed) -> None:
    args = parsed("--pipeline-model-parallel-size 2")
    args.virtual_pipeline_model_parallel_size = 2
    args.eval_global_batch_size, args.eval_micro_batch_size = 16, 2
    refuse(RESOLVED, args)
    args.microbatch_group_size_per_vp_stage = 1
    with pytest.raises(ValueError, match="use at least 2"):
        refuse(RESOLVED, args)
    args.microbatch_group_size_per_vp_stage = 3  # 4 micro-batches: one remains
    with pytest.raises(ValueError, match="use for example --global-batch-size 24"):
        refuse(RESOLVED, args)


def test_a_batch_that_the_host_may_decrease(parsed) -> None:
    args = parsed("--global-batch-size 12 --eval-global-batch-size 16")
    with pytest.raises(ValueError, match="use for example --global-batch-size 16"):
        refuse(TYPED, args)
    args.decrease_batch_size_if_needed = True
    refuse(TYPED, args)


@pytest.mark.parametrize(
    "options",
    [
        "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1",
        "--pipeline-model-parallel-size 4 --num-layers 6 --decoder-last-pipeline-num-layers 0",
        "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1 "
        "--decoder-last-pipeline-num-layers 3",
        "--pipeline-model-parallel-size 4 --num-layers 3 --account-for-embedding-in-pipeline-split",
        "--num-layers-per-virtual-pipeline-stage 4",
    ],
)
def test_stages(parsed, options: str) -> None:
    """Uneven splits that the host takes, and one that it does not."""
    args = parsed(options)
    if args.decoder_last_pipeline_num_layers == 0:
        with pytest.raises(ValueError, match="or give every stage its layers with --pipeline-mod"):
            refuse(TYPED, args)
    else:
        refuse(TYPED, args)

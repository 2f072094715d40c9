"""What is refused, from the command line of a job of two ranks: rank 0 says why in one line
and leaves with exit code 2; rank 1 leaves by itself or when the launcher tells it to.

The ranks are forked from a server that has imported the entry script, so that many cases fit in a
minute; tests/functional_tests/test_user_errors.py does the same under torchrun.
"""

import multiprocessing
import os
import shlex
import signal
import sys
from pathlib import Path

import pytest

from tests import distributed_utils  # the server's preloaded modules
from tests.functional_tests.launch import SCRIPT
from tests.limits import JOB_S

assert distributed_utils  # imported for its effect

MODEL = (
    "--num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --swiglu "
    "--normalization RMSNorm --position-embedding-type rope --seq-length 32 "
    "--max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 4 --lr 1e-2 "
    "--train-iters 6 --eval-interval 3 --mock-data --tokenizer-type NullTokenizer --vocab-size 64"
)
MOE = (
    "--num-experts 4 --moe-ffn-hidden-size 16 --moe-router-topk 1 "
    "--moe-token-dispatcher-type alltoall"
)
PAIRS = "--moe-layer-freq ([0,1]*2)"
POS2 = "--scmoe-shortcut-position pos2 --disable-bias-linear"

TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
BASELINE = f"{MOE} {PAIRS} --disable-bias-linear --moe-router-pre-softmax"

# Layouts, which are as impossible without a shortcut; megatron_scmoe/checks/layout.py.
LAYOUTS = {
    "TP without sequence parallelism": (
        f"{BASELINE} --tensor-model-parallel-size 2",
        "add --sequence-parallel",
    ),
    "no size": (f"{BASELINE} --tensor-model-parallel-size 0", "--tensor-model-parallel-size 0 is"),
    "ranks": (
        f"{BASELINE} --tensor-model-parallel-size 2 {PP2}",
        "is no multiple of 4 = --tensor-model-parallel-size 2 x --pipeline-model-parallel-size 2",
    ),
    "experts' ranks": (
        f"{BASELINE} --expert-model-parallel-size 2 --expert-tensor-parallel-size 2",
        "is no multiple of 4 = --expert-tensor-parallel-size 2 x --expert-model-parallel-size 2",
    ),
    "experts": (
        f"{BASELINE} --num-experts 3 --expert-model-parallel-size 2",
        "use --expert-model-parallel-size 1, or --num-experts 4",
    ),
    "EP without experts": ("--expert-model-parallel-size 2", "add --num-experts"),
    "top-k": (f"{BASELINE} --moe-router-topk 5", "--moe-router-topk 5 is outside 1..4"),
    "pattern's length": (f"{BASELINE} --num-layers 6", "--moe-layer-freq lists 4 layers"),
    "batch": (
        f"{BASELINE} --global-batch-size 6",
        "no multiple of 4 = --micro-batch-size 2 x 2 data parallel ranks: use for example "
        "--global-batch-size 8",
    ),
    "evaluation's batch": (
        f"{BASELINE} --eval-global-batch-size 6",
        "use for example --eval-global-batch-size 8",
    ),
    "layers": (
        f"{BASELINE} --num-layers 5 --moe-layer-freq ([0]+[0,1]*2) {PP2}",
        "--num-layers 5 cannot be split evenly over 2 pipeline stages",
    ),
    "first stage takes all": (
        f"{BASELINE} {PP2} --decoder-first-pipeline-num-layers 4",
        "change --decoder-first-pipeline-num-layers",
    ),
    "stages by hand": (
        f"{BASELINE} {PP2} --pipeline-model-parallel-layout Ett|tttL",
        "--pipeline-model-parallel-layout 'Ett|tttL' does not fit --num-layers 4",
    ),
    "virtual stages": (
        f"{BASELINE} {PP2} --num-virtual-stages-per-pipeline-rank 3",
        "over --num-virtual-stages-per-pipeline-rank 3: use 1",
    ),
    "layers of virtual stages": (
        f"{BASELINE} {PP2} --num-layers-per-virtual-pipeline-stage 3",
        "--num-layers-per-virtual-pipeline-stage 3: use 1",
    ),
    "virtual stages without stages": (
        f"{BASELINE} --num-layers-per-virtual-pipeline-stage 2",
        "need --pipeline-model-parallel-size > 1",
    ),
    "micro-batches of virtual stages": (
        f"{BASELINE} {PP2} --num-layers-per-virtual-pipeline-stage 1 --global-batch-size 6",
        "makes 3 for each data parallel rank: use for example --global-batch-size 8",
    ),
    "heads": (
        f"{BASELINE} {TP2} --num-attention-heads 5 --hidden-size 40",
        "use --tensor-model-parallel-size 1, or another --num-attention-heads",
    ),
    "heads and groups": (
        f"{BASELINE} --group-query-attention --num-query-groups 3",
        "--num-attention-heads 4 is no multiple of --num-query-groups 3: use --num-query-groups 1",
    ),
    "groups and TP": (
        f"{BASELINE} {TP2} --num-attention-heads 6 --hidden-size 48 --group-query-attention "
        "--num-query-groups 3",
        "--num-query-groups 3 neither divides --tensor-model-parallel-size 2",
    ),
    "MLP": (f"{BASELINE} {TP2} --ffn-hidden-size 63", "another --ffn-hidden-size"),
    "shared expert": (
        f"{BASELINE} {TP2} --moe-shared-expert-intermediate-size 15",
        "another --moe-shared-expert-intermediate-size",
    ),
    "expert's MLP": (
        f"{BASELINE} --expert-tensor-parallel-size 2 --moe-ffn-hidden-size 15",
        "use --expert-tensor-parallel-size 1, or another --moe-ffn-hidden-size",
    ),
    "sequence": (f"{BASELINE} {TP2} --seq-length 31", "--seq-length 31 is no multiple of"),
    "small vocabulary": (
        f"{BASELINE} --padded-vocab-size 32",
        "--padded-vocab-size 32 is less than the 64 tokens of the tokenizer: use at least 64",
    ),
    "vocabulary": (f"{BASELINE} {TP2} --padded-vocab-size 65", "another --padded-vocab-size"),
    "context parallelism": (
        f"{BASELINE} --context-parallel-size 2",
        "use --context-parallel-size 1",
    ),
    "optimizer instances": (
        f"{BASELINE} --use-distributed-optimizer --num-distributed-optimizer-instances 3",
        "--num-distributed-optimizer-instances 3 does not divide the 2 data parallel ranks: use 1",
    ),
}

CASES = LAYOUTS | {
    "no experts": (POS2, "add experts"),
    "biases": (f"{MOE} {PAIRS} --scmoe-shortcut-position pos2", "add it"),
    "slot": (f"{MOE} {PAIRS} {POS2} --scmoe-expert-slot 6", "outside 0..5"),
    "position": (f"{MOE} {PAIRS} --scmoe-shortcut-position pos4", "invalid choice: 'pos4'"),
    "combine": (f"{MOE} {PAIRS} {POS2} --scmoe-combine gate", "invalid choice: 'gate'"),
    "two gates": (
        f"{MOE} {PAIRS} {POS2} --scmoe-combine cg2 --moe-shared-expert-gate",
        "drop it to use cg2",
    ),
    "integer frequency": (f"{MOE} --moe-layer-freq 2 {POS2}", "'([0,1]*2)'"),
    "no dense layer": (f"{MOE} --moe-layer-freq 1 {POS2}", "use pos1"),
    "dense layer behind": (f"{MOE} --moe-layer-freq ([1,0]*2) {POS2}", "layer 1 has none"),
    "no MoE layer": (f"{MOE} --moe-layer-freq ([0]*4) {POS2}", "lists no MoE layer"),
    "cut unit": (
        f"{MOE} --num-layers 6 --moe-layer-freq ([0,1]*3) {POS2} --pipeline-model-parallel-size 2",
        "pipeline stage 1 would start at layer 4, inside the unit of layers 3 and 4",
    ),
    "TP without sequence parallelism, shortcut": (
        f"{MOE} {PAIRS} {POS2} --tensor-model-parallel-size 2",
        "add --sequence-parallel",
    ),
    "experts' layout": (
        f"{MOE} {PAIRS} {POS2} --expert-model-parallel-size 4",
        "The number of ranks, 2, is no multiple of --expert-model-parallel-size 4: start 4",
    ),
    "shared expert overlap": (
        f"{MOE} {PAIRS} {POS2} --moe-shared-expert-overlap --moe-shared-expert-intermediate-size 8",
        "--moe-shared-expert-overlap does not work",
    ),
    "multi-token prediction": (
        f"{MOE} {PAIRS} {POS2} --mtp-num-layers 1",
        "--mtp-num-layers does not work",
    ),
    "own spec": (f"{MOE} {PAIRS} {POS2} --spec some.module layer", "--spec does not work"),
    "options of no checkpoint": (
        f"{MOE} {PAIRS} {POS2} --use-checkpoint-args",
        "--use-checkpoint-args: no options",
    ),
    "norm": (f"{MOE} {PAIRS} {POS2} --apply-layernorm-1p", "drop --apply-layernorm-1p"),
}


def run_rank(rank: int, options: str, output: Path) -> None:
    """The entry script as one rank of two, its output in a file."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = [SCRIPT, *shlex.split(options)]
    from pretrain_gpt_scmoe import main

    main()


@pytest.mark.parametrize("case", CASES)
def test_refusal(case: str, tmp_path: Path) -> None:
    options, expected = CASES[case]
    context = multiprocessing.get_context("forkserver")
    outputs = [tmp_path / "rank0", tmp_path / "rank1"]
    ranks = [
        context.Process(target=run_rank, args=(rank, f"{MODEL} {options}", outputs[rank]))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    try:
        ranks[0].join(JOB_S)
        assert ranks[0].exitcode == 2, "".join(path.read_text() for path in outputs)[-3000:]
        ranks[1].terminate()  # as torchrun does
        ranks[1].join(JOB_S)
        assert ranks[1].exitcode in (2, -signal.SIGTERM)
    finally:
        for process in ranks:
            process.kill()
    text = "".join(path.read_text() for path in outputs if path.exists())
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if line.startswith(f"{SCRIPT}: error: ")]
    assert expected in line

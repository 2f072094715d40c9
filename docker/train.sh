#!/bin/bash
# What every node does: its share of the ranks of one job. The same command on all nodes; it goes on
# from the last checkpoint in DATA, which all nodes see. Further arguments go to the run.
set -euo pipefail
DATA=${DATA:-/data}
NODES=${NODES:-2}                          # in the job
RANKS=${RANKS:-1}                          # on each of them; with GPUs, their number
RENDEZVOUS=${RENDEZVOUS:-node0:29400}      # host and port of the first node
ITERATIONS=${ITERATIONS:-60}

MODEL=(
    --num-layers 4 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4
    --seq-length 128 --max-position-embeddings 128 --position-embedding-type rope
    --normalization RMSNorm --swiglu --disable-bias-linear --hidden-dropout 0 --attention-dropout 0
)
# The experts lie across the nodes: their all-to-all is what the network carries.
MOE=(
    --num-experts 8 --moe-layer-freq '([0,1]*2)' --moe-ffn-hidden-size 128 --moe-router-topk 1
    --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01
    --moe-token-dispatcher-type alltoall --expert-model-parallel-size "$((NODES * RANKS))"
    --scmoe-shortcut-position pos2
)
TRAINING=(
    --micro-batch-size 4 --global-batch-size "$((4 * NODES * RANKS))" --train-iters "$ITERATIONS"
    --lr 2e-3 --lr-decay-style constant --use-distributed-optimizer --seed 1
    --save "$DATA/checkpoints" --load "$DATA/checkpoints" --save-interval 10
    --data-path "$DATA/train_text_document" --data-cache-path "$DATA/cache" --split '95,5,0'
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$DATA/tokenizer" --num-workers 0
    --eval-iters 0 --eval-interval 1000 --log-interval 10 --tensorboard-dir "$DATA/tensorboard"
    # A lost node is noticed within a minute.
    --distributed-timeout-minutes 1
    --scmoe-trace-dir "$DATA/traces"
    --profile-step-start "$((ITERATIONS - 3))" --profile-step-end "$ITERATIONS"
)
# A node that lost another ends, and whatever started it starts it again: torchrun's own restarts
# would meet a rendezvous that still counts the dead node, and wait for it.
exec torchrun --nnodes "$NODES" --nproc-per-node "$RANKS" --max-restarts 0 \
    --rdzv-id scmoe --rdzv-backend c10d --rdzv-endpoint "$RENDEZVOUS" \
    pretrain_gpt_scmoe.py "${MODEL[@]}" "${MOE[@]}" "${TRAINING[@]}" "$@"

#!/usr/bin/env bash
# DGMoE at the sizes of arXiv:2404.05019: GPT2-MoE-Small or -Medium of table 7, 8 experts on 8 GPUs.
# Layers, widths, heads, experts, sequence, capacity and loss coefficient are table 8's; learning rate,
# batch and steps are not in the paper and are ours. Bias terms are left out: experts have none here.
#
# usage: DATA=<prefix of .bin/.idx> TOKENIZER=<folder> examples/dgmoe/paper_size.sh small|medium [options]
set -euo pipefail
cd "$(dirname "$0")/../.."

: "${DATA:?prefix of the .bin and .idx of tools/preprocess_data.py}"
: "${TOKENIZER:?folder of the Hugging Face tokenizer that made them}"
case ${1:-} in
small) SIZE=(--num-layers 12 --hidden-size 768 --num-attention-heads 12 --seq-length 1024
    --max-position-embeddings 1024 --moe-layer-freq '([0,1]*6)') ;;
medium) SIZE=(--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 2048
    --max-position-embeddings 2048 --moe-layer-freq '([0,1]*12)') ;;
*)
    echo "usage: DATA=<prefix> TOKENIZER=<folder> $0 small|medium [options]" >&2
    exit 2
    ;;
esac
shift

DGMOE_ARGS=(
    --scmoe-shortcut-position pos2
    --scmoe-dual-gating shared # (23) prints one G
    --num-experts 8
    --moe-router-topk 1
    --moe-expert-capacity-factor 2.0
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 0.01
    --moe-token-dispatcher-type alltoall
    --expert-model-parallel-size 8
)
TRAINING_ARGS=(
    --position-embedding-type learned_absolute
    --disable-bias-linear
    --micro-batch-size 8
    --global-batch-size 512
    --lr 6e-4
    --min-lr 6e-5
    --lr-decay-style cosine
    --lr-warmup-iters 2000
    --train-iters 100000
    --weight-decay 0.1
    --adam-beta2 0.95
    --clip-grad 1.0
    --bf16
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
)
DATA_ARGS=(
    --tokenizer-type HuggingFaceTokenizer
    --tokenizer-model "$TOKENIZER"
    --data-path "$DATA"
    --split 98,1,1
)
LOGGING_ARGS=(
    --log-interval 10
    --log-throughput
    --eval-interval 1000
    --eval-iters 10
    --save "${SAVE:-runs/dgmoe-paper}"
    --save-interval 1000
)
torchrun --standalone --nproc-per-node 8 pretrain_gpt_scmoe.py "${SIZE[@]}" "${DGMOE_ARGS[@]}" \
    "${TRAINING_ARGS[@]}" "${DATA_ARGS[@]}" "${LOGGING_ARGS[@]}" "$@"

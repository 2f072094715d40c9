#!/usr/bin/env bash
# Train a small DGMoE on real text, on two CPU cores or on GPUs: two gates, no shared expert.
# Further options go behind, for example --no-scmoe-distinct-experts. RUN_DIR chooses where it writes.
set -euo pipefail
cd "$(dirname "$0")/../.."

RUN_DIR=${RUN_DIR:-runs/dgmoe}
TEXT_DIR=${TEXT_DIR:-runs/text}
RANKS=2

# The log shows how often both gates want the same expert, by layer.
DGMOE_ARGS=(
    --scmoe-shortcut-position pos2
    --scmoe-dual-gating separate
    --moe-router-topk 1
)
MODEL_ARGS=(
    --num-layers 4
    --hidden-size 128
    --ffn-hidden-size 256
    --num-attention-heads 4
    --seq-length 128
    --max-position-embeddings 128
    --position-embedding-type rope
    --normalization RMSNorm
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --hidden-dropout 0
    --attention-dropout 0
    --num-experts 8
    --moe-layer-freq '([0,1]*2)'
    --moe-ffn-hidden-size 256
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 0.01
    --moe-token-dispatcher-type alltoall
    --expert-model-parallel-size "$RANKS"
)
TRAINING_ARGS=(
    --micro-batch-size 8
    --global-batch-size 16
    --lr 2e-3
    --min-lr 2e-4
    --lr-decay-style cosine
    --lr-warmup-iters 30
    --train-iters 200
    --weight-decay 0.1
    --adam-beta2 0.95
    --seed 1234
    --use-distributed-optimizer
)
DATA_ARGS=(
    --tokenizer-type HuggingFaceTokenizer
    --tokenizer-model "$TEXT_DIR/tokenizer"
    --train-data-path "$TEXT_DIR/train_text_document"
    --valid-data-path "$TEXT_DIR/valid_text_document"
    --test-data-path "$TEXT_DIR/valid_text_document"
    --data-cache-path "$TEXT_DIR/cache"
    --num-workers 0
)
LOGGING_ARGS=(
    --log-interval 10
    --eval-interval 100
    --eval-iters 10
    --tensorboard-dir "$RUN_DIR/tensorboard"
    --save "$RUN_DIR/checkpoints"
    --save-interval 200
)

examples/text.sh "$TEXT_DIR"
OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node "$RANKS" pretrain_gpt_scmoe.py \
    "${DGMOE_ARGS[@]}" "${MODEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${DATA_ARGS[@]}" \
    "${LOGGING_ARGS[@]}" "$@"

# shellcheck shell=bash disable=SC2034
# A small model on the quick start's text, for two CPU cores or GPUs: what presets.sh and c2r/run.sh
# share. Sourced, with TEXT_DIR, where examples/text.sh has written, and RANKS, the expert-parallel ones.
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
    --moe-token-dispatcher-type alltoall
    --expert-model-parallel-size "$RANKS"
)
TRAINING_ARGS=(
    --micro-batch-size 8
    --global-batch-size 16
    --lr 2e-3
    --lr-warmup-iters 30
    --weight-decay 0.1
    --adam-beta2 0.95
    --seed "${SEED:-1234}"
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

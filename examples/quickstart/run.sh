#!/usr/bin/env bash
# Train a ScMoE GPT on real text: corpus -> tokenizer -> .bin/.idx -> training -> resume -> report -> text.
# Runs on two CPU cores; on GPUs the same commands use NCCL. RUN_DIR chooses where it writes.
set -euo pipefail
cd "$(dirname "$0")/../.."

RUN_DIR=${RUN_DIR:-runs/quickstart}
DATA_DIR=$RUN_DIR/data
RANKS=2
TRAIN_ITERS=600
RESUME_ITERS=20
SEQ_LENGTH=128
GLOBAL_BATCH_SIZE=16

MODEL_ARGS=(
    --num-layers 4
    --hidden-size 128
    --ffn-hidden-size 256
    --num-attention-heads 4
    --group-query-attention
    --num-query-groups 2
    --seq-length "$SEQ_LENGTH"
    --max-position-embeddings "$SEQ_LENGTH"
    --position-embedding-type rope
    --normalization RMSNorm
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --hidden-dropout 0
    --attention-dropout 0
)
MOE_ARGS=(
    --num-experts 8
    --moe-layer-freq '([0,1]*2)'
    --moe-ffn-hidden-size 256
    --moe-router-topk 1
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 0.01
    --moe-token-dispatcher-type alltoall
    --expert-model-parallel-size "$RANKS"
)
# The one flag that makes a ScMoE model of the baseline above.
SCMOE_ARGS=(--scmoe-shortcut-position pos2)
TRAINING_ARGS=(
    --micro-batch-size 8
    --global-batch-size "$GLOBAL_BATCH_SIZE"
    --optimizer adam
    --lr 2e-3
    --min-lr 2e-4
    --lr-decay-style cosine
    --lr-warmup-iters 30
    --train-iters "$((TRAIN_ITERS + RESUME_ITERS))"
    --weight-decay 0.1
    --adam-beta2 0.95
    --clip-grad 1.0
    --seed 1234
    --use-distributed-optimizer
)
DATA_ARGS=(
    --tokenizer-type HuggingFaceTokenizer
    --tokenizer-model "$RUN_DIR/tokenizer"
    --train-data-path "$DATA_DIR/train_text_document"
    --valid-data-path "$DATA_DIR/valid_text_document"
    --test-data-path "$DATA_DIR/valid_text_document"
    --data-cache-path "$DATA_DIR/cache"
    --num-workers 0
)
LOGGING_ARGS=(
    --log-interval 20
    --log-throughput
    --eval-interval 100
    --eval-iters 20
    --tensorboard-dir "$RUN_DIR/tensorboard"
    --tensorboard-log-interval 1
    --log-timers-to-tensorboard
    --save "$RUN_DIR/checkpoints"
    --save-interval "$TRAIN_ITERS"
)

# Two thousand lines, most of them options, go into a file; a line that moves stays. Where this script
# is ended, torchrun gets a SIGTERM and ends its ranks.
launch() {
    OMP_NUM_THREADS=1 setpriv --pdeathsig TERM torchrun --standalone --nproc-per-node "$RANKS" pretrain_gpt_scmoe.py \
        "${MODEL_ARGS[@]}" "${MOE_ARGS[@]}" "${SCMOE_ARGS[@]}" "${TRAINING_ARGS[@]}" \
        "${DATA_ARGS[@]}" "${LOGGING_ARGS[@]}" "$@" 2>&1 |
        python examples/quickstart/progress.py --log "$RUN_DIR/log.txt" \
            --sequence-length "$SEQ_LENGTH"
}

echo "== 1/6 text: the Python standard library, with held-out documents"
rm -rf "$RUN_DIR"/{data,tokenizer,tensorboard,checkpoints,log.txt,summary.json,loss.png}
mkdir -p "$DATA_DIR"
python examples/quickstart/corpus.py --output-dir "$DATA_DIR" --max-megabytes 12

echo "== 2/6 tokenizer: byte-level BPE"
python examples/quickstart/tokenizer.py --input "$DATA_DIR/train.jsonl" \
    --output-dir "$RUN_DIR/tokenizer" --vocab-size 4096

echo "== 3/6 tokens"
for split in train valid; do
    python tools/preprocess_data.py --input "$DATA_DIR/$split.jsonl" \
        --output-prefix "$DATA_DIR/$split" --append-eod \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$RUN_DIR/tokenizer"
done

echo "== 4/6 training: $TRAIN_ITERS iterations, then a second launch that resumes for $RESUME_ITERS" \
    "(everything it says: $RUN_DIR/log.txt)"
launch --exit-interval "$TRAIN_ITERS"
launch --load "$RUN_DIR/checkpoints"

echo "== 5/6 report"
python examples/quickstart/loss_report.py --run-dir "$RUN_DIR" \
    --tokens-per-iteration "$((GLOBAL_BATCH_SIZE * SEQ_LENGTH))" \
    --resumed-from-iteration "$TRAIN_ITERS"

echo "== 6/6 text: what it writes after a prompt, on one process (docs/generation.md)"
python tools/generate.py --load "$RUN_DIR/checkpoints" --prompt "def" \
    --max-new-tokens 60 --temperature 0.7

cat <<END
To Hugging Face and back (docs/huggingface.md; pip install 'megatron-scmoe[hf]'):
    python tools/convert_checkpoint.py export --load $RUN_DIR/checkpoints --output $RUN_DIR/hf
    python tools/convert_checkpoint.py import --input $RUN_DIR/hf --save $RUN_DIR/imported
Both, and what users do in between: examples/huggingface/run.sh
END

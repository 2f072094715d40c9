#!/usr/bin/env bash
# Train a small model of a published system on real text, on two CPU cores or on GPUs.
#
#     examples/presets.sh scmoe|scmoe-2|dgmoe|moepp|longcat-flash|nvidia-shortcut [options]
#
# Further options win over the preset's, for example --no-scmoe-distinct-experts. RUN_DIR chooses where
# it writes. The papers' sizes: paper_size.sh, and examples/recipes/ beside stock models.
set -euo pipefail
cd "$(dirname "$0")/.."

RANKS=2
PAIRS=(--moe-layer-freq '([0,1]*2)') # dense, MoE, dense, MoE
BALANCED=(--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01)
case ${1-} in
    scmoe | scmoe-2 | dgmoe) OWN=("${PAIRS[@]}" "${BALANCED[@]}") ;;
    moepp) OWN=(--moe-layer-freq 1) ;;
    longcat-flash)
        OWN=("${PAIRS[@]}" --moe-router-topk 3 --moe-router-bias-update-rate 0.05
            --moe-aux-loss-coeff 0.001 --q-lora-rank 48 --kv-lora-rank 32 --qk-head-dim 32
            --qk-pos-emb-head-dim 16 --v-head-dim 32 --qk-layernorm --rope-type rope)
        ;;
    nvidia-shortcut) OWN=("${BALANCED[@]}") ;;
    *)
        sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
        exit 2
        ;;
esac
PRESET=$1
shift
RUN_DIR=${RUN_DIR:-runs/$PRESET}
TEXT_DIR=${TEXT_DIR:-runs/text}

. examples/small.sh
OWN+=(--num-experts 8 --moe-ffn-hidden-size 256)
SCHEDULE=(--min-lr 2e-4 --lr-decay-style cosine --train-iters 200)
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
    --scmoe-preset "$PRESET" "${OWN[@]}" "${MODEL_ARGS[@]}" "${TRAINING_ARGS[@]}" \
    "${SCHEDULE[@]}" "${DATA_ARGS[@]}" "${LOGGING_ARGS[@]}" "$@"

#!/usr/bin/env bash
# The whole of C2R on a small model and real text, on two CPU cores or on GPUs: train, count which
# experts are chosen together, place them so, go on with lists of partners at several T, compare.
#
#     examples/c2r/run.sh [options of every run]
#
# RUN_DIR chooses where it writes, EXPERTS and TOPK the model, BEFORE and AFTER how many iterations
# are trained without and with the lists, RANKS the expert-parallel ranks. Runs of several SEEDs are
# compared together: examples/c2r/compare.py RUN_DIR RUN_DIR ... docs/c2r.md explains it.
set -euo pipefail
cd "$(dirname "$0")/../.."

RUN_DIR=${RUN_DIR:-runs/c2r}
TEXT_DIR=${TEXT_DIR:-runs/text}
EXPERTS=${EXPERTS:-16}
TOPK=${TOPK:-2}
BEFORE=${BEFORE:-300}
AFTER=${AFTER:-150}
RANKS=${RANKS:-2}
TABLE_RANKS=${TABLE_RANKS:-4 8} # what the table counts copies for

. examples/small.sh
MODEL_ARGS+=(
    --scmoe-shortcut-position pos2
    --moe-layer-freq '([0,1]*2)' # dense, MoE, dense, MoE
    --num-experts "$EXPERTS"
    --moe-ffn-hidden-size 128
    --moe-router-topk "$TOPK"
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 0.01
)
TRAINING_ARGS+=(--lr-decay-style constant)
LOGGING_ARGS=(--log-interval 10 --eval-interval 100000 --eval-iters 20)

train() { # name, iterations, further options
    local name=$1 iterations=$2
    shift 2
    mkdir -p "$RUN_DIR/$name"
    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node "$RANKS" pretrain_gpt_scmoe.py \
        "${MODEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${DATA_ARGS[@]}" "${LOGGING_ARGS[@]}" \
        --train-iters "$iterations" --save "$RUN_DIR/$name/checkpoints" \
        --save-interval "$iterations" "$@" | tee "$RUN_DIR/$name/log.txt"
}

profile() { # name, train or valid text, file of counts
    OMP_NUM_THREADS=1 python tools/c2r.py profile --load "$RUN_DIR/$1/checkpoints" \
        --data-path "$TEXT_DIR/$2_text_document" --tokens "${TOKENS:-50000}" --output "$3" \
        --picture "${3%.json}.svg"
}

examples/text.sh "$TEXT_DIR"
train base "$BEFORE" --scmoe-collaboration-dir "$RUN_DIR/base/while_training" "$@"
# Partners and ranks come from the text that was trained on, the table from text that was held out.
profile base train "$RUN_DIR/matrix.json"
profile base valid "$RUN_DIR/base/counts.json"
python tools/c2r.py lists --matrix "$RUN_DIR/matrix.json" --output "$RUN_DIR/lists.json"
python tools/c2r.py place --matrix "$RUN_DIR/matrix.json" --ranks "$RANKS" \
    --output "$RUN_DIR/placement.json"

# The least that the rule can do with is K - 1; all partners are no constraint.
for t in $(printf '%s\n' $((TOPK - 1)) $((2 * TOPK - 2)) $((EXPERTS / 2)) $((EXPERTS - 1)) | sort -nu); do
    train "t$t" $((BEFORE + AFTER)) --load "$RUN_DIR/base/checkpoints" \
        --scmoe-c2r-lists "$RUN_DIR/lists.json" --scmoe-c2r-top-t "$t" \
        --scmoe-expert-placement "$RUN_DIR/placement.json" --scmoe-dispatch-copies rank "$@"
    profile "t$t" valid "$RUN_DIR/t$t/counts.json"
done
# shellcheck disable=SC2086  # numbers
python examples/c2r/compare.py "$RUN_DIR" --ranks $TABLE_RANKS

#!/usr/bin/env bash
# The loop that users live in, on the model of `make pretrain`: out to Hugging Face, generate, lm_eval, fine-tune
# by adapters and whole, in again, and pretraining goes on. No network; pip install 'megatron-scmoe[hf,eval]'.
set -euo pipefail
cd "$(dirname "$0")/../.."

RUN_DIR=${RUN_DIR:-runs/quickstart} # of a finished `make pretrain`
OUT_DIR=${OUT_DIR:-runs/huggingface}
STEPS=${STEPS:-20}
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [ ! -e "$RUN_DIR/checkpoints/latest_checkpointed_iteration.txt" ]; then
    echo "$RUN_DIR has no checkpoints: run make pretrain, or name a folder with RUN_DIR" >&2
    exit 2
fi
rm -rf "$OUT_DIR"/{exported,adapters,tuned,checkpoints,tasks}
mkdir -p "$OUT_DIR/tasks"

echo "== 1/7 out: the directory, and the logits of both models"
python tools/convert_checkpoint.py export --load "$RUN_DIR/checkpoints" --output "$OUT_DIR/exported"

echo "== 2/7 generate, by transformers"
python - "$OUT_DIR/exported" <<'END'
import sys

from transformers import pipeline

write = pipeline("text-generation", sys.argv[1], trust_remote_code=True)
print(write("def", max_new_tokens=40, do_sample=False)[0]["generated_text"])
END

echo "== 3/7 lm_eval: a task of the held-out documents"
cat >"$OUT_DIR/tasks/held_out.yaml" <<END
task: held_out
dataset_path: json
dataset_kwargs:
  data_files:
    test: $RUN_DIR/data/valid.jsonl
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: bits_per_byte
END
if python -c "import lm_eval" 2>"$OUT_DIR/tasks/why_not.txt"; then
    python -m lm_eval --model hf --device cpu --batch_size 4 --limit 10 \
        --model_args "pretrained=$OUT_DIR/exported,trust_remote_code=True,dtype=float32" \
        --tasks held_out --include_path "$OUT_DIR/tasks"
else
    echo "lm_eval is not installed: pip install 'megatron-scmoe[eval]'"
fi

echo "== 4/7 fine-tune: adapters, merged"
python examples/huggingface/finetune.py --model "$OUT_DIR/exported" --input "$RUN_DIR/data/train.jsonl" \
    --output "$OUT_DIR/adapters" --steps "$STEPS" --lora

echo "== 5/7 fine-tune: all weights"
python examples/huggingface/finetune.py --model "$OUT_DIR/adapters" --input "$RUN_DIR/data/train.jsonl" \
    --output "$OUT_DIR/tuned" --steps "$STEPS"

echo "== 6/7 in"
python tools/convert_checkpoint.py import --input "$OUT_DIR/tuned" --save "$OUT_DIR/checkpoints"

echo "== 7/7 pretraining goes on, from the weights"
torchrun --standalone --nproc-per-node 2 pretrain_gpt_scmoe.py \
    --load "$OUT_DIR/checkpoints" --finetune --use-checkpoint-args \
    --seq-length 128 --micro-batch-size 8 --global-batch-size 16 \
    --lr 2e-4 --min-lr 2e-4 --train-iters "$STEPS" --log-interval 5 --eval-interval 1000 --eval-iters 0 \
    --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall \
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$RUN_DIR/tokenizer" \
    --data-path "$RUN_DIR/data/train_text_document" --split 100,0,0 \
    --data-cache-path "$OUT_DIR/cache" --num-workers 0 >"$OUT_DIR/log.txt" 2>&1 ||
    { tail -n 20 "$OUT_DIR/log.txt" >&2; exit 1; }
grep -o "iteration .* lm loss: [^|]*" "$OUT_DIR/log.txt" | sed 's/|.*lm loss/ loss/'

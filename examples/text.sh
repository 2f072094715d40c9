#!/usr/bin/env bash
# The quick start's text, tokenizer and tokens, into a folder that may have them already.
# usage: [MEGABYTES=12] [VOCABULARY=4096] examples/text.sh FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."

DIR=${1:?usage: examples/text.sh FOLDER}
[ -e "$DIR/complete" ] && exit
mkdir -p "$DIR"
python examples/quickstart/corpus.py --output-dir "$DIR" --max-megabytes "${MEGABYTES:-12}"
python examples/quickstart/tokenizer.py --input "$DIR/train.jsonl" \
    --output-dir "$DIR/tokenizer" --vocab-size "${VOCABULARY:-4096}"
for split in train valid; do
    python tools/preprocess_data.py --input "$DIR/$split.jsonl" \
        --output-prefix "$DIR/$split" --append-eod \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$DIR/tokenizer"
done
touch "$DIR/complete"

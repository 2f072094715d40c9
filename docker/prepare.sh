#!/bin/sh
# Text, tokenizer and tokens for train.sh, once for all nodes: DATA is the volume that they share.
set -eu
DATA=${DATA:-/data}
if [ ! -e "$DATA/text_text_document.idx" ]; then
    python examples/quickstart/corpus.py --output-dir "$DATA" --max-megabytes 2
    python examples/quickstart/tokenizer.py --input "$DATA/train.jsonl" \
        --output-dir "$DATA/tokenizer" --vocab-size 1024
    python tools/preprocess_data.py --input "$DATA/train.jsonl" --output-prefix "$DATA/text" \
        --append-eod --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$DATA/tokenizer"
fi

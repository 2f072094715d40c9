#!/bin/sh
# Text, tokenizer and tokens for train.sh, once for all nodes: DATA is the volume that they share.
MEGABYTES=2 VOCABULARY=1024 exec examples/text.sh "${DATA:-/data}"

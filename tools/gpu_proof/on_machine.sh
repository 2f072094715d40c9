#!/bin/sh
# The proof on a machine with a GPU and without a network, from the root of this project:
#
#     sh tools/gpu_proof/on_machine.sh BUNDLE DIR [options of the proof]
#
# BUNDLE is what `python -m tools.gpu_proof.bundle` made; `python3` is the one that has torch.
set -eu
bundle=$1
output=$2
shift 2

environment=$(mktemp -d)
python=$(python3 tools/gpu_proof/environment.py "$environment" "$bundle")
# Transformer Engine looks for the libraries that torch brought along.
nvidia=$(echo "$environment"/lib/python3.*/site-packages/nvidia)
export CUDNN_HOME="$nvidia/cudnn"
export LD_LIBRARY_PATH="$nvidia/nccl/lib:$nvidia/cudnn/lib:$nvidia/cu13/lib:${LD_LIBRARY_PATH:-}"
export PYTHONPATH="$PWD"
# Where .git did not travel.
GPU_PROOF_COMMIT=$(cat "$bundle/commit")
export GPU_PROOF_COMMIT
exec "$python" -m tools.gpu_proof --output "$output" "$@"

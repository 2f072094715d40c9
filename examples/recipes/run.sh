#!/usr/bin/env bash
# Train a recipe: the same command on every node, NODE_RANK and MASTER_ADDR say which one it is.
#
#     examples/recipes/run.sh RECIPE --data PREFIX --tokenizer DIR [--nodes N] [--baseline] [--dry-run] [options]
#
# Further options are those of pretrain_gpt_scmoe.py and win over the recipe's. --baseline trains the
# stock model beside it. --dry-run prints the command, asks the planner what to expect on H100 with
# InfiniBand, and the doctor whether this machine is fit. GPUS is the number of a node's GPUs.
set -euo pipefail
cd "$(dirname "$0")/../.."

fail() {
    echo "run.sh: error: $*" >&2
    exit 2
}
value() { # of an option that needs one
    [ $# -ge 2 ] || fail "$1 has no value"
    echo "$2"
}

recipes=$(cd examples/recipes && ls -d */ | tr -d /)
recipe=${1-}
[ -f "examples/recipes/$recipe/scmoe.yaml" ] || fail "no recipe ${recipe:-is named}: one of" $recipes
shift
file=examples/recipes/$recipe/scmoe.yaml
nodes=$(sed -n 's/^NODES: //p' "$file")
data='' tokenizer='' dry_run='' more=()
while [ $# -gt 0 ]; do
    case $1 in
        --data) data=$(value "$@") || exit; shift ;;
        --tokenizer) tokenizer=$(value "$@") || exit; shift ;;
        --nodes) nodes=$(value "$@") || exit; shift ;;
        --baseline) file=examples/recipes/$recipe/baseline.yaml ;;
        --dry-run) dry_run=1 ;;
        *) more+=("$1") ;;
    esac
    shift
done
[ -n "$data" ] || fail "--data is missing: the prefix of what tools/preprocess_data.py wrote"
[ -n "$tokenizer" ] || fail "--tokenizer is missing: the folder or the hub's name of a tokenizer"
[[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "--nodes $nodes is no number of nodes"

GPUS=${GPUS:-8}
launcher=(torchrun --nnodes "$nodes" --nproc-per-node "$GPUS")
launcher+=(--node-rank "${NODE_RANK:-${SLURM_NODEID:-0}}")
launcher+=(--master-addr "${MASTER_ADDR:-localhost}" --master-port "${MASTER_PORT:-29500}")
options=(--config "$file" --data-path "$data")
options+=(--tokenizer-type HuggingFaceTokenizer --tokenizer-model "$tokenizer" "${more[@]}")

if [ -z "$dry_run" ]; then
    exec "${launcher[@]}" pretrain_gpt_scmoe.py "${options[@]}"
fi
echo "On each of $nodes nodes:"
printf ' %q' "${launcher[@]}" pretrain_gpt_scmoe.py "${options[@]}"
printf '\n\n'
python tools/plan_overlap.py "${options[@]}" --cluster-preset h100-infiniband \
    --cluster-nodes "$nodes" --cluster-gpus-per-node "$GPUS" \
    --cluster-flops-efficiency 0.4 --cluster-bandwidth-efficiency 0.6
echo
python tools/doctor.py

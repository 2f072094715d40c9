#!/bin/bash
# One node's ranks in a container that may be told to leave: `node.sh PROGRAM <its options>`, with torchrun's
# settings in PET_NNODES, PET_NPROC_PER_NODE, PET_NODE_RANK, PET_MASTER_ADDR, PET_MASTER_PORT.
#
# SIGTERM goes to the ranks, which with --exit-signal-handler save and leave; torchrun alone would kill
# them after 30 s. The exit code is 143 then, so that Kubernetes does not take the job for done.
set -uo pipefail
torchrun --max-restarts 0 "$@" &
launcher=$!
asked=
trap 'asked=1; kill -TERM $(cat "/proc/$launcher/task/$launcher/children")' TERM
code=0
# A signal ends `wait` early.
while wait "$launcher"; code=$?; kill -0 "$launcher" 2> /dev/null; do :; done
[ -z "$asked" ] || code=143
exit "$code"

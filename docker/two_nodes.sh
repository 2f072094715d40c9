#!/bin/bash
# compose.yaml by plain `docker run`: two nodes of a job on one machine, a container each.
#
#     docker/two_nodes.sh [IMAGE]             # runs until both have ended, then prints the report
#     docker kill scmoe-node1; docker start scmoe-node1       # meanwhile: it goes on
#
# On two machines the network is `--network host`, the volume a shared folder, and RENDEZVOUS names
# the first machine.
set -euo pipefail
IMAGE=${1:-megatron-scmoe:cpu}
JOB=${JOB:-scmoe}
NODES=2

nodes=()
clean_up() {
    docker rm --force "${nodes[@]}" > /dev/null 2>&1 || true
    docker network rm "$JOB" > /dev/null 2>&1 || true
}
trap clean_up EXIT

docker network create "$JOB" > /dev/null
docker volume create "$JOB" > /dev/null
docker run --rm --volume "$JOB:/data" "$IMAGE" docker/prepare.sh
for ((node = 0; node < NODES; node++)); do
    nodes+=("$JOB-node$node")
    docker run --detach --name "$JOB-node$node" --network "$JOB" --restart on-failure:10 \
        --volume "$JOB:/data" --shm-size 8g \
        --env "NODES=$NODES" --env "RANKS=${RANKS:-1}" --env "ITERATIONS=${ITERATIONS:-60}" \
        --env "RENDEZVOUS=$JOB-node0:29400" "$IMAGE" docker/train.sh > /dev/null
done
# A container that was killed and started again is waited for again.
while docker wait "${nodes[@]}" > /dev/null && sleep 5 \
    && [ -n "$(docker ps --quiet --filter "network=$JOB")" ]; do :; done
for node in "${nodes[@]}"; do
    docker logs "$node" > "$node.log" 2>&1
    code=$(docker inspect --format '{{.State.ExitCode}}' "$node")
    [ "$code" = 0 ] || { echo "$node ended with exit code $code: see $node.log" >&2; exit 1; }
done
docker run --rm --volume "$JOB:/data" "$IMAGE" scmoe-report /data/traces
echo "In the volume $JOB: checkpoints, traces, tensorboard. docker volume rm $JOB removes them."

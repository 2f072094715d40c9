"""Ways of exchanging tokens, by the value of --moe-token-dispatcher-type."""

from megatron_scmoe.model.dispatch.allgather import AllGatherDispatcher
from megatron_scmoe.model.dispatch.alltoall import AllToAllDispatcher
from megatron_scmoe.model.dispatch.flex import FlexDispatcher
from megatron_scmoe.model.dispatch.trip import Dispatcher

DISPATCHERS: dict[str, type[Dispatcher]] = {
    "allgather": AllGatherDispatcher,
    "alltoall": AllToAllDispatcher,
    "flex": FlexDispatcher,
}

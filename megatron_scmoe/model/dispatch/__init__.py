"""Ways of exchanging tokens, by the value of --moe-token-dispatcher-type.

Those of an all-to-all differ in how often a token is sent, the value of --scmoe-dispatch-copies.
"""

from megatron_scmoe.model.dispatch.allgather import AllGatherDispatcher
from megatron_scmoe.model.dispatch.alltoall import AllToAllDispatcher
from megatron_scmoe.model.dispatch.flex import FlexDispatcher
from megatron_scmoe.model.dispatch.once import OncePerRankDispatcher
from megatron_scmoe.model.dispatch.relayed import OncePerNodeDispatcher
from megatron_scmoe.model.dispatch.trip import Dispatcher

DISPATCHERS: dict[str, type[Dispatcher]] = {
    "allgather": AllGatherDispatcher,
    "alltoall": AllToAllDispatcher,
    "flex": FlexDispatcher,
}
COPIES: dict[str, type[Dispatcher]] = {
    "expert": AllToAllDispatcher,
    "rank": OncePerRankDispatcher,
    "node": OncePerNodeDispatcher,
}


def dispatcher_of(host_type: str, copies: str) -> type[Dispatcher]:
    """The class that both options choose.

    Raises:
        KeyError: one of them is in no table.
    """
    return COPIES[copies] if host_type == "alltoall" else DISPATCHERS[host_type]

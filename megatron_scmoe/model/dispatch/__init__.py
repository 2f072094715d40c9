"""Ways of exchanging tokens, by the value of --moe-token-dispatcher-type."""

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import (
    MoEFlexTokenDispatcher,
    MoETokenDispatcher,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scmoe.model.dispatch.allgather import AllGatherDispatcher
from megatron_scmoe.model.dispatch.alltoall import AllToAllDispatcher
from megatron_scmoe.model.dispatch.flex import FlexDispatcher
from megatron_scmoe.model.dispatch.trip import Dispatcher


def build_dispatcher(
    config: TransformerConfig,
    pg_collection: ProcessGroupCollection,
    local_expert_indices: list[int],
    host: MoETokenDispatcher,
) -> Dispatcher:
    """The dispatcher of --moe-token-dispatcher-type.

    Args:
        host: the host's own.
    """
    local_experts = slice(local_expert_indices[0], local_expert_indices[-1] + 1)
    if isinstance(host, MoEFlexTokenDispatcher):
        return FlexDispatcher(host, local_experts)
    if config.moe_token_dispatcher_type == "allgather":
        return AllGatherDispatcher(config, pg_collection, local_experts)
    return AllToAllDispatcher(config, pg_collection, local_experts)

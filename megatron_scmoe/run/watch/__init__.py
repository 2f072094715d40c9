"""When a rank dies or stalls, the others stop and one line says which rank and which collective.

`watched_ranks` surrounds the training run. `account` is what a rank knows about itself, `board` how
ranks exchange it when collectives no longer work, `verdict` who is at fault, `watch` who acts when.
Nothing here runs between collectives: torch's own flight recorder is read when there is trouble.
"""

from megatron_scmoe.run.watch.peers import lost_peer
from megatron_scmoe.run.watch.watch import watched_ranks

__all__ = ["lost_peer", "watched_ranks"]

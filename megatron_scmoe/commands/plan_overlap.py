"""Predict what a shortcut is worth on a cluster, without one.

    python tools/plan_overlap.py <Megatron options> --cluster-preset h100-infiniband \\
        --cluster-nodes 8 --cluster-flops-efficiency 0.4 --cluster-bandwidth-efficiency 0.6

Takes the options of pretrain_gpt_scmoe.py; layout and batch are those of the cluster, and no rank
is started. Prints, for every position and slot, how much of the all-to-all is hidden and the
speed-up over stock Megatron; the EP degree from which communication no longer fits; memory of a
GPU; and everything that was assumed. docs/planner.md explains the numbers.

--measured FILE takes measured operator times (megatron_scmoe/planner/measured.py) in place of
FLOPs, and compares predictions with measured runs. Exit codes: 0 printed; 2 options are wrong.
"""

import json
import sys
import warnings

from megatron_scmoe import presets, recipe, say
from megatron_scmoe.checks.before_torch import asks_for_help
from megatron_scmoe.checks.refusal import refuse_all
from megatron_scmoe.planner.cluster_options import ASKED, typed


def main() -> int:
    """Print the plan and return the exit code."""
    say.one_line_interrupts()
    with say.user_errors():
        words = presets.expand(recipe.expand(sys.argv[1:]))
        if not asks_for_help(words):
            refuse_all(ASKED, typed(words))

    # These import torch, which takes seconds.
    from megatron_scmoe import start

    with say.user_errors():
        start.replace_host_symbols()
    from megatron_scmoe.planner.plan import make_plan
    from megatron_scmoe.planner.plan_arguments import parse_command_line, source_from_args
    from megatron_scmoe.planner.plan_text import as_json, as_text

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the host's, about training
        with say.user_errors():
            args, config, notes = parse_command_line()
            source = source_from_args(args)
            plan = make_plan(args, config, source, args.extrapolate)
        if args.json:
            print(json.dumps(as_json(args, config.transformer, source, plan, notes), indent=2))
        else:
            print(as_text(args, config.transformer, source, plan, notes))
    return 0


if __name__ == "__main__":
    sys.exit(main())

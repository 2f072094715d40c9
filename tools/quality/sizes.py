"""Parameters and FLOPs of every contender, by the planner's count; a program of its own.

python -m tools.quality.sizes --scale SCALE
"""

import json
import sys

from megatron_scmoe import start

start.replace_host_symbols()

from contextlib import redirect_stdout
from io import StringIO

from megatron_scmoe import arguments
from megatron_scmoe.planner.size import model_size
from tools.quality.contenders import CONTENDERS, LISTS
from tools.quality.scales import SCALES, Scale


def sizes(scale: Scale) -> dict[str, dict[str, int]]:
    """By contender: parameters, those a token meets, FLOPs of a token's forward pass."""
    found = {}
    for each in CONTENDERS:
        own = each.command_line(scale)
        if LISTS in own:  # which partners there are changes no size
            at = own.index(LISTS)
            del own[at - 1 : at + 3]  # --scmoe-c2r-lists FILE --scmoe-c2r-top-t T
        sys.argv[1:] = [
            *scale.model_options(),
            *own,
            *scale.schedule(20, scale.rates[0], 1, 1),
            *("--tokenizer-type", "NullTokenizer", "--vocab-size", str(scale.vocabulary)),
        ]
        with redirect_stdout(StringIO()):
            args = arguments.parse(arguments.add_scmoe_args)
            arguments.validate(args)
            args.padded_vocab_size = scale.vocabulary
            size = model_size(arguments.model_config_from_args(args), scale.seq_length, scale.batch)
        found[each.name] = {
            "parameters": size.parameters,
            "activated": size.activated_parameters,
            "flops": size.model_flops,
        }
    return found


if __name__ == "__main__":
    print(json.dumps(sizes(SCALES[sys.argv.pop()])))

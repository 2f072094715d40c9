"""Let a checkpoint write text.

    python tools/generate.py --load runs/quickstart/checkpoints --prompt "def main" --greedy
    torchrun --nproc-per-node 2 tools/generate.py --load CHECKPOINTS --prompt-file prompts.txt \\
        --expert-model-parallel-size 2 --max-new-tokens 200 --temperature 0.8 --top-p 0.95

Model and tokenizer are those of the checkpoint's record (`iter_0000100.json`); --tokenizer-model
names the tokenizer's files where they have moved. Takes Megatron's options of the layout, whatever
layout the checkpoint was trained at. Prompts come from --prompt, --prompt-file or standard input.
The text goes to standard output, as it is written if there is one prompt; tokens/s go to standard
error. docs/generation.md has examples and what is equal to what.

Exit codes: 0 written; 1 the checkpoint cannot be read, or a rank is lost; 2 the options are wrong.
"""

import sys

from megatron_scmoe import recipe, say
from megatron_scmoe.checks.before_torch import refuse_typed
from megatron_scmoe.commands.generation_options import ASKED, add_generation_args, add_megatrons


def main() -> int:
    """Generate and return the exit code."""
    say.one_line_interrupts()
    with say.user_errors():
        words = recipe.expand(sys.argv[1:])
        refuse_typed(words, ASKED, add_generation_args, add_megatrons)

    # These import torch, which takes seconds.
    from megatron_scmoe import start

    with say.user_errors():
        start.replace_host_symbols()
    from megatron_scmoe.commands.generated_text import write_text

    return write_text()


if __name__ == "__main__":
    sys.exit(main())

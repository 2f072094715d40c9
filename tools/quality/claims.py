"""What papers say in passing, of one trained model on held-out text; a program of its own.

    python -m tools.quality.claims --load CHECKPOINT --text DIR --sequences N --found FILE

    representations of adjacent blocks are similar   ScMoE, appendix A.1
    tokens of some kinds get more FFN experts        MoE++, section on FFN experts per token

Shapes: s sequence, b batch, h hidden, T = s*b tokens, E + H experts and experts at home
"""

from megatron_scmoe import say, start

start.replace_host_symbols()

import json
import keyword
import sys
from argparse import ArgumentParser
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import cosine_similarity

from megatron_scmoe.arguments import add_scmoe_args, parse
from megatron_scmoe.inference.model import begin, join_and_load, prepare_generation
from megatron_scmoe.run.checkpoint.errors import CheckpointError
from megatron_scmoe.run.watch import watched_ranks
from megatron_scmoe.words import write_whole

BATCH = 8
BLANKS = set("ĠĊĉčĈ")
"""In the vocabulary of a byte-level BPE."""


class BlockCosines:
    """Mean cosine of what goes into adjacent blocks, over all tokens seen.

    A pre-hook of the norms in front of attention, and of the final one: what they read is H_{l-1}.
    """

    def __init__(self, model: Module) -> None:
        self._before: Tensor | None = None
        self._sums: list[float] = []
        self._at = self._tokens = 0
        for name, module in model.named_modules():
            if name.endswith(("input_layernorm", "final_layernorm")):
                module.register_forward_pre_hook(self._meet)

    def _meet(self, module: Module, inputs: tuple[Tensor, ...]) -> None:
        """inputs[0]: [s, b, h]."""
        now = inputs[0].detach()
        if self._before is not None:
            if self._at == len(self._sums):
                self._sums.append(0.0)
            self._sums[self._at] += cosine_similarity(self._before, now, dim=-1).sum().item()
            self._at += 1
        self._before = now

    def end_pass(self, tokens: int) -> None:
        self._before, self._at = None, 0
        self._tokens += tokens

    @property
    def means(self) -> list[float]:
        """By layer: of what it reads and what it hands on."""
        return [total / self._tokens for total in self._sums]


class Experts:
    """Routed experts of every token, mean over the MoE layers, by the token's kind."""

    def __init__(self, model: Module, num_experts: int) -> None:
        self._rows: dict[int, Tensor] = {}
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: Counter[str] = Counter()
        routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
        for number, router in enumerate(routers):
            # Not a hook: a router of ours is asked for its logits too, by another method.
            router.routing = self._watched(number, num_experts, router.routing)

    def _watched(self, number: int, num_experts: int, routing: Callable) -> Callable:
        """The host's `routing`, whose second output is the map, [T, E + H]."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            output = routing(*args, **kwargs)
            self._rows[number] = output[1][:, :num_experts].sum(dim=1).float()
            return output

        return watched

    def end_pass(self, kinds: Sequence[str]) -> None:
        """Kinds of the tokens in the order of the rows, [T]."""
        if not self._rows:
            return
        mean = torch.stack(list(self._rows.values())).mean(dim=0)
        for kind, value in zip(kinds, mean.tolist(), strict=True):
            self._sums[kind] += value
            self._counts[kind] += 1

    @property
    def means(self) -> dict[str, tuple[int, float]]:
        """By kind: tokens, and their routed experts."""
        return {kind: (n, self._sums[kind] / n) for kind, n in sorted(self._counts.items())}


def kinds_of(entries: Sequence[str]) -> list[str]:
    """What every token of a text is, given as entries of the vocabulary in their order."""
    return [
        kind(entry, before, after)
        for before, entry, after in zip(["", *entries], entries, [*entries[1:], ""], strict=False)
    ]


def kind(entry: str, before: str, after: str) -> str:
    """What a token is between its neighbours."""
    bare = entry.lstrip("".join(BLANKS))
    if not bare:
        return "blank"
    if entry.startswith("<|"):
        return "end of document"
    if any(letter.isdigit() for letter in bare):
        return "number"
    if not any(letter.isalpha() for letter in bare):
        return "mark"
    goes_on = after[:1].isalpha() and after[:1] not in BLANKS
    continues = bare == entry and before[-1:].isalpha() and before[-1:] not in BLANKS
    if goes_on or continues:
        return "part of a word"
    return "keyword" if keyword.iskeyword(bare) else "word"


def study(
    model: Module, num_experts: int, tokens: np.ndarray, entries: list[str]
) -> dict[str, Any]:
    """Run over the text; tokens is [sequences, s]."""
    blocks, experts = BlockCosines(model), Experts(model, num_experts)
    length = tokens.shape[1]
    device = next(model.parameters()).device
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).triu(1)
    for at in range(0, len(tokens), BATCH):
        part = tokens[at : at + BATCH]
        ids = torch.from_numpy(part.astype(np.int64)).to(device)
        positions = torch.arange(length, device=device).expand_as(ids)
        with torch.no_grad():
            model(ids, positions, mask)
        blocks.end_pass(part.size)
        by_sequence = [kinds_of([entries[i] for i in sequence]) for sequence in part]
        # Rows of a MoE are [s, b] flattened.
        experts.end_pass([kind for step in zip(*by_sequence, strict=True) for kind in step])
    return {"tokens": int(tokens.size), "cosines": blocks.means, "experts": experts.means}


def add_options(parser: ArgumentParser) -> ArgumentParser:
    """The package's options and these; an `extra_args_provider` of the host."""
    add_scmoe_args(parser)
    group = parser.add_argument_group("claims")
    group.add_argument("--text", type=Path, required=True, metavar="DIR", help="Of the runs.")
    group.add_argument("--sequences", type=int, required=True, metavar="N", help="Held out.")
    group.add_argument("--found", type=Path, required=True, metavar="FILE", help="Receives JSON.")
    return parser


def main() -> int:
    begin()
    with say.user_errors(), redirect_stdout(StringIO()):
        args = parse(add_options)
        config, _ = prepare_generation(args)
        text = np.fromfile(args.text / "valid_text_document.bin", dtype=np.uint16)
        vocabulary = json.loads((args.text / "tokenizer" / "tokenizer.json").read_text())["model"]
    entries = [entry for entry, _ in sorted(vocabulary["vocab"].items(), key=lambda item: item[1])]
    tokens = text[: args.sequences * args.seq_length].reshape(-1, args.seq_length)
    with watched_ranks(timedelta(minutes=10), (CheckpointError,)) as store:
        model = join_and_load(config, store)
        found = study(model, args.num_experts or 0, tokens, entries)
        write_whole(args.found, json.dumps(found, indent=1) + "\n")
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())

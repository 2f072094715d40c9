"""A dense Llama-style directory as the start of a ScMoE model that computes the same at first.

    MLP of a layer          shared expert of that layer, whole (combine add)
    slices of the same MLP  gate and up of the routed experts; expert e takes slice e mod G
    zeros                   their down projections: the routed output is 0 until they have learnt
    small numbers           the router, seeded

With G = 1 every expert begins as the MLP (sparse upcycling, arXiv:2212.05055); with more, experts
are as many times smaller (granular upcycling, arXiv:2410.07524). Layers that get experts: all at
Pos-1, every second one at Pos-2 and Pos-3.
"""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_scmoe.huggingface import load
from megatron_scmoe.huggingface.dialects import Dialect, Where, baseline
from megatron_scmoe.huggingface.tensor_names import Config

DENSE = ("LlamaForCausalLM", "MistralForCausalLM")


@dataclass(frozen=True)
class Upcycling:
    """What the dense model becomes."""

    position: str = "pos2"
    experts: int = 8
    topk: int = 1
    granularity: int = 1
    """G."""


def upcycle(
    folder: Path, save: Path, plan: Upcycling, dtype: str | None = None, say: Any = print
) -> None:
    """Write a dense directory as a checkpoint of a ScMoE model.

    Args:
        folder: of one of DENSE.
        save: a folder that is not there yet, or is empty.
        dtype: as in load.load.

    Raises:
        ValueError: the directory is not whole, or the plan does not fit it; one line.
    """
    directory = load.open_directory(folder, partial(_dialect, plan=plan))
    load.write(directory, save, dtype, say)


def _dialect(theirs: Config, plan: Upcycling) -> Dialect:
    name = (theirs.get("architectures") or [theirs.get("model_type")])[0]
    if name not in DENSE:
        raise ValueError(f"{name} is none of {', '.join(DENSE)}")
    return Dialect(
        lambda theirs: _config(theirs, plan), lambda name, config, names: _where(name, plan)
    )


def _config(theirs: Config, plan: Upcycling) -> Config:
    """Of the model that it becomes, in ours.

    Raises:
        ValueError: layers or sizes do not divide.
    """
    layers, size = theirs["num_hidden_layers"], theirs["intermediate_size"]
    if plan.position != "pos1" and layers % 2:
        raise ValueError(
            f"its {layers} layers are no pairs, which --position {plan.position} wants"
        )
    if size % plan.granularity or plan.experts % plan.granularity:
        raise ValueError(
            f"--granularity {plan.granularity} does not divide its intermediate_size {size} or "
            f"--num-experts {plan.experts}"
        )
    if not 0 < plan.topk <= plan.experts:
        raise ValueError(f"--topk {plan.topk} is not between 1 and --num-experts {plan.experts}")
    if theirs.get("mlp_bias"):
        raise ValueError("mlp_bias true: experts of a shortcut have no biases")
    every = 1 if plan.position == "pos1" else 2
    config = baseline(
        {
            **theirs,
            "num_experts": plan.experts,
            "num_experts_per_tok": plan.topk,
            "decoder_sparse_step": every,
        },
        "num_experts",
        size // plan.granularity,
        renormalises=False,
    )
    return config | {
        "shortcut_position": plan.position,
        "shared_expert_intermediate_size": size,
    }


def _where(name: str, plan: Upcycling) -> Where:
    """A tensor of ours in the dense files."""
    if name.endswith("mlp.gate.weight"):
        return Where(None, std=0.02)
    name = name.replace("mlp.shared_expert.", "mlp.")
    layer = re.match(r"model\.layers\.(\d+)\.mlp\.shortcut_layernorm\.(.*)", name)
    if layer:
        # The tap is that of the layer in front, at Pos-1 the layer's own input.
        tapped = {"pos1": "input_layernorm", "pos2": "post_attention_layernorm"}
        number = int(layer[1]) - (plan.position != "pos1")
        norm = tapped.get(plan.position, "input_layernorm")
        return Where(f"model.layers.{number}.{norm}.{layer[2]}")
    expert = re.fullmatch(r"(.*\.mlp)\.experts\.(\d+)\.(gate|up|down)_proj\.weight", name)
    if expert is None:
        return Where(name)
    slice_ = (int(expert[2]) % plan.granularity, plan.granularity)
    down = expert[3] == "down"
    theirs = f"{expert[1]}.{expert[3]}_proj.weight"
    return Where(theirs, part=slice_, dimension=int(down), scale=0.0 if down else 1.0)

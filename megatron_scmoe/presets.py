"""Published systems by name, --scmoe-preset: the options that make one of them.

They stand in front of the command line's, so that what is typed wins. Sizes stay the user's:
layers, widths, experts, and top-k where the system does not depend on it.
"""

import argparse

PRESET = "--scmoe-preset"
HALF = "N/2"
"""Stands for half of --num-experts."""

PRESETS = {
    # arXiv:2404.05019, table 5: the best of its language models.
    "scmoe": "--scmoe-shortcut-position pos2 --scmoe-combine cg1 --moe-router-topk 1",
    "scmoe-2": "--scmoe-shortcut-position pos2 --scmoe-combine cg1 --moe-router-topk 2",
    # Appendix A.2.
    "dgmoe": "--scmoe-shortcut-position pos2 --scmoe-dual-gating shared --moe-router-topk 1",
    # arXiv:2410.07348, section 3 and table 2.
    "moepp": "--scmoe-router heterogeneous --scmoe-tau 0.75 --scmoe-num-zero-experts 1 "
    "--scmoe-num-copy-experts 1 --scmoe-num-constant-experts 2 --scmoe-gating-residual "
    "--moe-router-topk 2 --moe-router-pre-softmax --moe-expert-capacity-factor 1.1 "
    "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01",
    # arXiv:2509.01322, section 2.
    "longcat-flash": "--scmoe-shortcut-position pos2 --scmoe-combine add "
    "--scmoe-shortcut-norm shared --scmoe-router longcat --scmoe-num-copy-experts N/2 "
    "--multi-latent-attention --scmoe-mla-scale --moe-router-load-balancing-type aux_loss",
    # NVIDIA's ShortcutMoE, for hybrid models of Megatron after 0.19.
    "nvidia-shortcut": "--scmoe-shortcut-position pos1 --scmoe-combine add --moe-layer-freq 1",
}


def expand(argv: list[str]) -> list[str]:
    """A command line in front of which the options of its preset stand.

    Raises:
        ValueError: the preset needs the number of experts, in one line.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(PRESET, help=argparse.SUPPRESS)
    parser.add_argument("--num-experts", type=int, metavar="N", help=argparse.SUPPRESS)
    try:
        known, _ = parser.parse_known_args(argv)
    except argparse.ArgumentError:
        return argv  # the whole parser says it better
    words = PRESETS.get(known.scmoe_preset or "", "").split()
    if HALF in words:
        if known.num_experts is None:
            raise ValueError(f"{PRESET} {known.scmoe_preset} needs the size: add --num-experts.")
        words[words.index(HALF)] = str(known.num_experts // 2)
    return [*words, *argv]

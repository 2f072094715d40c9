"""What the papers report, and the orderings in it that can be looked for here.

ScMoE is arXiv:2404.05019v3, MoE++ arXiv:2410.07348.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Ordering:
    """`better` learns better than `worse`, says a paper."""

    better: str
    worse: str
    source: str
    numbers: str
    """As printed, in the order of both names."""


# Losses and perplexities: less is better. Accuracies and averages: more is.
GPT2 = "ScMoE table 3, GPT2-MoE, validation loss"
XL = "ScMoE table 4, GPT3-MoE-XL, perplexity"
SWIN = "ScMoE table 5, SwinV2-MoE-S, accuracy"
SWIN_6 = "ScMoE table 6, SwinV2-MoE-S, accuracy"
SMALL = "ScMoE table 7, GPT2-MoE-Small, perplexity"
MOEPP = "MoE++ table 3, 0.6B/(8+4)E, average of nine tasks"
ABLATION = "MoE++, ablations, 1B, average of seven tasks"

ORDERINGS = (
    Ordering("shared", "top2", GPT2, "3.2406 (CG-2), 3.2704"),
    Ordering("pos2", "top2", GPT2, "3.2248, 3.2704"),
    Ordering("pos2", "shared", GPT2, "3.2248, 3.2406 (CG-2)"),
    Ordering("pos1", "top2", GPT2, "3.2375, 3.2704"),
    Ordering("pos3", "top2", GPT2, "3.2413, 3.2704"),
    Ordering("pos2", "pos1", GPT2, "3.2248, 3.2375"),
    Ordering("pos2", "pos3", GPT2, "3.2248, 3.2413"),
    Ordering("pos1", "pos3", GPT2, "3.2375, 3.2413"),
    Ordering("pos2", "pos2-add", GPT2, "3.2248, 3.2368"),
    Ordering("pos2", "pos2-cg2", GPT2, "3.2248, 3.2329"),
    Ordering("pos2-cg2", "pos2-add", GPT2, "3.2329, 3.2368"),
    Ordering("pos2", "top2", XL, "16.46, 17.52"),
    Ordering("top3", "top2", XL, "17.26, 17.52"),
    Ordering("scmoe2", "top3", XL, "16.27, 17.26"),
    Ordering("scmoe2", "pos2", XL, "16.27, 16.46"),
    Ordering("pos2", "top3", XL, "16.46, 17.26"),
    Ordering("shared", "shared-add", SWIN, "79.53, 79.02"),
    Ordering("pos1", "pos1-add", SWIN, "79.14, 78.78"),
    Ordering("pos2", "pos2-add", SWIN, "79.38, 78.98"),
    Ordering("pos3", "pos3-add", SWIN, "79.20, 78.29"),
    Ordering("shared", "pos2", SWIN, "79.53, 79.38"),
    Ordering("top2", "top1", SWIN_6, "79.33, 78.95"),
    Ordering("shared", "top2", SMALL, "29.15, 31.60"),
    Ordering("pos2", "top2", SMALL, "29.10, 31.60"),
    Ordering("pos2", "shared", SMALL, "29.10, 29.15"),
    Ordering("dgmoe", "top2", SMALL, "31.52, 31.60"),
    Ordering("pos2", "dgmoe", SMALL, "29.10, 31.52"),
    Ordering("dgmoe", "dgmoe-any", "ScMoE appendix A.2", "as good as top-2; no better than top-1"),
    Ordering("moepp-0.75", "moe", MOEPP, "45.6, 44.3"),
    Ordering("moepp-0.5", "moe", MOEPP, "44.9, 44.3"),
    Ordering("moepp-0.25", "moe", MOEPP, "44.9, 44.3"),
    Ordering("moepp-1.0", "moe", MOEPP, "44.5, 44.3"),
    Ordering("moe", "moepp-0.1", MOEPP, "44.3, 43.4"),
    Ordering("moepp-0.75", "moepp-1.0", MOEPP, "45.6, 44.5"),
    Ordering("moepp-0.75", "moepp-0.5", MOEPP, "45.6, 44.9"),
    Ordering("moepp-0.75", "moepp-plain", ABLATION, "47.7, 47.5"),
    Ordering("moepp-zero", "moe", ABLATION, "47.0, 46.6"),
    Ordering("moepp-copy", "moe", ABLATION, "47.2, 46.6"),
    Ordering("moepp-constant", "moe", ABLATION, "47.4, 46.6"),
    Ordering("moepp-zero-copy", "moepp-zero", ABLATION, "47.2, 47.0"),
    Ordering("moepp-zero-constant", "moepp-zero", ABLATION, "47.3, 47.0"),
    Ordering("moepp-copy-constant", "moepp-constant", ABLATION, "47.5, 47.4"),
    Ordering("moepp-0.75", "moepp-copy-constant", ABLATION, "47.7, 47.5"),
)

"""Who is compared, and what is equal: a name, the command line that makes it, its counterpart.

All experts have one size, for which `F` stands; `N/2` is half of the layers. Scores are Megatron's:
a softmax over the chosen experts, and over all where one is chosen, whose weight would be 1.
"""

import shlex
from dataclasses import dataclass

from tools.quality.scales import Scale

BALANCED = "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01"
PRE = "--moe-router-pre-softmax"
PAIRS = "--moe-layer-freq ([0,1]*N/2)"
EVERY = "--moe-layer-freq 1"
TOP1 = f"{PAIRS} {BALANCED} {PRE} --moe-router-topk 1"
SHARED = f"{TOP1} --moe-shared-expert-intermediate-size F"
POS2 = f"{SHARED} --scmoe-shortcut-position pos2"
DGMOE = f"{PAIRS} {BALANCED} --scmoe-preset dgmoe"
MOEPP = f"{EVERY} --scmoe-preset moepp"
LISTS = "LISTS"
"""Stands for the file of partners (C2R), made from the model of top-2's first seed."""
KINDS = ("zero", "copy", "constant")
LATENT = (
    "--q-lora-rank A --kv-lora-rank B --qk-head-dim D --qk-pos-emb-head-dim P --v-head-dim D "
    "--qk-layernorm --rope-type rope"
)
"""Of multi-latent attention, by hidden size and heads."""


@dataclass(frozen=True)
class QualityContender:
    """One row."""

    name: str
    title: str
    options: str
    against: str
    """Whom it is compared with."""
    equal: str
    """What is equal to the counterpart, beside tokens, their order and the held-out text."""
    main: bool = False
    """All seeds in place of the first."""
    studied: bool = False
    """Its first seed's model is saved, for claims.py."""

    def command_line(self, scale: Scale) -> list[str]:
        """Its own options."""
        words = shlex.split(self.options)
        moe = shlex.split(
            f"--num-experts {scale.num_experts} --moe-ffn-hidden-size F --moe-grouped-gemm "
            "--moe-token-dispatcher-type alltoall"
        )
        head = scale.hidden_size // scale.num_attention_heads
        sizes = {
            "F": scale.ffn_hidden_size,
            "2F": 2 * scale.ffn_hidden_size,
            "3F/2": 3 * scale.ffn_hidden_size // 2,
            "A": 3 * scale.hidden_size // 8,
            "B": scale.hidden_size // 4,
            "D": head,
            "P": head // 2,
            "([0,1]*N/2)": f"([0,1]*{scale.num_layers // 2})",
        }
        routed = "--moe-layer-freq" in words
        return [str(sizes.get(word, word)) for word in [*(moe if routed else ()), *words]]


def pos2(
    name: str, title: str, options: str, main: bool = False, against: str = "pos2"
) -> QualityContender:
    return QualityContender(name, title, f"{POS2} {options}", against, "FLOPs, parameters", main)


CONTENDERS = (
    QualityContender(
        "top2", "top-2", f"{PAIRS} {BALANCED} --moe-router-topk 2", "top2", "-", True, True
    ),
    QualityContender(
        "dense",
        "dense",
        "--ffn-hidden-size 3F/2",
        "top2",
        "active FLOPs: every MLP half as wide again",
        True,
    ),
    QualityContender(
        "top1", "top-1", TOP1, "top2", "parameters; an expert's FLOPs less, as in the paper", True
    ),
    QualityContender(
        "shared",
        "top-1 + shared expert, CG-1",
        f"{SHARED} --moe-shared-expert-gate",
        "top2",
        "active FLOPs; the shared expert is one more",
        True,
    ),
    *(
        QualityContender(
            position,
            f"ScMoE Pos-{position[3]}, CG-1",
            f"{SHARED} --scmoe-shortcut-position {position}",
            "top2",
            "active FLOPs; the shared expert is one more",
            True,
            studied=position == "pos2",
        )
        for position in ("pos1", "pos2", "pos3")
    ),
    pos2("pos2-add", "ScMoE Pos-2, add", "--scmoe-combine add", main=True),
    pos2("pos2-cg2", "ScMoE Pos-2, CG-2", "--scmoe-combine cg2", main=True),
    QualityContender(
        "top3", "top-3", f"{PAIRS} {BALANCED} --moe-router-topk 3", "top2", "an expert's FLOPs more"
    ),
    QualityContender(
        "scmoe2",
        "ScMoE-2, Pos-2, CG-1",
        f"{PAIRS} {BALANCED} --moe-shared-expert-intermediate-size F --scmoe-preset scmoe-2",
        "top3",
        "active FLOPs; the shared expert is one more",
    ),
    QualityContender("dgmoe", "DGMoE, distinct experts", DGMOE, "top2", "active FLOPs, parameters"),
    QualityContender(
        "dgmoe-any",
        "DGMoE without the rule",
        f"{DGMOE} --no-scmoe-distinct-experts",
        "dgmoe",
        "FLOPs, parameters",
    ),
    pos2("pos2-shared-norm", "Pos-2, shared norm", "--scmoe-shortcut-norm shared"),
    pos2("pos2-post-norm", "Pos-2, post-norm", "--scmoe-post-norm"),
    pos2(
        "pos2-shared-post",
        "Pos-2, shared norm, post-norm",
        "--scmoe-shortcut-norm shared --scmoe-post-norm",
    ),
    QualityContender(
        "moe",
        "top-2 in every layer",
        f"{EVERY} {BALANCED} {PRE} --moe-router-topk 2 --moe-expert-capacity-factor 1.1",
        "moe",
        "-",
    ),
    *(
        QualityContender(
            f"moepp-{tau}",
            f"MoE++, tau {tau}",
            f"{MOEPP} --scmoe-tau {tau}",
            "moe",
            "parameters; fewer FLOPs, by tau",
            studied=tau == "0.75",
        )
        for tau in ("0.1", "0.25", "0.5", "0.75", "1.0")
    ),
    QualityContender(
        "moepp-plain",
        "MoE++, tau 0.75, no gating residual",
        f"{MOEPP} --no-scmoe-gating-residual",
        "moepp-0.75",
        "FLOPs, but for the residual's",
    ),
    QualityContender(
        "longcat",
        "LongCat-style",
        f"{PAIRS} --scmoe-preset longcat-flash --moe-router-topk 3 --moe-aux-loss-coeff 0.001 "
        f"--moe-router-bias-update-rate 0.05 {LATENT}",
        "scmoe2",
        "experts of a token, on average; its attention is latent",
    ),
    *(
        QualityContender(
            f"c2r-{number}",
            f"C2R, T = {number}",
            f"{PAIRS} {BALANCED} --moe-router-topk 2 --scmoe-c2r-lists {LISTS} "
            f"--scmoe-c2r-top-t {number}",
            "top2",
            "FLOPs, parameters; partners from a trained top-2",
        )
        for number in (2, 4)
    ),
    QualityContender(
        "top1-wide",
        "top-1, experts twice as wide",
        f"{TOP1} --moe-ffn-hidden-size 2F",
        "top2",
        "active FLOPs; twice the experts' parameters",
    ),
    QualityContender(
        "top2-pre",
        "top-2, softmax over all experts",
        f"{PAIRS} {BALANCED} {PRE} --moe-router-topk 2",
        "top2",
        "FLOPs, parameters",
    ),
    *(
        QualityContender(
            f"moepp-{'-'.join(kinds)}",
            f"MoE++, tau 0.75, {' and '.join(kinds)} experts alone",
            " ".join(
                [MOEPP, *(f"--scmoe-num-{kind}-experts 0" for kind in KINDS if kind not in kinds)]
            ),
            "moe",
            "parameters; fewer FLOPs",
        )
        for kinds in (
            ("zero",),
            ("copy",),
            ("constant",),
            ("zero", "copy"),
            ("zero", "constant"),
            ("copy", "constant"),
        )
    ),
    QualityContender(
        "shared-add", "top-1 + shared expert, add", SHARED, "shared", "FLOPs, parameters"
    ),
    *(
        QualityContender(
            f"{position}-add",
            f"ScMoE Pos-{position[3]}, add",
            f"{SHARED} --scmoe-shortcut-position {position} --scmoe-combine add",
            position,
            "FLOPs, parameters",
        )
        for position in ("pos1", "pos3")
    ),
)
BY_NAME = {each.name: each for each in CONTENDERS}

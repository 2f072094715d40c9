"""Who is compared, and what is equal: a name, the command line that makes it, its counterpart.

All experts have one size, for which `F` stands; `N/2` is half of the layers. Scores are Megatron's:
a softmax over the chosen experts, and over all where one is chosen, whose weight would be 1.
"""

import shlex
from dataclasses import dataclass
from itertools import combinations

from tools.quality.scales import Scale

BALANCED = "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01"
PRE = "--moe-router-pre-softmax"
PAIRS = "--moe-layer-freq ([0,1]*N/2)"
EVERY = "--moe-layer-freq 1"
TOP1 = f"{PAIRS} {BALANCED} {PRE} --moe-router-topk 1"
SHARED = f"{TOP1} --moe-shared-expert-intermediate-size F"
AT = f"{SHARED} --scmoe-shortcut-position"
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


SIZE = "FLOPs, parameters"
ONE_MORE = "active FLOPs; the shared expert is one more"


@dataclass(frozen=True)
class QualityContender:
    """One row."""

    name: str
    title: str
    options: str
    equal: str = SIZE
    """What is equal to the counterpart, beside tokens, their order and the held-out text."""
    against: str = "top2"
    """Whom it is compared with."""
    main: bool = False
    """Run before all others, and at every scale with all seeds."""
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


def like(against: str, name: str, title: str, options: str, main: bool = False) -> QualityContender:
    """A row of its counterpart's size."""
    return QualityContender(name, title, options, SIZE, against, main)


TOP_K = f"{PAIRS} {BALANCED} --moe-router-topk"
CONTENDERS = (
    QualityContender("top2", "top-2", f"{TOP_K} 2", "-", main=True, studied=True),
    QualityContender(
        "dense",
        "dense",
        "--ffn-hidden-size 3F/2",
        "active FLOPs: every MLP half as wide again",
        main=True,
    ),
    QualityContender(
        "top1", "top-1", TOP1, "parameters; an expert's FLOPs less, as in the paper", main=True
    ),
    QualityContender(
        "shared",
        "top-1 + shared expert, CG-1",
        f"{SHARED} --moe-shared-expert-gate",
        ONE_MORE,
        main=True,
    ),
    *(
        QualityContender(
            position,
            f"ScMoE Pos-{position[3]}, CG-1",
            f"{AT} {position}",
            ONE_MORE,
            main=True,
            studied=position == "pos2",
        )
        for position in ("pos1", "pos2", "pos3")
    ),
    *(
        like("pos2", f"pos2-{combine}", title, f"{AT} pos2 --scmoe-combine {combine}", main=True)
        for combine, title in (("add", "ScMoE Pos-2, add"), ("cg2", "ScMoE Pos-2, CG-2"))
    ),
    QualityContender("top3", "top-3", f"{TOP_K} 3", "an expert's FLOPs more"),
    QualityContender(
        "scmoe2",
        "ScMoE-2, Pos-2, CG-1",
        f"{PAIRS} {BALANCED} --moe-shared-expert-intermediate-size F --scmoe-preset scmoe-2",
        ONE_MORE,
        "top3",
    ),
    QualityContender("dgmoe", "DGMoE, distinct experts", DGMOE, "active FLOPs, parameters"),
    like("dgmoe", "dgmoe-any", "DGMoE without the rule", f"{DGMOE} --no-scmoe-distinct-experts"),
    *(
        like("pos2", f"pos2-{name}", f"Pos-2, {title}", f"{AT} pos2 {options}")
        for name, title, options in (
            ("shared-norm", "shared norm", "--scmoe-shortcut-norm shared"),
            ("post-norm", "post-norm", "--scmoe-post-norm"),
            (
                "shared-post",
                "shared norm, post-norm",
                "--scmoe-shortcut-norm shared --scmoe-post-norm",
            ),
        )
    ),
    QualityContender(
        "moe",
        "top-2 in every layer",
        f"{EVERY} {BALANCED} {PRE} --moe-router-topk 2 --moe-expert-capacity-factor 1.1",
        "-",
        "moe",
    ),
    *(
        QualityContender(
            f"moepp-{tau}",
            f"MoE++, tau {tau}",
            f"{MOEPP} --scmoe-tau {tau}",
            "parameters; fewer FLOPs, by tau",
            "moe",
            studied=tau == "0.75",
        )
        for tau in ("0.1", "0.25", "0.5", "0.75", "1.0")
    ),
    QualityContender(
        "moepp-plain",
        "MoE++, tau 0.75, no gating residual",
        f"{MOEPP} --no-scmoe-gating-residual",
        "FLOPs, but for the residual's",
        "moepp-0.75",
    ),
    QualityContender(
        "longcat",
        "LongCat-style",
        f"{PAIRS} --scmoe-preset longcat-flash --moe-router-topk 3 --moe-aux-loss-coeff 0.001 "
        f"--moe-router-bias-update-rate 0.05 {LATENT}",
        "experts of a token, on average; its attention is latent",
        "scmoe2",
    ),
    *(
        QualityContender(
            f"c2r-{number}",
            f"C2R, T = {number}",
            f"{TOP_K} 2 --scmoe-c2r-lists {LISTS} --scmoe-c2r-top-t {number}",
            "FLOPs, parameters; partners from a trained top-2",
        )
        for number in (2, 4)
    ),
    QualityContender(
        "top1-wide",
        "top-1, experts twice as wide",
        f"{TOP1} --moe-ffn-hidden-size 2F",
        "active FLOPs; twice the experts' parameters",
    ),
    like(
        "top2",
        "top2-pre",
        "top-2, softmax over all experts",
        f"{PAIRS} {BALANCED} {PRE} --moe-router-topk 2",
    ),
    *(
        QualityContender(
            f"moepp-{'-'.join(kinds)}",
            f"MoE++, tau 0.75, {' and '.join(kinds)} experts alone",
            " ".join(
                [MOEPP, *(f"--scmoe-num-{kind}-experts 0" for kind in KINDS if kind not in kinds)]
            ),
            "parameters; fewer FLOPs",
            "moe",
        )
        for kinds in (*((kind,) for kind in KINDS), *combinations(KINDS, 2))
    ),
    like("shared", "shared-add", "top-1 + shared expert, add", SHARED),
    *(
        like(
            position,
            f"{position}-add",
            f"ScMoE Pos-{position[3]}, add",
            f"{AT} {position} --scmoe-combine add",
        )
        for position in ("pos1", "pos3")
    ),
)
BY_NAME = {each.name: each for each in CONTENDERS}

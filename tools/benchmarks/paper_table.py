"""The formula against the speed-ups that the paper reports (arXiv:2404.05019v3).

    python -m tools.benchmarks.paper_table

The paper states which share of the MoE's time is communication, not the times of the operators. Two
ways to a prediction, neither of which looks at a row of ScMoE:

by FLOPs    A pair of layers, nothing fitted. The share splits the top-2 MoE into exchanges and two
            experts; a shared expert and a dense MLP take what one expert takes, attention what its
            FLOPs say. Slot and hidden share come from `overlap.measure.cost`.
by the rows A whole model. With the top-2 MoE's time as the unit, the rest of the model comes from
            the row "top-1" and the shared expert's time from the row "shared expert" of the same
            table. What is hidden is stated (70 %), or bounded by nothing and everything.

One direction stands for both: the share is stated without saying of what.
"""

from typing import NamedTuple

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scmoe.model.builder import ScMoEModelConfig
from megatron_scmoe.overlap.measure.cost import RoutedTimes
from megatron_scmoe.overlap.schedule import Step
from megatron_scmoe.planner.predict import (
    PAIR,
    Model,
    PassTimes,
    predict_best,
    stock_seconds,
)
from megatron_scmoe.planner.size import model_size
from megatron_scmoe.planner.times import step_flops
from megatron_scmoe.words import markdown_table


class Claim(NamedTuple):
    """A predicted speed-up and those that are reported for it."""

    where: str
    what: str
    predicted: float
    reported: tuple[float, ...]
    """Training and inference, or the one number of a figure."""

    @property
    def deviations(self) -> tuple[float, ...]:
        return tuple(self.predicted / reported - 1 for reported in self.reported)


# By FLOPs. ----------------------------------------------------------------------------------------


class Architecture(NamedTuple):
    """Sizes of a pair in tables 8 and 9; the MLP is four times as wide."""

    hidden_size: int
    heads: int
    positions: int
    """That a token attends to on average."""


SWIN_STAGE_3 = Architecture(hidden_size=384, heads=12, positions=12 * 12)
GPT2_MEDIUM = Architecture(hidden_size=1024, heads=16, positions=2048 // 2)
GPT3_XL = Architecture(hidden_size=2048, heads=32, positions=2048 // 2)


def pair_by_flops(architecture: Architecture, share: float, topk: int = 1) -> Model:
    """A pair with top-`topk` whose top-2 MoE takes the time 1, `share` of it in exchanges."""
    hidden = architecture.hidden_size
    transformer = TransformerConfig(
        num_layers=2,
        hidden_size=hidden,
        num_attention_heads=architecture.heads,
        ffn_hidden_size=4 * hidden,
        add_bias_linear=False,
        num_moe_experts=8,
        moe_layer_freq=[0, 1],
        moe_ffn_hidden_size=4 * hidden,
        moe_shared_expert_intermediate_size=4 * hidden,
    )
    config = ScMoEModelConfig(transformer=transformer, vocab_size=1)
    flops = step_flops(model_size(config, 2 * architecture.positions, micro_batch_size=1))
    expert, exchange = (1 - share) / 2, share / 4

    def routed(k: int) -> RoutedTimes:
        return RoutedTimes(k * expert, k * exchange, k * exchange)

    dense = {step: expert * flops[step] / flops[Step.DENSE_MLP] for step in PAIR}
    return Model([PassTimes(dense, routed(topk), routed(topk + 1))], paired=True)


def rows_by_flops() -> list[Claim]:
    """Speed-ups of pairs."""
    pcie = pair_by_flops(SWIN_STAGE_3, 0.6)
    sequential = stock_seconds(pcie, wider=False, shared_expert=True)
    hidden = 0.7 * pcie.passes[0].unit("pos2").communication
    two_nodes = predict_best(pair_by_flops(SWIN_STAGE_3, 0.5), "pos2")
    medium = pair_by_flops(GPT2_MEDIUM, 0.15)
    over_top_2 = predict_best(medium, "pos2")
    xl, xl_2 = (pair_by_flops(GPT3_XL, 0.15, topk) for topk in (1, 2))
    xl_top_2 = stock_seconds(xl, wider=True, shared_expert=False)
    xl_top_3 = stock_seconds(xl_2, wider=True, shared_expert=False)
    figure_8, table_2 = "Fig. 8, 8xA30, 60 %", "Table 2, 8xA800, 15 %"
    table_4 = "Table 4, 8xA800, share not stated, 15 %"
    over_shared = predict_best(pcie, "pos2").over_shared
    stated = sequential / (sequential - hidden)
    shared_over_top_2 = over_top_2.over_wider / over_top_2.over_shared
    scmoe_2 = xl_top_2 / predict_best(xl_2, "pos2").seconds
    return [
        Claim(figure_8, "Pos-2 over shared expert", over_shared, (1.27,)),
        Claim(figure_8, "the same with 70 % hidden, as stated", stated, (1.27,)),
        Claim("Fig. 8, 16xA800, 50 %", "Pos-2 over shared expert", two_nodes.over_shared, (1.24,)),
        Claim(table_2, "shared expert over top-2", shared_over_top_2, (1.04, 1.06)),
        Claim(table_2, "Pos-2 over top-2", over_top_2.over_wider, (1.12, 1.17)),
        Claim(table_4, "ScMoE over top-2", predict_best(xl, "pos2").over_wider, (1.12, 1.18)),
        Claim(table_4, "top-3 over top-2", xl_top_2 / xl_top_3, (0.94, 0.92)),
        Claim(table_4, "ScMoE-2 over top-2", scmoe_2, (1.05, 1.08)),
    ]


# By the rows. -------------------------------------------------------------------------------------


class WholeModel(NamedTuple):
    """SwinV2-MoE-S of table 1, the top-2 MoE's time as the unit."""

    share: float
    rest: float
    shared_expert: float

    @property
    def top_2(self) -> float:
        return self.rest + 1

    def seconds(self, hidden: float) -> float:
        """With top-1, a shared expert and this share of the communication hidden."""
        return self.rest + self.shared_expert + 0.5 - hidden * self.share / 2

    def speedup(self, hidden: float) -> float:
        """Over top-2."""
        return self.top_2 / self.seconds(hidden)

    def hidden(self, speedup: float) -> float:
        """The hidden share that a speed-up over top-2 means."""
        return (self.seconds(0) - self.top_2 / speedup) / (self.share / 2)


def whole_model(share: float, top_1: float, shared_expert: float) -> WholeModel:
    """From the speed-ups over top-2 of the rows "top-1" and "shared expert"."""
    rest = (1 - top_1 / 2) / (top_1 - 1)
    return WholeModel(share, rest, (rest + 1) / shared_expert - rest - 0.5)


TABLE_1 = {
    "training": whole_model(0.6, top_1=1.27, shared_expert=1.24),
    "inference": whole_model(0.6, top_1=1.39, shared_expert=1.35),
}
TABLE_1_REPORTED = {
    "training": {"Pos-1": 1.36, "Pos-2": 1.43, "Pos-3": 1.49},
    "inference": {"Pos-1": 1.54, "Pos-2": 1.66, "Pos-3": 1.82},
}


def rows_by_table() -> list[Claim]:
    """Pos-2 with the stated 70 % hidden, and Pos-3 with everything hidden."""
    return [
        Claim(
            f"Table 1, 8xA30, 60 %, {what}",
            f"{position}, {hidden:.0%} hidden",
            model.speedup(hidden),
            (TABLE_1_REPORTED[what][position],),
        )
        for what, model in TABLE_1.items()
        for position, hidden in (("Pos-2", 0.7), ("Pos-3", 1.0))
    ]


def format_table() -> str:
    """The tables of docs/planner.md, in Markdown."""
    rows = []
    for row in [*rows_by_flops(), *rows_by_table()]:
        reported = " / ".join(f"{value:.2f}x" for value in row.reported)
        deviations = " / ".join(f"{value:+.1%}" for value in row.deviations)
        rows.append((row.where, row.what, f"{row.predicted:.3f}x", reported, deviations))
    bounds = []
    for what, model in TABLE_1.items():
        shares = [
            f"{value:.2f}x: {model.hidden(value):.0%}" for value in TABLE_1_REPORTED[what].values()
        ]
        bounds.append((what, f"{model.speedup(0):.2f}x .. {model.speedup(1):.2f}x", *shares))
    head = ("reported in", "row", "predicted", "reported", "deviation")
    lines = markdown_table(head, rows)
    head = ("Table 1", "nothing .. everything hidden", "Pos-1", "Pos-2", "Pos-3")
    return "\n".join([*lines, "", *markdown_table(head, bounds)])


if __name__ == "__main__":
    print(format_table())

"""What a variant answers: one value of an option, as a class in the option's table.

    COMBINES       --scmoe-combine               model/combine.py
    ROUTERS        --scmoe-router                model/routing/
    GATINGS        --scmoe-dual-gating           model/routing/dual.py
    AT_HOME        --scmoe-num-KIND-experts      model/experts/at_home.py
    DISPATCHERS    --moe-token-dispatcher-type   model/dispatch/
    COPIES         --scmoe-dispatch-copies       model/dispatch/

docs/variants.md adds one to each. The tables know nothing of ScMoEConfig, which reads its values
from them.
"""

from collections.abc import Mapping
from typing import ClassVar

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scmoe.checks.refusal import Refusal


class Variant:
    """The first line of a variant's docstring is its help text."""

    names_on_disk: ClassVar[tuple[str, ...]] = ()
    """How its parameters' names begin, under the name of the MoE layer."""
    refusals: ClassVar[tuple[Refusal, ...]] = ()
    """What it cannot work with; rows take the host's config and ours."""

    @classmethod
    def weights(cls, config: TransformerConfig) -> int:
        """Parameters of one MoE layer, whole on every rank."""
        return 0

    @classmethod
    def flops(cls, config: TransformerConfig) -> int:
        """Forward, one token, matrix products only: each parameter in one product and sum."""
        return 2 * cls.weights(config)

    @classmethod
    def kept(cls, config: TransformerConfig) -> int:
        """Elements of one token that autograd keeps for the backward pass."""
        return 0


def values_help(table: Mapping[str, type[Variant]]) -> str:
    """`value, what it is; ...` of every value of a table."""
    lines = ((value, (variant.__doc__ or "").splitlines()[0]) for value, variant in table.items())
    return "; ".join(f"{value}, {line.rstrip('.')}" for value, line in lines)

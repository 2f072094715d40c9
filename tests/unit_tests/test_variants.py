"""Variants are values of tables: options, documentation, counts and names on disk follow the keys.

Toys from outside the package, one file each (tests/toy_variants/), equal loops over tokens in
float64, output and every gradient; they leave no trace.
"""

import argparse
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.training.arguments import add_megatron_arguments
from torch import Tensor

from megatron_scmoe.arguments import add_scmoe_args
from megatron_scmoe.checks.shortcut import check_model
from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.model import names
from megatron_scmoe.model.builder import ScMoEModelBuilder, ScMoEModelConfig
from megatron_scmoe.model.combine import COMBINES
from megatron_scmoe.model.dispatch import COPIES, DISPATCHERS
from megatron_scmoe.model.experts.at_home import AT_HOME
from megatron_scmoe.model.moe import ScMoELayer
from megatron_scmoe.model.routing import ROUTERS
from megatron_scmoe.model.routing.choice import Routing
from megatron_scmoe.model.routing.dual import GATINGS
from megatron_scmoe.planner.size import model_size
from tests.models import BATCH, SEQUENCE, Case, build_block, run_block
from tests.toy_variants import TABLES, registered

ROOT = Path(__file__).parents[2]
EXPERTS, AT_HOME_EXPERTS, K, HIDDEN = 4, 3, 2, 16
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
MOE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}


@pytest.fixture
def toys() -> Iterator[None]:
    with registered():
        yield


def toy_case(dispatcher: str = "dense", chunks: int = 1, **host: Any) -> Case:
    return Case(
        scmoe={
            "scmoe_combine": "tanh",
            "scmoe_experts_at_home": {"fixed": AT_HOME_EXPERTS},
            "scmoe_num_chunks": chunks,
        },
        host={"moe_token_dispatcher_type": dispatcher, "moe_router_topk": K, **host},
    )


def toy_block(case: Case) -> TransformerBlock:
    """With the same weights in every one, large enough for every part to be seen."""
    block = build_block(case)
    for name, parameter in block.named_parameters():
        random = torch.Generator().manual_seed(sum(map(ord, name)))
        noise = torch.randn(parameter.shape, dtype=torch.float64, generator=random)
        parameter.data.copy_(noise * (1.0 if "norm" in name else parameter.shape[-1] ** -0.5))
    return block


def hidden_states() -> Tensor:
    random = torch.Generator().manual_seed(1)
    shape = SEQUENCE, BATCH, HIDDEN
    return torch.randn(shape, dtype=torch.float64, generator=random).requires_grad_()


def routed_by_loops(moe: Any, z: Tensor) -> Tensor:
    """sum_i G(z)_i E_i(z), token by token."""
    rows = []
    for token in z.flatten(0, 1):
        logits = moe.router.weight.double() @ token
        probs = logits.softmax(dim=-1, dtype=torch.float32).double()
        row = torch.zeros_like(token)
        for expert in probs.topk(K).indices.tolist():
            if expert < EXPERTS:
                output, _ = moe.experts.local_experts[expert](token[None, None])
                row = row + probs[expert] * output[0, 0]
            else:
                row = row + probs[expert] * moe.at_home["fixed"].weight[expert - EXPERTS]
        rows.append(row)
    return torch.stack(rows).view_as(z)


def by_loops(moe: Any, x: Tensor, z: Tensor) -> Tensor:
    gate = 1 + torch.tanh(x @ moe.combine_gate.weight.T)
    return moe.shared_experts_compute(x) + gate * routed_by_loops(moe, z)


def by_stages(moe: Any, x: Tensor, z: Tensor, before: Tensor | None = None) -> Tensor:
    """The stages of the MoE as the unit's schedule calls them."""
    tokens = moe.depart(z, moe.choose_experts(z, None, before), overlap=True)
    for chunk in tokens.chunks:
        chunk.start_dispatch()
    for chunk in tokens.chunks:
        chunk.wait_dispatch()
        chunk.experts()
        chunk.start_combine()
    tokens.branch.wait()
    return moe.shared_expert(x).merge(tokens.output())


def gradients(moe: Any, output: Tensor, *inputs: Tensor) -> dict[str, Tensor]:
    parameters = dict(moe.named_parameters())
    for tensor in (*parameters.values(), *inputs):
        tensor.grad = None
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    found = {"output": output.detach()}
    found |= {f"input {index}": tensor.grad for index, tensor in enumerate(inputs)}
    for name, parameter in parameters.items():
        # An expert without tokens does not occur in the loops.
        grad = parameter.grad
        found[name] = torch.zeros_like(parameter) if grad is None else grad
    return found


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=name)


# Computing. -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("single_rank", "toys")
@pytest.mark.parametrize("host", [{}, MOE], ids=["", "recomputed"])
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather", "dense"])
def test_toys_equal_loops(dispatcher: str, chunks: int, host: dict[str, Any]) -> None:
    """Tokens with K, fewer or no rows; what is computed at home is added at the token."""
    moe: Any = toy_block(toy_case(dispatcher, chunks, **host)).layers[0].mlp
    x, z = hidden_states(), (hidden_states() * 2).detach().requires_grad_()
    rows = moe.choose_experts(z, None).routing_map.sum(dim=1)
    assert set(rows.tolist()) == {0, 1, 2}
    found = gradients(moe, by_stages(moe, x, z), x, z)
    wanted = gradients(moe, by_loops(moe, x, z), x, z)
    assert wanted["at_home.fixed.weight"].abs().max() > 0
    assert_close(found, wanted)


@pytest.mark.usefixtures("single_rank", "toys")
def test_units_of_toys_train_and_recompute() -> None:
    """Two steps of every parameter; whole units recomputed, bit for bit."""
    results = []
    for host in ({}, FULL):
        block = toy_block(toy_case(**host))
        optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
        losses = []
        for _ in range(2):
            loss = run_block(block, hidden_states()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[1] != losses[0]
        assert all(parameter.grad is not None for parameter in block.parameters())
        results.append([torch.tensor(losses), *block.state_dict().values()])
    pairs = zip(*results, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_a_router_may_choose_more_than_k(dispatcher: str) -> None:
    """If it says how many rows at most."""
    moe: Any = (
        toy_block(Case(host={"moe_token_dispatcher_type": dispatcher, "moe_router_topk": 1}))
        .layers[0]
        .mlp
    )
    z = hidden_states()
    probs = torch.rand(SEQUENCE * BATCH, EXPERTS, dtype=torch.float64)
    routing_map = torch.ones_like(probs, dtype=torch.bool)
    routing_map[::2, 1:] = False
    routing = Routing(probs * routing_map, routing_map, rows_per_token=EXPERTS)
    tokens = moe.depart(z, routing, overlap=True)
    (chunk,) = tokens.chunks
    for stage in ("start_dispatch", "wait_dispatch", "experts", "start_combine"):
        getattr(chunk, stage)()
    tokens.branch.wait()
    outputs = [expert(z.view(1, -1, HIDDEN))[0][0] for expert in moe.experts.local_experts]
    wanted = sum(p[:, None] * out for p, out in zip(routing.probs.T, outputs, strict=True))
    torch.testing.assert_close(tokens.output(), wanted.view_as(z), rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("single_rank", "toys")
def test_losses_and_the_expert_bias_are_those_of_all_columns() -> None:
    """Balancing is among all that the router chooses from; the load is that of routed experts."""
    balanced = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1.0}
    biased = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    block = toy_block(toy_case("alltoall", **balanced, **biased, moe_router_pre_softmax=False))
    moe: Any = block.layers[0].mlp
    run_block(block, hidden_states()).sum().backward()
    columns = EXPERTS + AT_HOME_EXPERTS
    assert moe.router.expert_bias.shape == moe.router.local_tokens_per_expert.shape == (columns,)
    assert moe.router.local_tokens_per_expert.sum() == K * SEQUENCE * BATCH
    assert moe.router.weight.grad.shape == (columns, HIDDEN)
    assert moe.router.weight.grad[EXPERTS:].abs().max() > 0
    with torch.no_grad():
        rows = moe.choose_experts(hidden_states(), None).routing_map
    assert rows.shape == (SEQUENCE * BATCH, EXPERTS) and moe.num_local_experts == EXPERTS


# Options. ---------------------------------------------------------------------------------------

TYPED = "--moe-token-dispatcher-type dense --scmoe-combine tanh --scmoe-num-fixed-experts 3"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_megatron_arguments(parser)
    return add_scmoe_args(parser)


@pytest.mark.usefixtures("toys")
def test_the_command_line_takes_toys() -> None:
    args = parser().parse_args(TYPED.split())
    assert args.moe_token_dispatcher_type == "dense"
    assert args.scmoe_combine == "tanh"
    assert args.scmoe_experts_at_home == {"fixed": 3}
    assert parser().parse_args([]).scmoe_experts_at_home == {}
    help_text = " ".join(parser().format_help().split())
    for line in (
        "tanh, A tanh gate on the routed experts: c_s = 1, c_r = 1 + tanh(w x).",
        "fixed, Experts whose output is a learned vector, E_i(z) = v_i.",
        "{allgather,alltoall,flex,dense}",
    ):
        assert line in help_text


def test_toys_leave_no_trace() -> None:
    before = [dict(table) for table in TABLES]
    with registered():
        assert [dict(table) for table in TABLES] != before
    assert [dict(table) for table in TABLES] == before
    for option in re.findall(r"--\S+ \S+", TYPED):
        with pytest.raises(ValueError, match=r"invalid choice|unrecognized arguments"):
            parser().parse_args(option.split())


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize(
    ("scmoe", "host", "line"),
    [
        (
            {"scmoe_post_norm": True},
            {},
            "--scmoe-combine tanh does not work with --scmoe-post-norm: drop one of them.",
        ),
        (
            {},
            {"moe_shared_expert_gate": True},
            "--moe-shared-expert-gate is --scmoe-combine cg1; drop it to use tanh.",
        ),
        (
            {},
            {"moe_router_padding_for_quantization": True},
            "--moe-token-dispatcher-type dense does not work with "
            "--moe-router-padding-for-quantization: drop one of them.",
        ),
        (
            {},
            {"moe_router_topk": 1},
            "--scmoe-num-fixed-experts does not work with --moe-router-topk 1: a token would have "
            "nothing else; raise it.",
        ),
        (
            {},
            {"moe_pad_expert_input_to_capacity": True},
            "--moe-pad-expert-input-to-capacity does not work with experts at home: their tokens "
            "have no rows to pad; drop it.",
        ),
        (
            {},
            {"moe_router_num_groups": 2},
            "--moe-router-num-groups does not work with experts at home: they are on every rank "
            "and so in no group; drop it.",
        ),
        (
            {"scmoe_experts_at_home": {"fixed": -1}},
            {},
            "--scmoe-num-fixed-experts -1 is not at least 0.",
        ),
    ],
)
def test_toys_refuse(scmoe: dict[str, Any], host: dict[str, Any], line: str) -> None:
    case = toy_case()
    config = case.host_config()
    check_model(config, case.scmoe_config())
    for name, value in host.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=re.escape(line)):
        check_model(config, replace(case, scmoe={**case.scmoe, **scmoe}).scmoe_config())


# Counts, and names on disk. ---------------------------------------------------------------------


def toy_model() -> ScMoEModelConfig:
    case = toy_case()
    model = ScMoEModelConfig(
        transformer=case.host_config(),
        vocab_size=48,
        seq_length=16,
        share_embeddings_and_output_weights=True,
        should_pad_vocab=False,
        position_embedding_type="rope",
    )
    model.scmoe = case.scmoe_config()
    return model


@pytest.mark.usefixtures("single_rank", "toys")
def test_toys_are_counted() -> None:
    model = toy_model()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    built = ScMoEModelBuilder(model).build_model(groups, pre_process=True, post_process=True)
    size = model_size(model, 16, 2)
    assert size.parameters == sum(parameter.numel() for parameter in built.parameters())
    operators = size.layers[1].operators
    assert operators["router"].flops == 2 * (EXPERTS + AT_HOME_EXPERTS) * HIDDEN
    assert operators["merge"].flops == 2 * HIDDEN
    # Of the K experts of a token as many are sent as there are experts to send to.
    config = model.transformer
    one = 3 * HIDDEN * config.moe_ffn_hidden_size
    sent = int(K * EXPERTS / (EXPERTS + AT_HOME_EXPERTS) * one)
    assert operators["experts"].activated == sent + AT_HOME_EXPERTS * HIDDEN
    without = replace(model.scmoe, scmoe_experts_at_home={})
    model.scmoe = without
    assert model_size(model, 16, 2).layers[1].operators["experts"].activated == K * one


@pytest.mark.usefixtures("single_rank", "toys")
def test_toys_are_saved_and_loaded_under_their_names(tmp_path: Path) -> None:
    model = toy_model()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    saved, loaded = (
        ScMoEModelBuilder(model).build_model(groups, pre_process=True, post_process=True)
        for _ in range(2)
    )
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    dist_checkpointing.save(saved.sharded_state_dict(), folder)
    on_disk = dist_checkpointing.load_tensors_metadata(str(folder))
    layer = "decoder.layers.1."
    new = {"mlp.combine_gate.weight", "mlp.at_home.fixed.weight", "shortcut_layernorm.weight"}
    found = {key.removeprefix(layer) for key in on_disk if key.startswith(layer)}
    assert {key for key in found if key.startswith(tuple(names.added()))} == new
    assert on_disk[f"{layer}mlp.router.weight"].global_shape == (EXPERTS + AT_HOME_EXPERTS, HIDDEN)
    loaded.load_state_dict(dist_checkpointing.load(loaded.sharded_state_dict(), folder))
    for a, b in zip(saved.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)


# Documentation. ---------------------------------------------------------------------------------


def cells(page: str, first: str) -> list[list[str]]:
    """Rows of the table of a page whose head begins with `first`."""
    lines = (ROOT / page).read_text("utf-8").splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(f"| {first}"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def values_in(page: str, option: str) -> list[str]:
    """Values of an option in a page's table of options."""
    row = next(row for row in cells(page, "option") if row[0] == f"`{option}`")
    return re.findall(r"`(\w+)`", row[1])


@pytest.mark.parametrize("page", ["README.md", "docs/options.md"])
def test_pages_list_the_values_of_the_tables(page: str) -> None:
    assert values_in(page, "--scmoe-combine") == list(COMBINES)
    if page == "docs/options.md":
        assert values_in(page, "--scmoe-router") == list(ROUTERS)
        assert values_in(page, "--scmoe-dual-gating") == list(GATINGS)
        assert values_in(page, "--scmoe-dispatch-copies") == list(COPIES)
        text = " ".join((ROOT / page).read_text("utf-8").split())
        (line,) = re.findall(r"`--moe-token-dispatcher-type` is ([^.]*)\.", text)
        assert sorted(re.findall(r"`(\w+)`", line)) == sorted(DISPATCHERS)
        options = [row[0] for row in cells(page, "option")]
        assert all(any(f"--scmoe-num-{kind}-experts" in row for row in options) for kind in AT_HOME)


def test_the_equations_of_all_combines_are_documented() -> None:
    rows = cells("docs/architecture.md", "`--scmoe-combine`")
    assert [re.findall(r"`(\w+)`", row[0])[0] for row in rows] == list(COMBINES)


def test_the_added_names_on_disk_are_documented() -> None:
    rows = cells("docs/architecture.md", "key, under")
    assert len(rows) == len(names.added())
    for (key, option), (name, options) in zip(rows, names.added().items(), strict=True):
        assert key.strip("`").startswith(name)
        assert options == [option.strip("`")] or option.split("`")[1] in options[0].split()


@pytest.mark.parametrize("variant", ["combine", "dispatch", "experts"])
def test_the_page_shows_the_files(variant: str) -> None:
    page = (ROOT / "docs/variants.md").read_text("utf-8")
    source = (ROOT / f"tests/toy_variants/{variant}.py").read_text("utf-8")
    assert f"```python\n{source}```" in page


def test_a_moe_without_experts_at_home_has_the_hosts_router(single_rank: None) -> None:
    """The same config object, which the host may change later."""
    moe = build_block(Case()).layers[0].mlp
    assert isinstance(moe, ScMoELayer)
    assert moe.router.config is moe.config and moe.at_home is None
    assert ScMoEConfig().at_home == {}

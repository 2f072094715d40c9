"""Grouped experts against the host's SequentialMLP: weights, values, gradients, what is on disk.

Initial weights; float64, float32 and bf16, every activation, empty experts and no tokens;
attributes of the parameters and tensors on disk at expert TP 2 x EP 2.
"""

import copy
from typing import Any

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.activations import squared_relu
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories, apply_factory_merges
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from megatron_scmoe.model.experts.grouped import GroupedExperts, GroupedMatmul, why_no_grouped_mm
from megatron_scmoe.model.specs import scmoe_block_spec, with_local_replacements
from megatron_scmoe.overlap.schedule import POSITIONS
from tests.distributed_utils import run_distributed
from tests.models import Case, parameters_by_expert

pytestmark = pytest.mark.usefixtures("single_rank")

NUM_EXPERTS = 4
TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2}
TOKENS = {
    "empty-experts": [3, 0, 7, 0],
    "all-to-one": [0, 0, 0, 9],
    "one-token": [0, 1, 0, 0],
    "no-tokens": [0, 0, 0, 0],
}
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "swiglu": {},
    "fused swiglu": {"bias_activation_fusion": True},
    "clamped swiglu": {"activation_func_clamp_value": 0.01, "glu_linear_offset": 1.0},
    "fused quick-geglu": {
        "activation_func": quick_gelu,
        "bias_activation_fusion": True,
        "activation_func_clamp_value": 0.01,
        "glu_linear_offset": 1.0,
    },
    "gelu": {"gated_linear_unit": False, "activation_func": torch.nn.functional.gelu},
    "squared-relu": {"gated_linear_unit": False, "activation_func": squared_relu},
    "weights on the input": {"moe_apply_probs_on_input": True},
}


def build(kind: type, **host: Any) -> torch.nn.Module:
    """Experts of the current process groups, from one seed."""
    tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
    torch.manual_seed(5)
    # Not the dense MLP's size: the host builds experts from a changed copy of the config.
    config = Case(host={"moe_ffn_hidden_size": 8, **host}).host_config()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    submodules = LocalSpecProvider().grouped_mlp_modules(False).keywords["submodules"]
    return kind(NUM_EXPERTS // groups.ep.size(), config, submodules, groups)


def by_expert(module: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters under SequentialMLP's names."""
    layer = torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"experts": module})})
    return dict(parameters_by_expert(layer))


def run(module: torch.nn.Module, tokens: list[int]) -> dict[str, Tensor]:
    """Output and every gradient."""
    generator = torch.Generator().manual_seed(1)
    dtype = module.config.params_dtype
    shape = (sum(tokens), module.config.hidden_size)
    rows = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    probs = torch.rand(shape[0], generator=generator).requires_grad_()
    output, bias = module(rows, torch.tensor(tokens), probs)
    assert bias is None
    # Strided, as a gradient may come.
    output.backward(torch.randn(shape[::-1], generator=generator).to(dtype).T)
    found = {"output": output.detach(), "rows": rows.grad, "probs": probs.grad}
    for name, parameter in by_expert(module).items():
        # The host leaves None for a parameter that took no part.
        found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return found


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_sequential(activation: str, dtype: torch.dtype, tokens: str) -> None:
    host = {"params_dtype": dtype, **ACTIVATIONS[activation]}
    found = run(build(GroupedExperts, **host), TOKENS[tokens])
    expected = run(build(SequentialMLP, **host), TOKENS[tokens])
    assert found.keys() == expected.keys()
    tolerance = TOLERANCES[dtype]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)
    assert tokens == "no-tokens" or all(
        expected[name].abs().max() > 0 for name in ("output", "rows")
    )


@pytest.mark.parametrize("on_cpu", [True, False])
def test_weights_are_those_of_the_same_seed(on_cpu: bool) -> None:
    found = by_expert(build(GroupedExperts, use_cpu_initialization=on_cpu))
    expected = by_expert(build(SequentialMLP, use_cpu_initialization=on_cpu))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_recomputed_activation_is_exact() -> None:
    recompute = {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}
    options = {"moe_grouped_gemm": True, "params_dtype": torch.float32}
    expected = run(build(GroupedExperts, **options), [3, 0, 7, 2])
    recomputed = build(GroupedExperts, **options, **recompute)
    assert recomputed.activation_recompute
    found = run(recomputed, [3, 0, 7, 2])
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_frozen_experts_pass_the_gradient_on() -> None:
    module = build(GroupedExperts).requires_grad_(False)
    found = run(module, [3, 0, 7, 2])
    assert found["rows"].abs().max() > 0
    assert all(parameter.grad is None for parameter in module.parameters())


# How it multiplies. -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "sizes", "device", "reason"),
    [
        (torch.float32, (16, 8), "cpu", None),
        (torch.bfloat16, (16, 8), "cpu", None),
        (torch.float64, (16, 8), "cpu", "does not multiply torch.float64"),
        (torch.float32, (16, 6), "cpu", "multiple of 16 bytes"),
        (torch.bfloat16, (16, 8), "cuda", None),
        (torch.bfloat16, (16, 12), "cuda", "multiple of 16 bytes"),
        (torch.float32, (16, 8), "cuda", "bf16 on Hopper and Blackwell"),
    ],
)
def test_where_grouped_mm_multiplies(
    dtype: torch.dtype,
    sizes: tuple[int, int],
    device: str,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    found = why_no_grouped_mm(dtype, sizes, torch.device(device))
    assert found is None if reason is None else reason in str(found)


def test_other_gpus_and_older_torch_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    gpu = (torch.bfloat16, (16, 8), torch.device("cuda"))
    assert "Hopper and Blackwell" in str(why_no_grouped_mm(*gpu))
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    assert "2.10" in str(why_no_grouped_mm(*gpu))
    module = build(GroupedExperts, params_dtype=torch.float32)
    assert not module.linear_fc1.use_grouped_mm
    run(module, [3, 0, 7, 2])


def test_a_module_that_is_converted_after_it_was_built(single_rank: None) -> None:
    """grouped_mm does not multiply float64."""
    module = build(GroupedExperts, params_dtype=torch.float32)
    assert module.linear_fc1.use_grouped_mm
    module.double().config.params_dtype = torch.float64
    assert not module.linear_fc1.use_grouped_mm
    run(module, [3, 0, 7, 2])


def test_six_products_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers, forward and both gradients, whatever the number of experts."""
    calls = []
    grouped_mm = torch.nn.functional.grouped_mm

    def count(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return grouped_mm(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", count)
    run(build(GroupedExperts, params_dtype=torch.float32), [3, 0, 7, 2])
    assert len(calls) == 6


def test_gradient_of_the_matmul() -> None:
    generator = torch.Generator().manual_seed(1)
    rows, weight = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((6, 4), (3, 5, 4))
    )

    def multiply(rows: Tensor, weight: Tensor) -> Tensor:
        return GroupedMatmul.apply(rows, weight, [2, 0, 4], False)

    assert torch.autograd.gradcheck(multiply, (rows, weight))


# Which experts are built. -----------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["empty-experts", "all-to-one"])
def test_experts_without_tokens_have_no_gradient_on_blackwell(
    monkeypatch: pytest.MonkeyPatch, tokens: str
) -> None:
    """The kernel there writes nothing for an empty group of rows: what lay there before stays."""
    grouped_mm = torch.nn.functional.grouped_mm

    def leaves_empty_groups(left: Tensor, right: Tensor, offs: Tensor) -> Tensor:
        output = grouped_mm(left, right, offs=offs)
        if right.dim() == 2:
            output[offs.diff(prepend=offs.new_zeros(1)) == 0] = torch.nan
        return output

    def gradient() -> Tensor:
        generator = torch.Generator().manual_seed(1)
        rows = torch.randn(sum(TOKENS[tokens]), 16, generator=generator)
        weight = torch.randn(NUM_EXPERTS, 8, 16, generator=generator).requires_grad_()
        GroupedMatmul.apply(rows, weight, TOKENS[tokens], True).square().sum().backward()
        assert weight.grad is not None
        return weight.grad

    sound = gradient()
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", leaves_empty_groups)
    assert torch.equal(gradient(), sound)
    empty = [expert for expert, rows in enumerate(TOKENS[tokens]) if rows == 0]
    assert not sound[empty].any() and sound.any()


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("grouped", [True, False])
def test_selected_by_megatrons_option(position: str, grouped: bool) -> None:
    options = {"moe_grouped_gemm": grouped}
    case = Case(scmoe={"scmoe_shortcut_position": position}, host=options)
    unit = scmoe_block_spec(case.host_config(), case.scmoe_config()).layer_specs[-1].submodules
    kind = unit.mlp.keywords["submodules"].experts.func
    assert kind is (GroupedExperts if grouped else SequentialMLP)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, SequentialMLP),
        ({"moe_grouped_gemm": True}, GroupedExperts),
        ({"moe_grouped_gemm": True, "add_bias_linear": True}, SequentialMLP),
    ],
)
def test_selected_in_the_stock_layer(options: dict[str, Any], kind: type) -> None:
    config = Case(host=options).host_config()
    stock = get_gpt_layer_local_spec(NUM_EXPERTS, config.moe_grouped_gemm, normalization="RMSNorm")
    before = copy.copy(stock.submodules.mlp.keywords)
    spec = with_local_replacements(stock, config)
    assert spec.submodules.mlp.keywords["submodules"].experts.func is kind
    assert stock.submodules.mlp.keywords == before


# On disk. ---------------------------------------------------------------------------------------


def shards(module: torch.nn.Module) -> tuple[dict[Any, Any], dict[str, Any], dict[str, Any]]:
    """What goes to disk by key and offset; the state dict before and after the split."""
    dp_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    args = ("decoder.layers.mlp.experts.", ((0, 1, 3),), {"dp_cp_group": dp_group})
    split = module.sharded_state_dict(*args)
    apply_factories(split)
    found: dict[Any, Any] = {}
    for part in nested_values(split):
        assert (part.key, part.global_offset) not in found
        layout = {name: value for name, value in vars(part).items() if name != "data"}
        found[part.key, part.global_offset] = layout, part.data
    return found, module.sharded_state_dict(*args), split


def disk_differences(**host: Any) -> list[str]:
    """What GroupedExperts and SequentialMLP save differently, or load differently."""
    module = build(GroupedExperts, **host)
    found, state_dict, split = shards(module)
    expected, _, _ = shards(build(SequentialMLP, **host))
    differing = [str(key) for key in found.keys() ^ expected.keys()]
    for key in found.keys() & expected.keys():
        (layout, data), (expected_layout, expected_data) = found[key], expected[key]
        same = data is expected_data is None or torch.equal(data, expected_data)
        if layout != expected_layout or not same:
            differing.append(str(key))
    loaded = copy.copy(split)
    for name, value in state_dict.items():
        if name.endswith(".weight"):
            tensors = [[part.data for part in expert] for expert in split[name]]
            loaded[name] = apply_factory_merges(tensors, value)
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    module.load_state_dict(
        {name.removeprefix("decoder.layers.mlp.experts."): value for name, value in loaded.items()}
    )
    after = dict(module.named_parameters())
    return differing + [name for name in before if not torch.equal(before[name], after[name])]


@pytest.mark.parametrize("gated", [True, False])
def test_disk_is_sequentials(gated: bool) -> None:
    assert disk_differences(gated_linear_unit=gated) == []


def compare_layouts() -> tuple[list[str], dict[str, Any]]:
    """On a rank: differences on disk, and the attributes of the parameters of both kinds."""
    sizes = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}
    differing = disk_differences(**sizes) + disk_differences(**sizes, gated_linear_unit=False)
    attributes = {}
    for name, parameter in build(GroupedExperts, **sizes).named_parameters():
        stacked = dict(vars(parameter))
        stacked["partition_dim"] -= 1  # behind the experts
        single = getattr(build(SequentialMLP, **sizes).local_experts[0], name.split(".")[0]).weight
        attributes[name] = (stacked, dict(vars(single)), tuple(parameter.shape))
    return differing, attributes


def test_layouts_and_parameters_are_sequentials() -> None:
    """Two expert parallel by two expert tensor parallel ranks."""
    sizes = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}
    for differing, attributes in run_distributed(compare_layouts, 4, **sizes):
        assert differing == []
        for stacked, single, shape in attributes.values():
            assert stacked == single
            assert stacked["allreduce"] is False
            assert shape in ((2, 8, 16), (2, 16, 4))

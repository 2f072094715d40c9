"""A damaged config.json, and lists of partners that name no expert: one line, before any work."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_scmoe.huggingface import fields, load, tensor_names
from megatron_scmoe.huggingface.config import LATENT, SAME_NAME
from megatron_scmoe.huggingface.dialects import NEUTRAL
from tests.unit_tests.test_damaged_files import FUZZED, VALUES, damaged

SIZES: dict[str, Any] = {
    "architectures": ["ScMoEForCausalLM"],
    "vocab_size": 7,
    "hidden_size": 8,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "intermediate_size": 6,
    "moe_intermediate_size": 4,
    "moe_layers": [1, 3],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 16,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "pre_softmax": False,
    "norm_topk_prob": True,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
    },
    "megatron": {"iteration": 3, "padded_vocab_size": 16, "moe_layer_freq": [0, 1, 0, 1]},
}
CONFIG: dict[str, Any] = {**NEUTRAL, "shortcut_position": "pos2", **SIZES}
PARTNERS = {"router": "c2r", "c2r_top_t": 2}


def write_directory(folder: Path, **changed: Any) -> Path:
    """Config and weights of zeros; partners are those that come next."""
    config = {**CONFIG, **changed}
    (folder / "config.json").write_text(json.dumps(config))
    weights = {
        name: torch.zeros(shape)
        for each in tensor_names.tensors(config)
        for name, shape in each.parts
    }
    for name, values in weights.items():
        if name.endswith("partners"):
            experts, others = values.shape
            steps = torch.arange(experts)[:, None] + torch.arange(1, others + 1)
            weights[name] = steps % experts
    save_file(weights, folder / "model.safetensors")
    return folder


def come_in(folder: Path) -> None:
    """All that `import` does before it writes."""
    directory = load.open_directory(folder)
    load.locate(directory)
    json.dumps(load._record(load.options_of(directory, folder / "save"), 1, folder))


def test_what_is_sound_comes_in(tmp_path: Path) -> None:
    come_in(write_directory(tmp_path))
    come_in(write_directory(tmp_path, **PARTNERS))


def test_every_field_that_makes_a_model_has_a_kind() -> None:
    free = {"model_type", "balance_groups"}
    assert {*SAME_NAME, *LATENT, *NEUTRAL} - fields.KINDS.keys() == free
    transformers = pytest.importorskip("transformers")
    from megatron_scmoe.huggingface.configuration_scmoe import CHOICES

    assert transformers
    for name, values in CHOICES.items():
        assert fields.KINDS[name].text == f"one of {', '.join(values)}"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"hidden_size": "x"}, "hidden_size is 'x' and not a whole number from 1 to "),
        ({"num_experts": True}, "num_experts is True and not a whole number from 1 to "),
        ({"combine": "cg3"}, "combine is 'cg3' and not one of add, cg1, cg2."),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings is 0 and not true or false."),
        ({"megatron": []}, "megatron is [] and not an object."),
        ({"megatron": {"iteration": -1}}, "megatron.iteration is -1 and not a whole number"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_parameters.rope_theta is 0 and not a numb"),
        # Nothing but going there and back would have seen these.
        ({"hidden_act": "gelu"}, "or that no option says: hidden_act 'gelu' (not 'silu')."),
        ({"norm_topk_prob": False}, "no option says: norm_topk_prob False (not True)."),
        ({"softmax_scale": 0.5}, "no option says: softmax_scale 0.5 (not None)."),
        ({"moe_layers": [3]}, "no option says: moe_layers [3] (not [1, 3])."),
        (
            {"rope_parameters": {**SIZES["rope_parameters"], "rope_type": "yarn", "factor": 4.0}},
            "no option says: rope_parameters.rope_type 'yarn'.",
        ),
    ],
)
def test_a_value_that_no_model_has_is_named(
    changed: dict[str, Any], said: str, tmp_path: Path
) -> None:
    write_directory(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **changed}))
    with pytest.raises(ValueError) as refused:
        come_in(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_whatever_is_in_a_config(tmp_path: Path) -> None:
    write_directory(tmp_path, **PARTNERS)
    path = tmp_path / "config.json"
    whole = {**CONFIG, **PARTNERS}
    choose = random.Random(0)
    refused = 0
    for seed in range(FUZZED):
        # Half of the time one field of those that count.
        one = {**whole, choose.choice([*fields.KINDS]): choose.choice(VALUES)}
        path.write_bytes(damaged(whole, seed) if seed % 2 else json.dumps(one).encode())
        try:
            come_in(tmp_path)
        except ValueError as error:
            assert str(tmp_path) in str(error) and "\n" not in str(error), seed
            refused += 1
    assert FUZZED / 2 < refused < FUZZED


@pytest.mark.parametrize("row", [[1, 2, 2], [1, 2, 4], [1, 2, -1], [0, 1, 2]])
def test_partners_that_are_not_all_others_are_refused(row: list[int], tmp_path: Path) -> None:
    write_directory(tmp_path, **PARTNERS)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.3.mlp.gate.partners"
    weights[name][0] = torch.tensor(row)
    save_file(weights, path)
    with pytest.raises(ValueError, match=f"{name} in {tmp_path}") as refused:
        load.load(tmp_path, tmp_path / "save")
    assert "\n" not in str(refused.value) and not (tmp_path / "save").exists()


def test_a_damaged_file_of_padding_is_refused(tmp_path: Path) -> None:
    path = write_directory(tmp_path) / "padding.safetensors"
    path.write_bytes(b"\x10")
    with pytest.raises(ValueError, match=f"{path} is cut off or no safetensors file"):
        load.load(tmp_path, tmp_path / "save")
    assert not (tmp_path / "save").exists()

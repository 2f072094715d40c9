"""Models of others come in, and the host computes what transformers does with them.

Tiny random models, written to disk by transformers itself, weights large enough that a wrong
angle, score or order of heads is seen.
"""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_scmoe.commands.convert_checkpoint import main
from megatron_scmoe.huggingface import export, load, verify
from tests.functional_tests.forked import launch_forked
from tests.functional_tests.test_checkpoints import succeeded
from tests.functional_tests.test_convert_checkpoint import LLAMA, RUN, SHARED, refused

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
LLAMA_SIZES: dict[str, Any] = {
    **SIZES,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0},
}
QWEN: dict[str, Any] = {
    **LLAMA_SIZES,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
LONGCAT: dict[str, Any] = {
    **SIZES,
    "num_layers": 2,
    "rms_norm_eps": 1e-6,
    "ffn_hidden_size": 48,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "head_dim": 8,
    "v_head_dim": 12,
    "moe_topk": 2,
    "n_routed_experts": 4,
    "zero_expert_num": 2,
    "expert_ffn_hidden_size": 24,
    "routed_scaling_factor": 2.0,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral": ("Mixtral", {**LLAMA_SIZES, "num_local_experts": 4}),
    "Qwen2-MoE": ("Qwen2Moe", {**QWEN, "shared_expert_intermediate_size": 40}),
    "Qwen2-MoE, renormalised": (
        "Qwen2Moe",
        {**QWEN, "shared_expert_intermediate_size": 40, "norm_topk_prob": True},
    ),
    "Qwen3-MoE": ("Qwen3Moe", {**QWEN, "head_dim": 16, "mlp_only_layers": [0]}),
    "LongCat-Flash": ("LongcatFlash", LONGCAT),
    # As Thinking-2601, whose angles begin to differ behind the positions it began with.
    "LongCat-Flash, YaRN": (
        "LongcatFlash",
        {
            **LONGCAT,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 8,
                "beta_fast": 16.0,
                "mscale": 0.7,
                "mscale_all_dim": 0.4,
            },
        },
    ),
}
"""The kind in transformers, and its fields."""


@pytest.fixture(scope="module")
def came_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with `theirs`, a model of that name, and `checkpoints`, which it became."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            kind, fields = MODELS[name]
            torch.manual_seed(0)
            config = getattr(transformers, f"{kind}Config")(**fields)
            model = getattr(transformers, f"{kind}ForCausalLM")(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(3)
                for tensor, values in [*model.named_parameters(), *model.named_buffers()]:
                    if tensor.endswith("bias"):
                        values.normal_(std=0.05)
            folder = tmp_path_factory.mktemp("model")
            model.save_pretrained(folder / "theirs")
            load.load(folder / "theirs", folder / "checkpoints")
            made[name] = folder
        return made[name]

    return get


def same_logits(checkpoints: Path, folder: Path) -> None:
    found = verify.compare_logits(checkpoints, folder)
    assert found.same and found.places == 32, found.text()
    assert f"{found.perplexity:.4g}" == f"{found.other_perplexity:.4g}"


@pytest.mark.usefixtures("forked_logits")
@pytest.mark.parametrize("name", MODELS)
def test_the_host_computes_what_transformers_does(
    name: str, came_in: Callable[[str], Path]
) -> None:
    folder = came_in(name)
    assert verify.compare_tensors(folder / "checkpoints", folder / "theirs") is None
    same_logits(folder / "checkpoints", folder / "theirs")


def test_the_program_that_computes_the_hosts_model(came_in: Callable[[str], Path]) -> None:
    """As `verify` starts it; the others fork."""
    folder = came_in("Mixtral")
    same_logits(folder / "checkpoints", folder / "theirs")


def test_a_baseline_that_came_in_starts_a_shortcut_run(
    came_in: Callable[[str], Path], data_prefix: Path, tmp_path: Path
) -> None:
    """By --finetune: all of it taken, only what is ours is new."""
    run = succeeded(
        launch_forked(
            [
                *shlex.split(RUN.replace("--ffn-hidden-size 64", "--ffn-hidden-size 32")),
                *shlex.split(
                    f"{LLAMA} {SHARED} "
                    "--group-query-attention --num-query-groups 2 --moe-grouped-gemm "
                    "--untie-embeddings-and-output-weights --scmoe-shortcut-position pos1 "
                    "--expert-model-parallel-size 2 --rotary-base 20000 --moe-router-topk 1 "
                    "--finetune --load"
                ),
                str(came_in("Mixtral") / "checkpoints"),
                *("--data-path", str(data_prefix), "--split", "100,0,0"),
            ],
            2,
            tmp_path,
        )
    )
    (new,) = [line for line in run.stdout.splitlines() if " new, as initialised" in line]
    names = new.partition("initialised: ")[2].split(", ")
    assert {name.split(".layers.")[-1] for name in names if "_extra_state" not in name} == {
        "mlp.shared_experts.gate_weight",
        "mlp.shared_experts.linear_fc1.weight",
        "mlp.shared_experts.linear_fc2.weight",
        "shortcut_layernorm.weight",
    }


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("LongCat")])
def test_longcat_flash_goes_out_as_it_came_in(
    name: str, came_in: Callable[[str], Path], tmp_path: Path
) -> None:
    """Bit for bit, with the rows that transformers wants or without; it reads the former."""
    folder = came_in(name)
    out = {"target": "longcat_flash", "say": lambda line: None}
    export.export(folder / "checkpoints", tmp_path / "hf", zero_expert_rows=True, **out)
    theirs = load_file(folder / "theirs" / "model.safetensors")
    ours = load_file(tmp_path / "hf" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, values in theirs.items():
        # Their rows of experts without weights hold what was allocated.
        if not re.search(r"experts\.[45]\.", key):
            torch.testing.assert_close(ours[key], values, rtol=0, atol=0, msg=key)
    export.export(folder / "checkpoints", tmp_path / "official", **out)
    official = load_file(tmp_path / "official" / "model.safetensors")
    assert ours.keys() - official.keys() == {n for n in ours if re.search(r"experts\.[45]\.", n)}
    read = [
        transformers.AutoModelForCausalLM.from_pretrained(path)
        for path in (tmp_path / "hf", folder / "theirs")
    ]
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        logits = [model(tokens).logits for model in read]
    assert type(read[0]) is type(read[1])
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=0)


def test_longcat_flash_comes_in_with_all_experts_in_one_tensor(
    came_in: Callable[[str], Path], tmp_path: Path
) -> None:
    """As transformers holds them, with rows for those without weights; and without model_type."""
    theirs = came_in("LongCat-Flash") / "theirs"
    weights = load_file(theirs / "model.safetensors")
    for pair in range(LONGCAT["num_layers"]):
        experts = f"model.layers.{pair}.mlp.experts"
        gate, up, down = (
            [weights.pop(f"{experts}.{e}.{kind}_proj.weight") for e in range(number)]
            for kind, number in (("gate", 6), ("up", 6), ("down", 4))
        )
        weights[f"{experts}.gate_up_proj"] = torch.stack(
            [torch.cat(both) for both in zip(gate, up, strict=True)]
        )
        weights[f"{experts}.down_proj"] = torch.stack(down)
    save_file(weights, tmp_path / "model.safetensors")
    config = json.loads((theirs / "config.json").read_text())
    del config["model_type"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    load.load(tmp_path, tmp_path / "checkpoints")
    assert verify.compare_tensors(tmp_path / "checkpoints", theirs) is None


@pytest.mark.usefixtures("forked_logits")
def test_an_upcycled_model_computes_what_the_dense_one_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 0, and the experts are slices of the MLP; what does not divide is one line."""
    config = transformers.LlamaConfig(
        **{**LLAMA_SIZES, "num_hidden_layers": 2, "intermediate_size": 48},
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    both = ["--input", str(tmp_path / "dense"), "--save", str(tmp_path / "checkpoints")]
    shape = ["--num-experts", "4", "--topk", "2"]
    assert "does not divide" in refused(capsys, "upcycle", *both, *shape, "--granularity", "3")
    assert main(["upcycle", *both, *shape, "--granularity", "2"]) == 0
    assert "another token at 0" in capsys.readouterr().out
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    source = export.open_checkpoint(tmp_path / "checkpoints")
    name = "decoder.layers.1.mlp.experts.experts.3.linear_fc1.weight"
    fc1 = source.reader.read(source.reader.place(name))
    assert torch.equal(fc1[:24], dense["model.layers.1.mlp.gate_proj.weight"][24:])
    assert torch.equal(fc1[24:], dense["model.layers.1.mlp.up_proj.weight"][24:])
    assert source.config["shortcut_position"] == "pos2" and source.config["moe_layers"] == [1]

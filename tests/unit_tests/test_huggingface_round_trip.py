"""Every kind of model goes out to Hugging Face, says the same there, and comes in bit for bit.

Checkpoints are saved from models that the host builds from command lines, in one process; what
came in is loaded by such a model again. Several ranks, and training:
tests/functional_tests/test_convert_checkpoint.py.
"""

import sys
from argparse import Namespace
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.arguments import validate_args
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megatron_scmoe import arguments
from megatron_scmoe.huggingface import export, load, tensor_names
from megatron_scmoe.huggingface.modeling_scmoe import ScMoEForCausalLM
from megatron_scmoe.model.builder import ScMoEModelBuilder
from megatron_scmoe.model.names import LOCAL_NAMES
from megatron_scmoe.presets import PRESETS
from megatron_scmoe.run.checkpoint import contents
from megatron_scmoe.run.checkpoint.model_options import SCMOE
from megatron_scmoe.run.checkpoint.record import write_record
from tests.unit_tests.test_huggingface_fields import CONFIG, write_directory

pytest.importorskip("transformers")

MODEL = (
    "--num-layers 4 --hidden-size 16 --ffn-hidden-size 24 --num-attention-heads 4 --num-experts 4 "
    "--moe-ffn-hidden-size 12 --moe-token-dispatcher-type alltoall --seq-length 8 "
    "--max-position-embeddings 8 --micro-batch-size 1 --lr 1e-2 --train-iters 1 "
    "--tokenizer-type NullTokenizer --vocab-size 37 --make-vocab-size-divisible-by 16 "
    "--transformer-impl local --no-masked-softmax-fusion --no-rope-fusion --no-persist-layer-norm "
    "--no-gradient-accumulation-fusion"
)
LLAMA = "--swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear"
GPT = "--disable-bias-linear"
PAIRS = "--moe-layer-freq ([0,1]*2)"
EVERY = "--moe-layer-freq 1"
UNTIED = "--untie-embeddings-and-output-weights"
LATENT = (
    "--multi-latent-attention --kv-lora-rank 8 --qk-head-dim 4 --qk-pos-emb-head-dim 4 "
    "--v-head-dim 6 --qk-layernorm"
)
POS1, POS2, POS3 = (f"--scmoe-shortcut-position pos{number}" for number in (1, 2, 3))
ALL_FIT = "--moe-expert-capacity-factor 64"  # an exported model drops no token
GROUPED = "--group-query-attention --num-query-groups 2"
CASES = {
    **{f"preset {name}": f"{LLAMA} {PAIRS} --scmoe-preset {name}" for name in PRESETS},
    "preset moepp": f"{LLAMA} {PAIRS} --scmoe-preset moepp {ALL_FIT}",
    "preset moepp, all layers": f"{LLAMA} {EVERY} --scmoe-preset moepp {ALL_FIT}",
    "preset nvidia-shortcut, all layers": f"{LLAMA} --scmoe-preset nvidia-shortcut",
    "stock": f"{LLAMA} {EVERY} {GROUPED} {UNTIED} --moe-grouped-gemm",
    "stock, a gate": f"{LLAMA} {PAIRS} --moe-shared-expert-intermediate-size 20 "
    "--moe-shared-expert-gate",
    "stock, biases": f"{PAIRS} --no-bias-gelu-fusion",
    "stock, sigmoid in groups": f"{LLAMA} {EVERY} --moe-router-score-function sigmoid "
    "--moe-router-topk 2 --moe-router-num-groups 2 --moe-router-group-topk 1 "
    "--moe-router-topk-scaling-factor 2.5 --moe-router-enable-expert-bias",
    "pos1, cg2": f"{GPT} {EVERY} {POS1} --scmoe-combine cg2 {UNTIED}",
    "pos1, add, shared norm": f"{LLAMA} {PAIRS} {POS1} --scmoe-combine add "
    f"--scmoe-shortcut-norm shared {GROUPED} --qk-layernorm",
    "pos2, cg1, grouped": f"{LLAMA} {PAIRS} {POS2} --moe-grouped-gemm --scmoe-post-norm {UNTIED}",
    "pos2, cg2, shared norm": f"{GPT} {PAIRS} {POS2} --scmoe-combine cg2 --add-qkv-bias "
    "--scmoe-shortcut-norm shared --position-embedding-type none",
    "pos3, add": f"{GPT} {PAIRS} {POS3} --scmoe-combine add --scmoe-post-norm --squared-relu",
    "pos3, cg1, shared norm": f"{LLAMA} {PAIRS} {POS3} --scmoe-shortcut-norm shared {UNTIED} "
    "--rotary-interleaved --rotary-percent 0.5",
    "latent": f"{LLAMA} {PAIRS} {POS3} {LATENT} --q-lora-rank 12 --rope-type rope",
    "latent, queries without": f"{LLAMA} {PAIRS} {POS2} {LATENT} --rope-type rope".replace(
        " --qk-layernorm", ""
    ),
    "latent, YaRN": f"{LLAMA} {EVERY} {POS1} {LATENT} --q-lora-rank 12 {UNTIED} "
    "--rotary-scaling-factor 4 --mscale 0.7 --mscale-all-dim 0.4",
    "two gates, one weight": f"{LLAMA} {EVERY} {POS1} --scmoe-dual-gating shared "
    "--moe-router-topk 1",
    "two gates apart": f"{LLAMA} {PAIRS} {POS3} --scmoe-dual-gating separate --moe-router-topk 1 "
    "--no-scmoe-distinct-experts",
    "at home, residual, two layers": f"{LLAMA} {PAIRS} {POS2} --scmoe-router heterogeneous "
    "--scmoe-num-zero-experts 1 --scmoe-num-constant-experts 2 --scmoe-gating-residual "
    "--scmoe-gate-layers 2 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 "
    "--scmoe-renormalise --scmoe-input-scale 2",
    "longcat, own norm": f"{LLAMA} {PAIRS} {POS2} --scmoe-router longcat --scmoe-combine add "
    "--scmoe-num-copy-experts 2 --scmoe-scaled-experts routed --moe-router-topk 2 "
    "--moe-router-load-balancing-type aux_loss --moe-router-topk-scaling-factor 1.5",
}


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Namespace:
    """A case's options, as the entry script resolves them."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", *MODEL.split(), *CASES[request.param].split()])
    args = arguments.parse(arguments.add_scmoe_args)
    with redirect_stdout(StringIO()):
        validate_args(args)
    arguments.apply_scmoe_defaults(args)
    args.padded_vocab_size = 48
    args.use_cpu_initialization = True
    return args


def build(args: Namespace, seed: int) -> nn.Module:
    """A model, every number of it drawn."""
    config = arguments.model_config_from_args(args)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = ScMoEModelBuilder(config).build_model(groups, pre_process=True, post_process=True)
    torch.manual_seed(seed)
    for values in numbers(model).values():
        values.data.normal_(std=0.3)
    return model


def numbers(model: nn.Module) -> dict[str, Tensor]:
    """All that a model keeps: weights, and biases of the router."""
    kept = model.state_dict()
    every = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: values for name, values in every.items() if name in kept}


def same_logits(model: nn.Module, folder: Path) -> None:
    """The host's model and the exported one, on all tokens that have a row."""
    tokens = torch.arange(16).view(2, 8) * 5 % 37
    mask = torch.ones(8, 8, dtype=torch.bool).triu(1)[None, None]
    there = ScMoEForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        own = model.eval()(tokens, torch.arange(8).expand(2, 8), mask)[..., :37]
        torch.testing.assert_close(there(tokens).logits, own, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("parsed", CASES, indirect=True)
def test_a_model_comes_back(parsed: Namespace, tmp_path: Path) -> None:
    model = build(parsed, seed=1)
    there = tmp_path / "there"
    checkpoint = contents.iteration_folder(there, 1)
    checkpoint.mkdir(parents=True)
    dist_checkpointing.save(model.sharded_state_dict(), checkpoint)
    write_record(there, 1, parsed)
    contents.write_tracker(there, 1)

    def silent(line: str) -> None:
        pass

    export.export(there, tmp_path / "hf", say=silent)
    load.load(tmp_path / "hf", tmp_path / "back", say=silent)
    sources = [export.open_checkpoint(folder) for folder in (there, tmp_path / "back")]
    assert sources[0].config == sources[1].config
    records = [source.record["model"] for source in sources]
    assert {name: records[0][name] for name in SCMOE} == {name: records[1][name] for name in SCMOE}
    loaded = build(parsed, seed=2)
    wanted_on_disk = loaded.sharded_state_dict()
    for tensor in nested_values(wanted_on_disk):
        for ours, stock in LOCAL_NAMES.items():  # either is found by a run (run/checkpoint)
            if tensor.key not in sources[1].reader.stored:
                tensor.key = tensor.key.replace(stock, ours)
    back = dist_checkpointing.load(wanted_on_disk, sources[1].reader.folder)
    loaded.load_state_dict({name: back[name] for name in wanted_on_disk})
    found, wanted = numbers(loaded), numbers(model)
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert torch.equal(found[name], values), name
    same_logits(model, tmp_path / "hf")
    # The second export has the bytes of the first.
    export.export(tmp_path / "back", tmp_path / "again", say=silent)
    weights = [tmp_path / name / "model.safetensors" for name in ("hf", "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_norms_that_are_kept_less_1_come_back(tmp_path: Path) -> None:
    """By hand: the host's norms without Transformer Engine are not. Adding 1 rounds."""
    kept = {**CONFIG["megatron"], "layernorm_zero_centered_gamma": True}
    folder = tmp_path / "hf"
    folder.mkdir()
    write_directory(folder, megatron=kept)
    torch.manual_seed(1)
    norms = [each for each in tensor_names.tensors(CONFIG) if each.row.layout == "norm"]
    own = {name: torch.randn(shape) * 1e-3 for each in norms for name, shape in each.parts}
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {name: one + 1 for name, one in own.items()}, folder / "model.safetensors")
    save_file(own, folder / "padding.safetensors")
    load.load(folder, tmp_path / "there")
    export.export(tmp_path / "there", tmp_path / "again")
    trained = load_file(tmp_path / "again" / "model.safetensors")
    trained["model.norm.weight"] += 0.5
    save_file(trained, tmp_path / "again" / "model.safetensors")
    load.load(tmp_path / "again", tmp_path / "back")
    readers = [export.open_checkpoint(tmp_path / name).reader for name in ("there", "back")]
    for each in norms:
        there, back = (reader.read(reader.place(each.megatron)) for reader in readers)
        name = each.parts[0][0]
        assert torch.equal(there, own[name])
        changed = name == "model.norm.weight"
        assert torch.equal(back, trained[name] - 1 if changed else own[name])

"""Checkpoints to Hugging Face and back: every tensor comes back, and what is wrong is one line.

Checkpoints of real runs at several layouts, which between them have every kind of tensor: stacked
and numbered layers, grouped and sequential experts, gated and plain, grouped-query and latent
attention, both norms, every combine, experts at home, two gates, a gate of two layers, residuals
between gates, a padded vocabulary. Models of others: test_dialects.py.
"""

import importlib.util
import json
import multiprocessing
import os
import pickle
import re
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_scmoe.commands.convert_checkpoint import main
from megatron_scmoe.huggingface import export, load, safetensors_files, tokenizer, verify
from megatron_scmoe.run.checkpoint.model_options import SCMOE
from tests.functional_tests.forked import launch_forked
from tests.functional_tests.test_checkpoints import succeeded
from tests.limits import PROCESS_S

FINETUNE = Path(__file__).parents[2] / "examples" / "huggingface" / "finetune.py"
spec = importlib.util.spec_from_file_location("finetune", FINETUNE)
assert spec is not None and spec.loader is not None
finetune = importlib.util.module_from_spec(spec)
spec.loader.exec_module(finetune)

RUN = (
    "--seq-length 32 --max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 8 "
    "--lr 1e-2 --train-iters 2 --save-interval 2 --log-interval 1 --eval-interval 9 "
    "--eval-iters 0 --num-workers 0 --tokenizer-type NullTokenizer --vocab-size 61 "
    "--make-vocab-size-divisible-by 32 --attention-dropout 0 --hidden-dropout 0 "
    "--num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 "
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32 --disable-bias-linear "
    "--moe-token-dispatcher-type alltoall "
)
SHARED = "--moe-shared-expert-intermediate-size 48 "
PAIRS = "--moe-layer-freq ([0,1]*2) "
LATENT = (
    "--multi-latent-attention --q-lora-rank 16 --kv-lora-rank 16 --qk-head-dim 8 "
    "--qk-pos-emb-head-dim 8 --v-head-dim 12 --rope-type rope --qk-layernorm "
)
LLAMA = "--swiglu --normalization RMSNorm --position-embedding-type rope "
MODELS = {
    "grouped query": LLAMA
    + SHARED
    + PAIRS
    + "--group-query-attention --num-query-groups 2 --qk-layernorm --moe-grouped-gemm "
    "--untie-embeddings-and-output-weights --scmoe-shortcut-position pos2",
    "gpt": SHARED + PAIRS + "--add-qkv-bias --scmoe-shortcut-position pos3 --scmoe-combine cg2 "
    "--scmoe-post-norm",
    "latent": LLAMA
    + SHARED
    + LATENT
    + "--untie-embeddings-and-output-weights --bf16 --moe-grouped-gemm "
    "--scmoe-shortcut-position pos1 --scmoe-shortcut-norm shared --scmoe-combine add "
    "--scmoe-num-zero-experts 1 --scmoe-num-constant-experts 2 --scmoe-router heterogeneous "
    "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 "
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias",
    "two gates": LLAMA + PAIRS + "--scmoe-shortcut-position pos2 --scmoe-dual-gating separate "
    "--moe-router-topk 1 --moe-router-score-function sigmoid --moe-router-enable-expert-bias",
    "gates of two layers": LLAMA + "--scmoe-combine add --scmoe-router heterogeneous "
    "--scmoe-num-copy-experts 1 --scmoe-gating-residual --scmoe-gate-layers 2 --scmoe-renormalise "
    "--scmoe-input-scale 2.0",
}
LAYOUTS = {
    "grouped query": "--expert-model-parallel-size 2",
    "gpt": "--pipeline-model-parallel-size 2",
    "latent": "--tensor-model-parallel-size 2 --sequence-parallel",
    "two gates": "--expert-model-parallel-size 2",
    "gates of two layers": "--expert-model-parallel-size 2",
}


def train(data: Path, folder: Path, model: str, layout: str, *options: str) -> Any:
    """Two ranks."""
    command = shlex.split(RUN + MODELS[model]) + shlex.split(layout)
    command += ["--data-path", str(data), "--split", "100,0,0"]
    command += ["--data-cache-path", str(data.parent / "cache")]
    return launch_forked([*command, *options], 2, folder)


@pytest.fixture(scope="module")
def trained(data_prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoints of a model, trained when first asked for."""
    made: dict[str, Path] = {}

    def get(model: str) -> Path:
        if model not in made:
            folder = tmp_path_factory.mktemp("trained")
            save = ["--save", str(folder / "checkpoints")]
            succeeded(train(data_prefix, folder, model, LAYOUTS[model], *save))
            made[model] = folder / "checkpoints"
        return made[model]

    return get


@pytest.fixture(scope="module")
def exported(trained: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "hf"
    export.export(trained("grouped query"), folder, shard_bytes=100_000)
    return folder


@pytest.fixture
def directory(exported: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(exported, tmp_path / "hf"))


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line of a program that ends with exit code 2 and nothing else."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        main(list(argv))
    assert leaving.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.partition("error: ")[2]


# unit_tests/test_huggingface_round_trip.py has the others too, on one rank.
SEEN_ELSEWHERE = ("two gates", "gates of two layers")


@pytest.mark.parametrize(
    "model",
    [pytest.param(m, marks=[pytest.mark.slow] * (m in SEEN_ELSEWHERE)) for m in MODELS],
)
def test_every_tensor_comes_back(
    model: str, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    """Difference 0, under the same keys, with the empty states that the host asks for."""
    said: list[str] = []
    counts = export.export(trained(model), tmp_path / "hf", say=said.append)
    load.load(tmp_path / "hf", tmp_path / "back")
    there = export.open_checkpoint(trained(model))
    back = export.open_checkpoint(tmp_path / "back")
    for (tensor, place), (_, other) in zip(
        export.locate(there)[0], export.locate(back)[0], strict=True
    ):
        here = there.reader.read(place)
        assert place == other, tensor.megatron
        assert here.dtype == back.reader.dtype(other)
        torch.testing.assert_close(back.reader.read(other), here, rtol=0, atol=0)
    states = {key for key in there.reader.objects if "_extra_state" in key}
    assert {key for key in back.reader.objects if "_extra_state" in key} == states
    assert back.config == there.config
    models = [side.record["model"] for side in (there, back)]
    assert {n: models[0][n] for n in SCMOE} == {n: models[1][n] for n in SCMOE}
    experts = counts.experts()
    assert len(experts) == len(set(experts.values())) == 4 * len(there.config["moe_layers"])
    assert f"{len(experts)} routed experts, {len(experts)} of them different" in said[-1]


def test_heads_and_halves_lie_as_megatron_has_them(
    exported: Path, trained: Callable[[str], Path]
) -> None:
    """By hand: queries of a key-value head, its key, its value; gate over up; no padding."""
    source = export.open_checkpoint(trained("grouped query"))

    def there(name: str) -> torch.Tensor:
        return source.reader.read(source.reader.place(name))

    weights: dict[str, torch.Tensor] = {}
    for file in exported.glob("model*.safetensors"):
        weights |= load_file(file)
    qkv = there("decoder.layers.0.self_attention.linear_qkv.weight").view(2, 4, 8, 32)
    attention = "model.layers.0.self_attn"
    assert torch.equal(weights[f"{attention}.q_proj.weight"], qkv[:, :2].reshape(32, 32))
    assert torch.equal(weights[f"{attention}.k_proj.weight"], qkv[:, 2].reshape(16, 32))
    assert torch.equal(weights[f"{attention}.v_proj.weight"], qkv[:, 3].reshape(16, 32))
    fc1 = there("decoder.layers.3.mlp.experts.experts.2.linear_fc1.weight")
    assert torch.equal(weights["model.layers.3.mlp.experts.2.gate_proj.weight"], fc1[:32])
    assert torch.equal(weights["model.layers.3.mlp.experts.2.up_proj.weight"], fc1[32:])
    assert torch.equal(weights["lm_head.weight"], there("output_layer.weight")[:61])


def test_the_library_reads_what_was_written(exported: Path) -> None:
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    found: dict[str, str] = {}
    for name in files:
        with safe_open(exported / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= dict.fromkeys(file.keys(), name)
    assert found == index["weight_map"]
    sizes = [(exported / name).stat().st_size for name in files]
    assert index["metadata"]["total_size"] < sum(sizes) < index["metadata"]["total_size"] + 50_000


def test_dtype_leaves_the_router_alone(trained: Callable[[str], Path], tmp_path: Path) -> None:
    export.export(trained("grouped query"), tmp_path / "hf", dtype="bf16")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    kinds = {name.split(".mlp.")[-1]: values.dtype for name, values in weights.items()}
    assert kinds.pop("gate.weight") == torch.float32
    assert set(kinds.values()) == {torch.bfloat16}
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_imported_checkpoint_trains_as_the_one_it_came_from(
    exported: Path, trained: Callable[[str], Path], data_prefix: Path, tmp_path: Path
) -> None:
    """At another layout, to the last digit of the log."""
    load.load(exported, tmp_path / "back")
    runs = [
        succeeded(
            train(
                data_prefix,
                tmp_path / str(number),
                "grouped query",
                "--tensor-model-parallel-size 2 --sequence-parallel",
                *("--load", str(folder), "--finetune"),
            )
        )
        for number, folder in enumerate((trained("grouped query"), tmp_path / "back"))
    ]
    losses = [{step: line["lm loss"] for step, line in run.log.items()} for run in runs]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    assert "0 new, as initialised: none" in runs[1].stdout


def test_padding_of_others_is_the_mean_row(directory: Path, tmp_path: Path) -> None:
    """transformers' save_pretrained leaves our file of padding behind."""
    (directory / "padding.safetensors").unlink()
    load.load(directory, tmp_path / "back")
    source = export.open_checkpoint(tmp_path / "back")
    rows = source.reader.read(source.reader.place("output_layer.weight"))
    assert rows.shape[0] == 64
    torch.testing.assert_close(rows[61:], rows[:61].mean(0, keepdim=True).expand(3, -1))


def test_verify_finds_one_changed_number(
    directory: Path, trained: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    both = ["--load", str(trained("grouped query")), "--input", str(directory)]
    assert verify.compare_tensors(Path(both[1]), directory) is None
    path = next(
        file
        for file in directory.glob("model-*.safetensors")
        if "model.layers.3.mlp.experts.1.up_proj.weight" in load_file(file)
    )
    weights = load_file(path)
    weights["model.layers.3.mlp.experts.1.up_proj.weight"][3, 4] += 0.5
    save_file(weights, path)
    capsys.readouterr()
    assert main(["verify", *both]) == 1
    line = capsys.readouterr().err
    assert "model.layers.3.mlp.experts.1.up_proj.weight differs by up to 0.5" in line


def test_inspect_says_what_both_are(
    exported: Path, trained: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    facts = []
    for path in (exported, trained("grouped query")):
        assert main(["inspect", str(path)]) == 0
        facts.append(capsys.readouterr().out.splitlines()[1:])
    assert facts[0] == facts[1]
    assert "  shortcut pos2, own norm, combine cg1" in facts[0]


def _lose_shard(folder: Path) -> str:
    path = folder / "model-00002-of-00003.safetensors"
    path.unlink()
    return f"{path} is missing"


def _cut_shard(folder: Path) -> str:
    path = folder / "model-00001-of-00003.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    return f"{path} is cut off or no safetensors file"


def _change_config(**changed: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changed}))

    return change


def _other_architecture(folder: Path) -> str:
    _change_config(architectures=["LongcatNextForCausalLM"])(folder)
    return "LongcatNextForCausalLM cannot be imported: its linear attention layers (KDA)"


def _unknown_architecture(folder: Path) -> str:
    _change_config(architectures=["LlamaForCausalLM"])(folder)
    return "LlamaForCausalLM cannot be imported: it is none of LongcatFlash"


def _other_vocabulary(folder: Path) -> str:
    _change_config(vocab_size=60)(folder)
    return "model.embed_tokens.weight is [61, 32]"


def _more_experts(folder: Path) -> str:
    _change_config(num_experts=5)(folder)
    return "is [4, 32]"


def _unknown_name(folder: Path) -> str:
    path = folder / "model-00003-of-00003.safetensors"
    weights = load_file(path)
    weights["model.layers.3.self_attn.sinks"] = torch.ones(4)
    save_file(weights, path)
    return "has 1 tensors that the model of its config.json does not have, the first is " + (
        "model.layers.3.self_attn.sinks"
    )


def _pickle(folder: Path) -> str:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(print))
    return f"{folder / 'pytorch_model.bin'} is a pickle"


def _no_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "has no config.json"


def _field_missing(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    del config["num_experts"]
    (folder / "config.json").write_text(json.dumps(config))
    return "config.json lacks num_experts"


@pytest.mark.parametrize(
    "damage",
    [
        _lose_shard,
        _cut_shard,
        _other_architecture,
        _unknown_architecture,
        _other_vocabulary,
        _more_experts,
        _unknown_name,
        _pickle,
        _no_config,
        _field_missing,
    ],
)
def test_import_refuses_in_one_line_and_leaves_nothing(
    damage: Callable[[Path], str],
    directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wanted = damage(directory)
    save = tmp_path / "back"
    assert wanted in refused(capsys, "import", "--input", str(directory), "--save", str(save))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.fixture
def checkpoints(trained: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(trained("grouped query"), tmp_path / "checkpoints"))


def _no_record(folder: Path) -> str:
    (folder / "iter_0000002.json").unlink()
    return "iter_0000002.json is missing, which says what the model is"


def _other_model(folder: Path) -> str:
    path = folder / "iter_0000002.json"
    record = json.loads(path.read_text())
    record["model"]["scmoe_combine"] = "cg2"
    path.write_text(json.dumps(record))
    return "lacks 2 tensors of the model of its record, the first is decoder.layers.1.mlp.combine"


def _less_norms(folder: Path) -> str:
    path = folder / "iter_0000002.json"
    record = json.loads(path.read_text())
    record["model"]["qk_layernorm"] = False
    path.write_text(json.dumps(record))
    return "has 8 tensors that the model of its record does not have, the first is decoder.layers.0"


def _no_counterpart(folder: Path) -> str:
    path = folder / "iter_0000002.json"
    record = json.loads(path.read_text())
    record["model"] |= {"window_size": [8, 0], "use_mup": True}
    path.write_text(json.dumps(record))
    return "has no form in Hugging Face's: --window-size [8, 0], --use-mup True"


def _corrupt(folder: Path) -> str:
    path = max((folder / "iter_0000002").glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(path.read_bytes())
    for begin in range(0, len(content), 512):  # every archive's header and pickle
        content[begin : begin + 64] = bytes(len(content[begin : begin + 64]))
    path.write_bytes(content)
    return ".distcp is corrupt (in "


@pytest.mark.parametrize(
    "damage", [_no_record, _other_model, _less_norms, _no_counterpart, _corrupt]
)
def test_export_refuses_in_one_line_and_leaves_nothing(
    damage: Callable[[Path], str],
    checkpoints: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wanted = damage(checkpoints)
    output = tmp_path / "hf"
    line = refused(capsys, "export", "--load", str(checkpoints), "--output", str(output))
    assert wanted in line
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_nothing_whole_is_replaced(
    directory: Path, trained: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    load_ = str(trained("grouped query"))
    line = refused(capsys, "export", "--load", load_, "--output", str(directory))
    assert line.endswith("is there already: use another folder, or remove it")


def export_and_die(load: Path, output: Path) -> None:
    """In a process of its own, when all tensors are written."""

    def die(writer: safetensors_files.SafetensorsWriter) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    safetensors_files.SafetensorsWriter.close = die  # type: ignore[method-assign]
    export.export(load, output)


def test_a_killed_export_leaves_nothing_that_looks_finished(
    trained: Callable[[str], Path], tmp_path: Path
) -> None:
    context = multiprocessing.get_context("forkserver")
    places = (trained("grouped query"), tmp_path / "hf")
    process = context.Process(target=export_and_die, args=places)
    process.start()
    process.join(PROCESS_S)
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".hf.partial"]
    export.export(*places)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_what_is_no_longcat_layer_is_refused_with_what_differs(
    trained: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = ["--load", str(trained("grouped query")), "--output", str(tmp_path / "hf")]
    line = refused(capsys, "export", *both, "--target", "longcat_flash")
    assert line.startswith("this model is no LongCat-Flash layer: shortcut_norm own, combine cg1")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("forked_logits")
def test_both_models_give_the_same_logits(
    exported: Path, trained: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Megatron's over two ranks; in bf16 nearly, which is said and decides nothing."""
    pytest.importorskip("transformers")
    both = ["--load", str(trained("grouped query")), "--input", str(exported)]
    layout = ["--ranks", "2", "--expert-model-parallel-size", "2"]
    assert main(["verify", *both, *layout]) == 0
    _, exact, rounded = capsys.readouterr().out.splitlines()
    assert "32 places, in fp32: " in exact and "another token at 0;" in exact
    assert "32 places, in bf16: " in rounded
    found = [float(re.findall(r"difference ([^,]+),", line)[0]) for line in (exact, rounded)]
    assert found[0] < verify.LARGEST_DIFFERENCE < found[1] < 0.2


@pytest.mark.usefixtures("forked_logits")
def test_a_layout_of_every_kind_gives_the_same_logits(
    exported: Path, trained: Callable[[str], Path]
) -> None:
    pytest.importorskip("transformers")
    layout = shlex.split(
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
        "--expert-model-parallel-size 2 --expert-tensor-parallel-size 1"
    )
    found = verify.compare_logits(trained("grouped query"), exported, ranks=4, options=layout)
    assert found.same and found.places == 32, found.text()


@pytest.mark.slow
@pytest.mark.usefixtures("forked_logits")
@pytest.mark.parametrize(
    "layout", ["--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"]
)
def test_a_layout_of_one_kind_gives_the_same_logits(
    layout: str, exported: Path, trained: Callable[[str], Path]
) -> None:
    pytest.importorskip("transformers")
    found = verify.compare_logits(
        trained("grouped query"), exported, ranks=2, options=layout.split()
    )
    assert found.same and found.places == 32, found.text()


def counting_tokenizer(folder: Path) -> None:
    """Add a tokenizer whose ids are the host's NullTokenizer's: a number is its own token."""
    words = tokenizers.models.WordLevel({str(n): n for n in range(61)}, unk_token="60")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.usefixtures("forked_logits")
def test_a_fine_tuned_model_comes_back_and_pretraining_goes_on(
    directory: Path, data_prefix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """examples/huggingface: out, text, adapters, all weights, in; the loss goes on where it was."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    counting_tokenizer(directory)
    write = transformers.pipeline("text-generation", str(directory), trust_remote_code=True)
    written = write("3 4 5", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert written.startswith("3 4 5") and len(written.split()) == 7
    # As the documents of the corpus.
    rows = [" ".join(str((start + n) % 60) for n in range(100)) for start in range(0, 60, 4)]
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    size = ["--sequence-length", "32", "--batch-size", "15", "--input", str(text)]
    steps: dict[str, list[float]] = {}
    for name, source, options in (
        ("adapters", directory, ["--lora", "--lr", "3e-2", "--steps", "6"]),
        ("tuned", tmp_path / "adapters", ["--lr", "2e-2", "--steps", "14"]),
    ):
        places = ["--model", str(source), "--output", str(tmp_path / name)]
        capsys.readouterr()
        assert finetune.main([*places, *size, *options]) == 0
        said = capsys.readouterr().out
        assert "Do you wish" not in said  # a job has nobody who answers
        losses = re.findall(r"loss ([\d.]+) -> ([\d.]+) in", said)[0]
        steps[name] = [float(loss) for loss in losses]
    assert steps["adapters"][1] < steps["adapters"][0]
    assert steps["tuned"][0] == pytest.approx(steps["adapters"][1], rel=0.15)
    assert steps["tuned"][1] < 0.8 * steps["adapters"][0]
    load.load(tmp_path / "tuned", tmp_path / "checkpoints")
    # Numbers are compared, and no text: the record's tokenizer need not be there.
    (tmp_path / "checkpoints" / tokenizer.FOLDER).rename(tmp_path / "elsewhere")
    found = verify.compare_logits(tmp_path / "checkpoints", tmp_path / "tuned")
    assert found.same, found.text()
    run = succeeded(
        train(
            data_prefix,
            tmp_path / "run",
            "grouped query",
            LAYOUTS["grouped query"],
            *("--load", str(tmp_path / "checkpoints"), "--finetune"),
        )
    )
    assert run.log[1]["lm loss"] == pytest.approx(steps["tuned"][1], rel=0.25)

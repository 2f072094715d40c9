"""What directories have beside a model's tensors, and tensors that a type cannot hold."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_scmoe.huggingface import export, load, verify
from tests.unit_tests.test_huggingface_fields import SIZES, come_in, write_directory

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def change(folder: Path, **tensors: torch.Tensor) -> None:
    """Add tensors to a directory, or put them in place of its own."""
    path = folder / "model.safetensors"
    weights = {name.replace("__", "."): values for name, values in tensors.items()}
    save_file(load_file(path) | weights, path)


def add_tokenizer(folder: Path, size: int) -> None:
    words = models.WordLevel({f"w{n}": n for n in range(size)}, unk_token="w0")
    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w1"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_a_tied_output_layer_may_be_written_too(tmp_path: Path) -> None:
    write_directory(tmp_path, tie_word_embeddings=True)
    change(tmp_path, lm_head__weight=torch.zeros(7, 8))
    come_in(tmp_path)
    change(tmp_path, lm_head__weight=torch.ones(7, 8))
    with pytest.raises(ValueError, match=f"its {HEAD} is another tensor than {EMBEDDING}: set"):
        come_in(tmp_path)


def test_angles_in_older_files_are_left_out(tmp_path: Path) -> None:
    write_directory(tmp_path)
    change(tmp_path, model__layers__1__self_attn__rotary_emb__inv_freq=torch.ones(1))
    come_in(tmp_path)


def test_a_tokenizer_of_more_tokens_is_refused(tmp_path: Path) -> None:
    add_tokenizer(write_directory(tmp_path), SIZES["vocab_size"])
    come_in(tmp_path)
    add_tokenizer(tmp_path, SIZES["vocab_size"] + 1)
    with pytest.raises(ValueError, match=r"has 8 tokens, and vocab_size of .*config.json is 7: "):
        come_in(tmp_path)


def test_what_fp16_cannot_hold_is_refused(tmp_path: Path) -> None:
    """What is infinite already is no matter of the type."""
    folder = tmp_path / "hf"
    folder.mkdir()
    write_directory(folder)
    change(folder, model__norm__weight=torch.tensor([65504.0, float("inf"), *[0.0] * 6]))
    load.load(folder, tmp_path / "there", dtype="fp16")
    change(folder, model__norm__weight=torch.tensor([7e4, *[0.0] * 7]))
    with pytest.raises(ValueError, match=r"final_layernorm.weight has numbers beyond 65504"):
        load.load(folder, tmp_path / "refused", dtype="fp16")
    load.load(folder, tmp_path / "whole")
    with pytest.raises(ValueError, match=r"model.norm.weight has numbers beyond 65504.*: use bf16"):
        export.export(tmp_path / "whole", tmp_path / "refused", dtype="fp16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "there", "whole"]


def test_an_interrupted_import_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor what was there of one that was killed."""
    (tmp_path / "hf").mkdir()
    write_directory(tmp_path / "hf")
    (tmp_path / ".there.partial" / "iter_0000001").mkdir(parents=True)

    def interrupt(*_: object) -> None:
        assert (tmp_path / ".there.partial" / "iter_0000003").is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr(load.TorchDistWriter, "close", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load.load(tmp_path / "hf", tmp_path / "there")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_tokenizer_that_lies_elsewhere(tmp_path: Path) -> None:
    """It says how many rows are the vocabulary's, and which tokens are special."""
    folder = tmp_path / "hf"
    folder.mkdir()
    add_tokenizer(write_directory(folder), SIZES["vocab_size"])
    load.load(folder, tmp_path / "there")
    record = json.loads((tmp_path / "there" / "iter_0000003.json").read_text())
    record["tokenizer"]["vocab_size"] = None  # as a run writes it
    (tmp_path / "there" / "iter_0000003.json").write_text(json.dumps(record))
    (tmp_path / "there" / "tokenizer").rename(tmp_path / "elsewhere")
    said: list[str] = []
    export.export(tmp_path / "there", tmp_path / "without", say=said.append)
    assert any(line.endswith("is no folder here; give --tokenizer DIR") for line in said)
    export.export(tmp_path / "there", tmp_path / "with", tokenizer_folder=tmp_path / "elsewhere")
    configs = [
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("without", "with")
    ]
    assert [config["vocab_size"] for config in configs] == [16, 7]
    assert [config["eos_token_id"] for config in configs] == [None, 1]
    assert verify.compare_tensors(tmp_path / "there", tmp_path / "with") is None
    add_tokenizer(tmp_path / "elsewhere", 17)
    for place, said_of_it in (
        ("elsewhere", "has 17 tokens, and the model's"),
        ("none", "has no tok"),
    ):
        with pytest.raises(ValueError, match=said_of_it):
            export.export(
                tmp_path / "there", tmp_path / "refused", tokenizer_folder=tmp_path / place
            )
    assert not (tmp_path / "refused").exists()


def test_a_text_is_read_in_samples_as_long_as_the_model_reads(tmp_path: Path) -> None:
    add_tokenizer(write_directory(tmp_path), 7)
    text = tmp_path / "text"
    text.write_text("w1 w2 " * 20)
    config = {"max_position_embeddings": 16, "vocab_size": 7}
    found = verify.sample(tmp_path, config, text)
    assert found.tolist() == [[1, 2] * 8] * 2
    text.write_text("w1 w2 w3")
    assert verify.sample(tmp_path, config, text).tolist() == [[1, 2, 3]]
    text.write_text("w1")
    with pytest.raises(ValueError, match="text has no text"):
        verify.sample(tmp_path, config, text)


@pytest.mark.parametrize(
    ("name", "step", "said"),
    [
        ("none", None, "none is no folder"),
        ("there/iter_0000003", None, r"is one iteration: use the folder that it lies in, .*/there"),
        ("there", 4, r"there has no iteration 4 \(there: 3\)"),
        (
            "hf",
            None,
            r"latest_checkpointed_iteration.txt: say which with --ckpt-step \(there: none",
        ),
    ],
)
def test_what_is_no_folder_of_checkpoints(
    name: str, step: int | None, said: str, tmp_path: Path
) -> None:
    (tmp_path / "hf").mkdir()
    load.load(write_directory(tmp_path / "hf"), tmp_path / "there")
    with pytest.raises(ValueError, match=said):
        export.open_checkpoint(tmp_path / name, step)

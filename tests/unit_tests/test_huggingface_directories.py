"""What directories have beside a model's tensors, and tensors that a type cannot hold."""

import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_scmoe.huggingface import export, load, progress, tokenizer, verify
from tests.limits import PROCESS_S
from tests.unit_tests.test_huggingface_fields import SIZES, come_in, write_directory

REPOSITORY = Path(__file__).parents[2]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def change(folder: Path, **tensors: torch.Tensor) -> None:
    """Add tensors to a directory, or put them in place of its own."""
    path = folder / "model.safetensors"
    weights = {name.replace("__", "."): values for name, values in tensors.items()}
    save_file(load_file(path) | weights, path)


def add_tokenizer(folder: Path, size: int) -> None:
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(size)}, unk_token="w0"))
    folder.mkdir(exist_ok=True)
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
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


def die(*_: object) -> None:
    """As a job that runs out of memory or time."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_between_tensors() -> None:
    """A part of the tensors is written."""
    write = load.TorchDistWriter.write

    def write_and_die(writer: load.TorchDistWriter, name: str, values: torch.Tensor) -> None:
        write(writer, name, values)
        if name.endswith("linear_fc1.weight"):
            die()

    load.TorchDistWriter.write = write_and_die  # type: ignore[method-assign]


def die_without_metadata() -> None:
    """All tensors are written."""
    load.TorchDistWriter.close = die  # type: ignore[method-assign]


def die_without_tracker() -> None:
    """The iteration is whole, and has its record."""
    load.contents.write_tracker = die


def die_before_the_name() -> None:
    """All is written."""
    os.rename = die


def load_and_die(where: Callable[[], None], folder: Path, save: Path) -> None:
    """In a process of its own."""
    where()
    load.load(folder, save)


@pytest.mark.parametrize(
    "where", [die_between_tensors, die_without_metadata, die_without_tracker, die_before_the_name]
)
def test_a_killed_import_leaves_nothing_that_looks_finished(
    where: Callable[[], None], tmp_path: Path
) -> None:
    """Under the name that was asked for there is nothing; the next import has it."""
    (tmp_path / "hf").mkdir()
    write_directory(tmp_path / "hf")
    (tmp_path / "there").mkdir()  # as a job script makes it
    context = multiprocessing.get_context("forkserver")
    places = (tmp_path / "hf", tmp_path / "there")
    process = context.Process(target=load_and_die, args=(where, *places))
    process.start()
    process.join(PROCESS_S)
    assert process.exitcode == -signal.SIGKILL
    left = {path.name for path in tmp_path.iterdir()} - {"there"}
    assert left == {"hf", ".there.partial"}
    assert not places[1].exists() or not list(places[1].iterdir())
    load.load(*places)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "there"}
    assert verify.compare_tensors(places[1], places[0]) is None


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
    assert any(line.endswith("has no files here; give --tokenizer DIR") for line in said)
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


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_what_lies_beside_the_weights_comes_back(has_tokenizer: bool, tmp_path: Path) -> None:
    """Byte for byte, and by a folder of checkpoints that was moved."""
    folder = tmp_path / "hf"
    folder.mkdir()
    write_directory(folder)
    if has_tokenizer:
        add_tokenizer(folder, SIZES["vocab_size"])
    texts = {
        "generation_config.json": '{"temperature": 0.6, "eos_token_id": [1, 2]}',
        "chat_template.jinja": "{{ messages }}",
        "additional_chat_templates/tools.jinja": "{{ tools }}",
        "special_tokens_map.json": "{}",
        "spiece.model": "pieces",
        "tokenization_own.py": "raise RuntimeError",
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "README.md").write_text("About the model that it was.")
    load.load(folder, tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "there")
    export.export(tmp_path / "there", tmp_path / "again")
    there, again = (
        {path.relative_to(side): path.read_bytes() for path in tokenizer.found(side)}
        for side in (folder, tmp_path / "again")
    )
    assert there == again and len(there) == len(texts) + 2 * has_tokenizer
    assert not (tmp_path / "again" / "README.md").exists()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("generation_config.json", "{", "is no JSON"),
        ("tokenizer_config.json", "[]", "holds a list and no object"),
        ("tokenizer.json", "[]", "holds a list and no object"),
        ("tokenizer.json", "{}", r"is no tokenizer \(it lacks model\)"),
        ("tokenizer.json", '{"model": {"vocab": 3}}', "is no tokenizer"),
        ("tokenizer.json", '{"model": {"vocab": [3]}}', "is no tokenizer"),
        ("tokenizer.json", '{"model": {"vocab": {"a": "b"}}}', "is no tokenizer"),
        ("tokenizer.json", '{"model": {"vocab": {}}, "added_tokens": [3]}', "is no tokenizer"),
    ],
)
def test_a_damaged_file_beside_the_weights_is_refused(
    name: str, text: str, said: str, tmp_path: Path
) -> None:
    write_directory(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path / name))}.*{said}"):
        come_in(tmp_path)


WORDS = {"a": 0, "b": 1, "ab": 2, "[UNK]": 3}


@pytest.mark.parametrize(
    "model",
    [
        models.BPE(WORDS, [("a", "b")]),
        models.WordPiece(WORDS, unk_token="[UNK]"),
        models.WordLevel(WORDS, unk_token="[UNK]"),
        models.Unigram([(word, -1.0) for word in WORDS], unk_id=3),
    ],
    ids=lambda model: type(model).__name__,
)
def test_tokens_are_counted_as_the_library_does(model: Any, tmp_path: Path) -> None:
    words = Tokenizer(model)
    words.add_special_tokens(["[UNK]", "[EOS]"])
    words.add_tokens(["a b"])
    words.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer.check(tmp_path) == words.get_vocab()
    assert tokenizer.size_of(tmp_path) == words.get_vocab_size() == 6


ALONE = """
import sys
from importlib.machinery import PathFinder

class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if path is None and name not in {*sys.stdlib_module_names, *ALLOWED}:
            return None
        return PathFinder.find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *args, **kwargs):
        return iter(())

ALLOWED = sys.argv.pop(1).split()
standard = [finder for finder in sys.meta_path if finder.__module__.startswith("_frozen_importlib")]
sys.meta_path[:] = [Installed if finder is PathFinder else finder for finder in standard]
from megatron_scmoe.commands.convert_checkpoint import main

folder, there, again = sys.argv[1:]
assert main(["import", "--input", folder, "--save", there]) == 0
assert main(["export", "--load", there, "--output", again]) == 0
assert main(["inspect", there]) == main(["inspect", again, "--tensors"]) == 0
main(["verify", "--load", there, "--input", again])
"""
TORCH_NEEDS = (
    "filelock fsspec functorch jinja2 markupsafe mpmath networkx setuptools sympy torch torchgen "
    "triton typing_extensions"
)


def test_a_conversion_needs_torch_and_safetensors_alone(tmp_path: Path) -> None:
    """Everything else is as if it were not installed: Megatron, transformers, tokenizers, tqdm."""
    (tmp_path / "hf").mkdir()
    add_tokenizer(write_directory(tmp_path / "hf"), SIZES["vocab_size"])
    places = [str(tmp_path / name) for name in ("hf", "there", "again")]
    allowed = f"megatron_scmoe numpy safetensors {TORCH_NEEDS}"
    run = subprocess.run(
        [sys.executable, "-c", ALONE, allowed, *places],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=PROCESS_S,
    )
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1, run.stderr
    assert run.stderr.endswith(
        "error: transformers is not installed: pip install 'megatron-scmoe[hf]'\n"
    )
    assert "the logits were not compared: transformers is not installed" in run.stdout
    assert run.stdout.endswith("iteration 3, bit for bit\n")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("hf", "again")]
    assert weights[0].keys() == weights[1].keys()


class Terminal(io.StringIO):
    """Standard error of somebody who looks."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 10.05, 12.0, 13.0])
    monkeypatch.setattr(progress, "monotonic", lambda: next(times))
    for stream, shown in (
        (Terminal(), "\r\033[Kexport 25%, 6 s left\r\033[Kexport 100%, 0 s left\r\033[K"),
        (io.StringIO(), ""),
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress.progress(400, "export") as advance:
            advance(40)  # too early for a line
            advance(60)
            advance(300)
        assert stream.getvalue() == shown
        times = iter([10.0, 10.05, 12.0, 13.0])


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

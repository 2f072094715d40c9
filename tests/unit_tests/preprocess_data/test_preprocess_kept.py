"""Tokenizers that are kept between runs: the same bytes, or not used."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TOOL, documents, write_lines

from megatron_scmoe.commands.preprocess import kept_tokenizer
from megatron_scmoe.commands.preprocess.host_tokenizer import fingerprint
from megatron_scmoe.commands.preprocess_data import parse_arguments


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "megatron_scmoe" / "tokenizers"


@pytest.mark.parametrize("name", ["hf_bos", "sp"])
def test_a_kept_tokenizer_gives_the_same_bytes(tool, tmp_path, tokenizers, own_cache, name):
    corpus = write_lines(tmp_path / "c.jsonl", documents(60))
    run = ["--input", corpus, "--append-eod", "--overwrite", *tokenizers[name]]
    for number in range(2):
        assert tool(*run, "--output-prefix", tmp_path / f"o{number}").code == 0
        assert len(list(own_cache.iterdir())) == 1
    for suffix in (".bin", ".idx", ".json"):
        first, second = (tmp_path / f"o{number}_text_document{suffix}" for number in range(2))
        assert first.read_bytes() == second.read_bytes()


def test_the_second_run_imports_neither_torch_nor_megatron(tool, tmp_path, tokenizers, own_cache):
    corpus = write_lines(tmp_path / "c.jsonl", documents(3))
    run = ["--input", str(corpus), "--output-prefix", str(tmp_path / "o"), *tokenizers["hf"]]
    assert tool(*run).code == 0
    code = (
        f"import runpy, sys; sys.argv = {['x', *run, '--overwrite']!r}\n"
        f"try: runpy.run_path({str(TOOL)!r}, run_name='__main__')\n"
        "except SystemExit as end: print(end.code, {'torch', 'megatron', 'transformers'}"
        " & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.stdout == "0 set()\n", done.stderr


def options(folder: Path, *more: str):
    hugging_face = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder)]
    return parse_arguments(["--input", "c.jsonl", "--output-prefix", "o", *hugging_face, *more])


def test_a_changed_tokenizer_is_another(tmp_path, tokenizers, own_cache):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for file in Path(tokenizers["hf"][-1]).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    names = [kept_tokenizer._path(options(folder), fingerprint(options(folder)))]
    assert names[0].parent == own_cache
    more = ["--tokenizer-special-tokens", "<x>"]
    names.append(kept_tokenizer._path(options(folder, *more), fingerprint(options(folder))))
    for name, content in (("config.json", '{"model_type": "gpt2"}'), ("merges.txt", "a b")):
        (folder / name).write_text(content)
        names.append(kept_tokenizer._path(options(folder), fingerprint(options(folder))))
    assert len(set(names)) == 4


def test_ids_that_are_not_the_backends_alone_are_not_kept(tool, tmp_path, tokenizers, own_cache):
    corpus = write_lines(tmp_path / "c.jsonl", documents(3))
    run = ["--input", corpus, "--output-prefix", tmp_path / "o", *tokenizers["hf_bos"]]
    assert tool(*run, "--tokenizer-hf-no-include-special-tokens").code == 0
    assert not own_cache.exists()


def test_damage_is_as_if_nothing_was_kept(tool, tmp_path, tokenizers, own_cache):
    corpus = write_lines(tmp_path / "c.jsonl", documents(3))
    run = ["--input", corpus, "--output-prefix", tmp_path / "o", *tokenizers["hf"]]
    assert tool(*run).code == 0
    args = options(Path(tokenizers["hf"][-1]))
    assert kept_tokenizer.find(args, fingerprint(args)) is not None
    (kept,) = own_cache.iterdir()
    content = kept.read_text()
    swapped = json.loads(content)
    swapped["backend"] = swapped["backend"].replace('"Ġthe":', '"Ġtho":')
    assert swapped != json.loads(content)
    for damaged in ("", content[:-40], json.dumps(swapped), "[]", '{"sha256": 1}'):
        kept.write_text(damaged)
        assert kept_tokenizer.find(args, fingerprint(args)) is None


def test_a_folder_that_cannot_be_written_costs_nothing(tool, tmp_path, tokenizers, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    corpus = write_lines(tmp_path / "c.jsonl", documents(3))
    outcome = tool("--input", corpus, "--output-prefix", tmp_path / "o", *tokenizers["hf"])
    assert outcome.code == 0 and outcome.stderr.count("\n") == 1

"""How tokens are chosen, where prompts come from, what is written, what is refused."""

import io
import json
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_scmoe.commands import generate, generated_text
from megatron_scmoe.inference.generation import Continuation, Speed
from megatron_scmoe.inference.sampling import Sampler, Sampling

LOGITS = torch.tensor([[0.0, 3.0, 1.0, 2.0], [2.5, 0.0, 1.0, -1.0]])


class Letters:
    """A tokenizer: a byte a token, 0 ends a document."""

    vocab_size, eod = 256, 0

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode())

    def detokenize(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")


def test_filters() -> None:
    whole = LOGITS.softmax(-1)
    assert torch.equal(Sampling().distribution(LOGITS), whole)
    assert torch.equal(Sampling(top_k=9, top_p=1.0).distribution(LOGITS), whole)
    hot = (LOGITS / 2).softmax(-1)
    torch.testing.assert_close(Sampling(temperature=2.0).distribution(LOGITS), hot)
    two = Sampling(top_k=2).distribution(LOGITS)
    assert two[0].nonzero().flatten().tolist() == [1, 3]
    torch.testing.assert_close(two.sum(-1), torch.ones(2))
    # The first has 0.64 of the first row, 0.75 of the second: the token that reaches P stays.
    nucleus = Sampling(top_p=0.65).distribution(LOGITS)
    assert [row.count_nonzero().item() for row in nucleus] == [2, 1]
    both = Sampling(top_k=3, top_p=0.65).distribution(LOGITS)
    assert [row.nonzero().flatten().tolist() for row in both] == [[1], [0]]


def test_greedy_takes_the_likeliest_and_tells_its_probability() -> None:
    tokens, log_probs = Sampler(Sampling(greedy=True), [0, 1]).choose(LOGITS, [0, 1], [True, True])
    assert tokens.tolist() == [1, 0]
    torch.testing.assert_close(log_probs, LOGITS.log_softmax(-1).amax(-1))


def test_a_prompt_draws_the_same_alone_and_in_a_batch() -> None:
    def draws(numbers: list[int], rows: list[list[bool]]) -> list[list[int]]:
        sampler = Sampler(Sampling(seed=7), numbers)
        logits = torch.zeros(len(numbers), 50)
        drawn = [sampler.choose(logits, list(range(len(row))), row)[0].tolist() for row in rows]
        return [
            [tokens[i] for tokens, row in zip(drawn, rows, strict=True) if row[i]]
            for i in range(len(numbers))
        ]

    # The second begins two steps later, as behind a longer prompt.
    rows = [[True, False], [True, False], *[[True, True]] * 8]
    first, second = draws([3, 4], rows)
    assert draws([3], [[True]] * 10) == [first]
    assert draws([4], [[True]] * 8) == [second]
    assert first[:8] != second


def test_text_is_written_character_by_character(capsys: pytest.CaptureFixture[str]) -> None:
    writer = generated_text.TextWriter(Namespace(json=False), Letters(), ["a"])
    said = []
    for token in "é b".encode():
        writer.take(0, token)
        said.append(capsys.readouterr().out)
    assert said == ["a", "é", " ", "b"]
    # A document that breaks off inside a character.
    writer.take(0, 0xC3)
    writer.finish([Continuation([*"é b".encode(), 0xC3])])
    assert capsys.readouterr().out == "\N{REPLACEMENT CHARACTER}\n"


def test_several_texts_are_written_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    found = [Continuation([*b"cd"], [-1.0, -2.0]), Continuation()]
    writer = generated_text.TextWriter(Namespace(json=False), Letters(), ["ab", "e\nf"])
    writer.take(1, 5)
    writer.finish(found)
    assert capsys.readouterr().out == "--- 1\nabcd\n--- 2\ne\nf\n"
    generated_text.TextWriter(Namespace(json=True), Letters(), ["ab", "e"]).finish(found)
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["text"] == "cd" and first["log_probs"] == [-1.0, -2.0]
    assert second == {"prompt": "e", "text": "", "tokens": [], "log_probs": []}


def test_speed() -> None:
    assert generated_text.speed_line(Speed(12, 0.5, 30, 2.0)) == (
        "prefill 12 tokens, 24.0 tokens/s; decode 30 tokens, 15.0 tokens/s"
    )
    assert generated_text.speed_line(Speed()).count("0.0 tokens/s") == 2


def prompts(monkeypatch: pytest.MonkeyPatch, stdin: bytes | None = None, **args: Any) -> list[str]:
    source = SimpleNamespace(buffer=io.BytesIO(stdin or b""), isatty=lambda: stdin is None)
    monkeypatch.setattr(sys, "stdin", source)
    return generated_text.read_prompts(Namespace(**{"prompt": None, "prompt_file": None, **args}))


def test_prompts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text, objects = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("one\ntwo\n")
    objects.write_text('{"prompt": "one\\ntwo"}\n')
    assert prompts(monkeypatch, prompt=["a", "b"]) == ["a", "b"]
    assert prompts(monkeypatch, prompt_file=str(text)) == ["one", "two"]
    assert prompts(monkeypatch, prompt_file=str(objects)) == ["one\ntwo"]
    assert prompts(monkeypatch, b"x\ny") == prompts(monkeypatch, b"x\ny", prompt_file="-")
    assert generated_text.tokens_of(Letters(), "ab") == [97, 98]
    assert generated_text.tokens_of(Letters(), "") == [0]  # a new document


@pytest.mark.parametrize(
    ("stdin", "file", "line"),
    [
        (None, None, "A prompt is missing: add --prompt"),
        (b"", None, "Standard input is empty: write a prompt a line."),
        (b"\xff", None, "Standard input is no UTF-8 (byte 0)"),
        (None, "nowhere.txt", "--prompt-file nowhere.txt: "),
        (None, ("b.jsonl", "{}"), 'b.jsonl, line 1: write {"prompt": TEXT}'),
        (None, ("b.jsonl", '{"prompt": 1}'), "b.jsonl, line 1: the prompt is a int"),
        (None, ("b.txt", ""), "--prompt-file b.txt is empty: "),
    ],
)
def test_prompts_that_cannot_be_read(
    stdin: bytes | None,
    file: Any,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    if isinstance(file, tuple):
        file, content = file
        Path(file).write_text(content)
    with pytest.raises(ValueError) as refused:
        prompts(monkeypatch, stdin, prompt_file=file)
    assert str(refused.value).startswith(line) and "\n" not in str(refused.value)


def test_prompts_that_are_no_tokens() -> None:
    numbers = SimpleNamespace(tokenize=lambda text: [int(text)], vocab_size=8, eod=None)
    for text, line in (("a", "cannot read the prompt 'a'"), ("9", "has token 9"), ("", "is empty")):
        with pytest.raises(ValueError, match=line):
            generated_text.tokens_of(numbers, text)


@pytest.mark.parametrize(
    ("files", "options", "line"),
    [
        ({}, "", "--load FOLDER: there is no checkpoint of a training run."),
        ({"latest_checkpointed_iteration.txt": "release"}, "", "there is no checkpoint of a"),
        ({"latest_checkpointed_iteration.txt": "x"}, "", "choose one with --ckpt-step."),
        (
            {"latest_checkpointed_iteration.txt": "5"},
            "",
            "--load FOLDER: iteration 5 has no record, iter_0000005.json, that says what its model "
            "is: only checkpoints of this package have one.",
        ),
        ({"iter_0000007.json": "{"}, "--ckpt-step 7", "iter_0000007.json is no record of a"),
    ],
)
def test_folders_that_cannot_be_generated_from(
    files: dict[str, str],
    options: str,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line, no traceback, exit code 2, and nothing is written into the folder."""
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    # What the program sets is restored only where a test has set it before.
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    command = ["generate.py", "--load", str(tmp_path), "--prompt", "1", *options.split()]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as left:
        generate.main()
    said = capsys.readouterr()
    assert left.value.code == 2 and said.out == ""
    assert said.err.startswith("generate.py: error: ") and said.err.count("\n") == 1
    assert line.replace("FOLDER", str(tmp_path)) in said.err
    assert {path.name for path in tmp_path.iterdir()} == set(files)

"""tiktoken in a tokenizer's place: the same ids for every text, or not used at all."""

import functools
import io
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import EOD, write_lines
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import (
    SentencePieceProcessor,
    SentencePieceTrainer,
    sentencepiece_model_pb2,
)
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from megatron_scmoe.commands.preprocess import DataError, special_tokens
from megatron_scmoe.commands.preprocess.byte_level_bpe import (
    GPT2,
    LLAMA3,
    QWEN2,
    WORDS,
    ByteLevelBPE,
)
from megatron_scmoe.commands.preprocess.corpus import Batch
from megatron_scmoe.commands.preprocess.encoding import Encoder
from megatron_scmoe.commands.preprocess.engines import find_engine
from megatron_scmoe.commands.preprocess.proof import NotExactError, prove
from megatron_scmoe.commands.preprocess.sentencepiece_bpe import SentencePieceBPE, _words
from megatron_scmoe.commands.preprocess.special_tokens import finder

CORPUS = (
    "def encode(self, text: str) -> list[int]:\n        return [self.ids[word] for word in text]\n"
    "\nThe quick brown foxes' den isn't theirs; we'll see 1234567890 of them in 2026.\r\n\t\t"
    "Übergrößenträger naïve \u4f60\u597d\u4e16\u754c \u043f\u0440\u0438\u0432\u0435\u0442 !!"
)
# Without threads in the tokenizers' library, because one test forks.
pytestmark = pytest.mark.usefixtures("preloaded")

PLANES = st.characters(codec="utf-8")  # every code point but surrogates
SPACES = (" ", "  ", " " * 40, "\t", "\n", "\r\n", "\n \n", "\u00a0", "\u3000", "\x85", "\x1c")
WORD_LIKE = ("'s", "'LL", "'\u017f", "don't", " the", "self.ids", "ab" * 90, "x" * 300, "größe")
NUMBERS = ("1", "12", "123", "1234567", "\u0663", "\u00bd", "...", "!?\n", "=" * 50, "\0")
COMPOSED = ("e\u0301", "\u212b", "\U0001f468\u200d\U0001f469", "\uac00\u1100\u1161")
SPECIAL = ("<|endoftext|", EOD, "<s>")
PIECES = st.sampled_from((*SPACES, *WORD_LIKE, *NUMBERS, *COMPOSED, *SPECIAL))
TEXTS = st.lists(st.one_of(PIECES, PLANES, st.text(PLANES, max_size=8)), max_size=12).map("".join)


@functools.cache
def make(words: str, normalize: bool = False, bos: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=words == LLAMA3))
    if normalize:
        tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words == GPT2)
    split = pre_tokenizers.Split(Regex(words), "isolated")
    tokenizer.pre_tokenizer = (
        byte_level if words == GPT2 else pre_tokenizers.Sequence([split, byte_level])
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [CORPUS] * 3,
        trainers.BpeTrainer(
            vocab_size=450, special_tokens=[EOD], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.add_tokens([AddedToken("<s>", normalized=True)])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{EOD} $A {EOD}", special_tokens=[(EOD, 0)]
        )
    return tokenizer


def reference(tokenizer: Tokenizer):
    return lambda text: tokenizer.encode(text).ids


@functools.cache
def engine(words: str, normalize: bool = False, bos: bool = False) -> ByteLevelBPE:
    tokenizer = make(words, normalize, bos)
    return ByteLevelBPE(tokenizer, reference(tokenizer))


def changed(**parts: object) -> Tokenizer:
    """GPT-2's tokenizer with other parts in its tokenizer.json, those of the model too."""
    state = json.loads(make(GPT2).to_str())
    for name, part in parts.items():
        (state if name in state else state["model"])[name] = part
    return Tokenizer.from_str(json.dumps(state))


@settings(max_examples=300, deadline=None)
@given(text=TEXTS, words=st.sampled_from(list(WORDS)), normalize=st.booleans(), bos=st.booleans())
@example(text="\u017f'\u017f a'\u212a", words=LLAMA3, normalize=False, bos=False)
@example(text="e\u0301<s>\u212b", words=QWEN2, normalize=True, bos=True)
def test_the_same_ids(text: str, words: str, normalize: bool, bos: bool) -> None:
    ids = engine(words, normalize, bos).encode(text)
    if ids is None:
        assert EOD in text or "<s>" in text or "\U0010ffff" in text
    else:
        assert ids.tolist() == make(words, normalize, bos).encode(text).ids


@settings(max_examples=100, deadline=None)
@given(lines=st.lists(st.one_of(st.binary(max_size=30), TEXTS.map(lambda t: t.encode()))))
def test_whatever_the_bytes_of_a_line(lines: list[bytes]) -> None:
    """Invalid UTF-8 and half escapes are bad lines to both, and the documents are the same."""
    batch = Batch("c.jsonl", 1, [b'{"text": "' + line + b'"}\n' for line in lines], 0)
    tokenizer = Adapter(make(LLAMA3))
    slow = Encoder(tokenizer, ["text"], np.uint16)(batch)
    fast = Encoder(tokenizer, ["text"], np.uint16, engine=engine(LLAMA3), verify=1000)(batch)
    assert fast.bad_lines == slow.bad_lines
    for part in ("tokens", "lengths", "sequences"):
        assert np.array_equal(getattr(fast, part)["text"], getattr(slow, part)["text"])


class Adapter:
    """A backend with the one method of Megatron's tokenizers that encoding needs."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenize = reference(tokenizer)


@pytest.mark.parametrize("words", WORDS, ids=["gpt2", "llama3", "qwen2"])
def test_proof_on_the_stress_text(words: str) -> None:
    prove(engine(words), reference(make(words)), [CORPUS])


def test_the_proof_sees_one_wrong_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A word of the sample has a letter that is none to tiktoken."""
    from megatron_scmoe.commands.preprocess import byte_level_bpe

    exact = byte_level_bpe.ranges

    def without_sharp_s(name: str) -> list[tuple[int, int]]:
        cut = [part for a, b in exact(name) for part in ((a, min(b, 0xDE)), (max(a, 0xE0), b))]
        return [(a, b) for a, b in cut if a <= b]

    monkeypatch.setattr(byte_level_bpe, "ranges", without_sharp_s)
    tokenizer = make(LLAMA3)
    different = ByteLevelBPE(tokenizer, reference(tokenizer))
    with pytest.raises(NotExactError, match="differently"):
        prove(different, reference(tokenizer), [CORPUS])


@pytest.mark.parametrize("unit", [" ", "\n", "="])
def test_a_million_times_the_same(unit: str) -> None:
    """On white space tiktoken overflowed its stack while its expression looked ahead."""
    text = "x" + unit * 1_000_000 + "y"
    assert make(GPT2).decode(engine(GPT2).encode(text).tolist()) == text


def test_what_tiktoken_takes_for_special_is_text() -> None:
    text = f"a{special_tokens._SPECIAL} b"
    ids = sentencepiece_model().encode_as_ids(text)
    assert SentencePieceBPE(sentencepiece_model()).encode(text).tolist() == ids


# "abc" is ab, c to the reference, because only a, bc makes abc; tiktoken would make abc of ab, c.
UNREACHED = {
    "merges": [["a", "b"], ["b", "c"], ["a", "bc"]],
    "vocab": {
        letter: number
        for number, letter in enumerate(
            [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "bc", "abc"]
        )
    },
}
TWICE = {
    "merges": [["a", "b"], ["b", "c"], ["ab", "c"], ["c", "c"], ["a", "bc"]],
    "vocab": UNREACHED["vocab"] | {"cc": 259},
}


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({**UNREACHED, "added_tokens": []}, "do not make the token 'abc'"),
        ({**TWICE, "added_tokens": []}, "reach the token 'abc' in two places"),
        ({"vocab": {"a": 0}, "merges": [], "added_tokens": []}, "no token for some bytes"),
        ({"dropout": 0.1}, "not byte-level BPE"),
        ({"byte_fallback": True}, "not byte-level BPE"),
        ({"end_of_word_suffix": "</w>", "merges": []}, "last part of a word"),
        ({"normalizer": {"type": "NFKC"}}, "normalizer is NFKC"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre-tokenizer is not"),
        ({"truncation": {"max_length": 4, "strategy": "LongestFirst", "stride": 0}}, "truncates"),
    ],
)
def test_what_is_not_exact_is_not_used(parts: dict[str, object], reason: str) -> None:
    tokenizer = changed(**parts)
    with pytest.raises(NotExactError, match=reason):
        ByteLevelBPE(tokenizer, reference(tokenizer))


@given(tokens=st.lists(st.text("<|ab", min_size=1, max_size=5), max_size=4), text=st.text("<|abc"))
def test_special_tokens_are_found(tokens: list[str], text: str) -> None:
    assert finder(tokens)(text) == any(token in text for token in tokens)


def test_other_tokenizers_have_no_engine() -> None:
    with pytest.raises(NotExactError, match="neither a fast tokenizer of Hugging Face nor"):
        find_engine(object())


def test_verify_stops_at_a_difference() -> None:
    tokenizer = make(GPT2)
    wrong = ByteLevelBPE(tokenizer, reference(tokenizer))
    wrong._ids = wrong._ids.copy()
    wrong._ids[-1] = 0
    line = json.dumps({"text": CORPUS}).encode()
    batch = Batch("c.jsonl", 7, [line], 0)
    assert Encoder(Adapter(tokenizer), ["text"], np.uint16, engine=wrong)(batch).documents == 1
    with pytest.raises(DataError, match=r"c\.jsonl:7: the ids of 'text' by tiktoken .* differ"):
        Encoder(Adapter(tokenizer), ["text"], np.uint16, engine=wrong, verify=1000)(batch)


def test_the_run_says_what_encodes(tool, tmp_path: Path, tokenizers) -> None:
    corpus = write_lines(tmp_path / "c.jsonl", [{"text": "the fox"}, {"text": f"a {EOD} b"}])
    run = ["--input", corpus, "--output-prefix", tmp_path / "o", "--overwrite", "--verify", 1000]
    said = {
        "hf": "tokens of text, encoded by tiktoken\n",
        "hf_bos": "tokens of text, encoded by tiktoken\n",
        "sp": "encoded by the tokenizer itself: its SentencePiece model is not BPE\n",
    }
    for name, end in said.items():
        outcome = tool(*run, *tokenizers[name])
        assert outcome.code == 0 and outcome.stderr.endswith(end), outcome.stderr
    outcome = tool(*run, *tokenizers["hf"], "--engine", "reference")
    assert outcome.stderr.endswith("encoded by the tokenizer itself: --engine reference\n")
    model = tmp_path / "bpe.model"
    model.write_bytes(sentencepiece_model(runs_alike=True).serialized_model_proto())
    llama2 = ["--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", model]
    assert tool(*run, *llama2).stderr.endswith("encoded by tiktoken\n")
    folder = tmp_path / "other"
    folder.mkdir()
    changed(pre_tokenizer={"type": "Whitespace"}).save(str(folder / "tokenizer.json"))
    outcome = tool(*run, "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder)
    first = outcome.stderr.splitlines()[0]
    assert first.endswith(
        "encoding is several times slower than with tiktoken: "
        "its pre-tokenizer is not GPT-2's, Llama 3's or Qwen2's"
    )


@functools.cache
def sentencepiece_model(prefix: bool = True, runs_alike: bool = False) -> SentencePieceProcessor:
    """BPE in Llama 2's way, which has one score for all runs of spaces."""
    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([*CORPUS.splitlines(), "    for     the"] * 3),
        model_writer=written, vocab_size=500, model_type="bpe", byte_fallback=True,
        split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=prefix, allow_whitespace_only_pieces=True, character_coverage=0.98,
        user_defined_symbols=["<sep>"], hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    model = sentencepiece_model_pb2.ModelProto.FromString(written.getvalue())
    if runs_alike:
        for piece in model.pieces:
            if len(piece.piece) > 1 and not piece.piece.strip("\u2581"):
                piece.score = -1e9
        known = {piece.piece for piece in model.pieces}
        for length in (2, 3, 4, 5, 6, 7, 9, 16):
            if "\u2581" * length not in known:
                model.pieces.add(piece="\u2581" * length, score=-1e9)
    return SentencePieceProcessor(model_proto=model.SerializeToString())


SPM_TEXTS = st.one_of(TEXTS, st.text(" \u2581a\u4f60", max_size=60), st.just("a <sep> b"))


@settings(max_examples=200, deadline=None)
@given(text=SPM_TEXTS, prefix=st.booleans(), runs_alike=st.booleans())
def test_the_same_ids_as_sentencepiece(text: str, prefix: bool, runs_alike: bool) -> None:
    processor = sentencepiece_model(prefix, runs_alike)
    ids = SentencePieceBPE(processor).encode(text)
    if ids is None:
        assert "<sep>" in text
    else:
        assert ids.tolist() == processor.encode_as_ids(text)


@pytest.mark.parametrize("runs_alike", [False, True])
def test_proof_of_sentencepiece_on_the_stress_text(runs_alike: bool) -> None:
    processor = sentencepiece_model(True, runs_alike)
    prove(SentencePieceBPE(processor), processor.encode_as_ids, [CORPUS])


def altered_model(alter) -> SentencePieceProcessor:
    model = sentencepiece_model_pb2.ModelProto.FromString(
        sentencepiece_model().serialized_model_proto()
    )
    alter(model)
    return SentencePieceProcessor(model_proto=model.SerializeToString())


def without_bytes(model) -> None:
    model.trainer_spec.byte_fallback = False
    for piece in model.pieces:
        if piece.type == piece.BYTE:
            piece.type = piece.NORMAL


@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        (lambda m: setattr(m.trainer_spec, "model_type", 1), "not BPE"),
        (lambda m: setattr(m.normalizer_spec, "remove_extra_whitespaces", True), "normalizes text"),
        (without_bytes, "no bytes for unknown"),
        (lambda m: setattr(m.trainer_spec, "treat_whitespace_as_suffix", True), "its own way"),
        (lambda m: m.pieces.add(piece="e\u2581t", score=-1.5), "space behind something else"),
        (lambda m: setattr(m.pieces[270], "score", m.pieces[271].score), "have the same score"),
        (lambda m: setattr(m.pieces[-1], "type", 5), "has unused tokens"),
    ],
)
def test_what_of_sentencepiece_is_not_exact_is_not_used(alter, reason: str) -> None:
    with pytest.raises(NotExactError, match=reason):
        SentencePieceBPE(altered_model(alter))


def test_a_token_that_merges_do_not_make_is_never_used() -> None:
    """To tiktoken a word that is a token is that, whatever its merges say."""
    processor = altered_model(lambda model: model.pieces.add(piece="\u2581qqqq", score=-0.5))
    text = "a qqqq qqqq"
    assert processor.vocab_size() - 1 not in processor.encode_as_ids(text)
    assert SentencePieceBPE(processor).encode(text).tolist() == processor.encode_as_ids(text)


def test_special_tokens_that_begin_with_a_space() -> None:
    """SentencePiece looks for them when its space is in front of the text, and all are U+2581."""

    def add(model) -> None:
        model.pieces.add(piece="\u2581qd", type=model.pieces[0].USER_DEFINED)

    for text in ("qd", "a qd", "a\u2581qd"):
        processor = altered_model(add)
        assert processor.vocab_size() - 1 in processor.encode_as_ids(text)
        assert SentencePieceBPE(processor).encode(text) is None


@given(
    tokens=st.lists(st.from_regex(r"\A *[ab.\]\\^é-]+\Z"), max_size=6),
    between=st.lists(st.text(" ab.-]\\^é\n", max_size=3), min_size=6, max_size=6),
)
def test_no_token_reaches_across_the_words_that_a_text_is_cut_into(tokens, between) -> None:
    words = re.sub(r"\\x\{(\w+)\}", lambda m: re.escape(chr(int(m[1], 16))), _words(tokens))
    text = "".join(itertools.chain.from_iterable(zip(between, tokens, strict=False)))
    found = re.findall(words, text)
    assert "".join(found) == text
    cuts = set(itertools.accumulate(map(len, found)))
    for token in tokens:
        for first in range(len(text)):
            if text.startswith(token, first):
                assert not cuts & set(range(first + 1, first + len(token)))


def test_the_benchmark_trains_tokenizers_that_tiktoken_takes(tmp_path: Path) -> None:
    from tools.benchmarks.preprocess_speed import train_byte_level, write_corpus

    sample = write_corpus(tmp_path / "c.jsonl", 0.1)
    *_, folder = train_byte_level(tmp_path / "qwen2", sample, QWEN2, 500)
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    prove(ByteLevelBPE(tokenizer, reference(tokenizer)), reference(tokenizer), sample)

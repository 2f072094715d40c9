"""gigatoken in a tokenizer's place: the same ids for every text, or not used at all."""

import functools
import io
import json
import re
import sys
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

from megatron_scmoe.commands.preprocess import DataError, encoding, gigatoken_bpe
from megatron_scmoe.commands.preprocess.corpus import Batch
from megatron_scmoe.commands.preprocess.encoding import Encoder
from megatron_scmoe.commands.preprocess.gigatoken_bpe import (
    GigatokenBPE,
    find_engine,
    finder,
    of_huggingface,
    of_sentencepiece,
)
from megatron_scmoe.commands.preprocess.kept_tokenizer import KeptTokenizer
from megatron_scmoe.commands.preprocess.proof import NotExactError, prove
from tools.benchmarks.preprocess_speed import EXPRESSIONS

GPT2, LLAMA3, QWEN2 = (EXPRESSIONS[name] for name in ("gpt2", "llama3", "qwen2"))
O200K = (  # of GPT-4o: letters by case
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = {"gpt2": GPT2, "llama3": LLAMA3, "qwen2": QWEN2, "o200k": O200K}
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
def engine(words: str, normalize: bool = False, bos: bool = False) -> GigatokenBPE:
    tokenizer = make(words, normalize, bos)
    return of_huggingface(tokenizer).surround(reference(tokenizer))


def changed(**parts: object) -> Tokenizer:
    """GPT-2's tokenizer with other parts in its tokenizer.json, those of the model too."""
    state = json.loads(make(GPT2).to_str())
    for name, part in parts.items():
        (state if name in state else state["model"])[name] = part
    return Tokenizer.from_str(json.dumps(state))


@settings(max_examples=300, deadline=None)
@given(
    text=TEXTS,
    words=st.sampled_from([*WORDS.values()]),
    normalize=st.booleans(),
    bos=st.booleans(),
)
@example(text="\u017f'\u017f a'\u212a", words=LLAMA3, normalize=False, bos=False)
@example(text="e\u0301<s>\u212b", words=QWEN2, normalize=True, bos=True)
def test_the_same_ids(text: str, words: str, normalize: bool, bos: bool) -> None:
    ids = engine(words, normalize, bos).encode(text)
    if ids is None:
        assert normalize and (EOD in text or "<s>" in text)
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


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_proof_on_the_stress_text(words: str) -> None:
    prove(engine(words), reference(make(words)), [CORPUS])


@pytest.mark.parametrize("letter", ["\u00df", "\u1f88", "\u0483", "\u2e3a"])
def test_the_proof_sees_one_wrong_character(letter: str) -> None:
    """A letter, one of title case, an accent, a dash: expressions cut by case and signs, too."""

    class Wrong:
        def encode(self, text: str) -> np.ndarray | None:
            ids = engine(O200K).encode(text)
            if ids is not None and letter in text:
                ids = ids.copy()
                ids[-1] += 1
            return ids

    with pytest.raises(NotExactError, match="differently"):
        prove(Wrong(), reference(make(O200K)), [])


@pytest.mark.parametrize("unit", [" ", "\n", "="])
def test_a_million_times_the_same(unit: str) -> None:
    text = "x" + unit * 1_000_000 + "y"
    assert make(GPT2).decode(engine(GPT2).encode(text).tolist()) == text


# "abc" is ab, c, because only a, bc makes abc.
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


@settings(deadline=None)
@given(text=st.text("abc "), parts=st.sampled_from((UNREACHED, TWICE)))
def test_merges_are_followed_and_not_guessed_from_the_tokens(text, parts) -> None:
    tokenizer = changed(**parts, added_tokens=[])
    ids = of_huggingface(tokenizer).encode(text)
    assert ids is not None and ids.tolist() == tokenizer.encode(text).ids


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (
            {"vocab": {"a": 0}, "merges": [], "added_tokens": []},
            r"know it \(Byte remapping",
        ),
        ({"dropout": 0.1}, "drops merges at random"),
        ({"byte_fallback": True}, "byte_fallback is set but"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "is not BPE"),
        ({"end_of_word_suffix": "</w>", "merges": []}, "last part of a word"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer is Lowercase"),
        ({"vocab": UNREACHED["vocab"] | {"zz": 1 << 24}, "merges": []}, "ids are too large"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Unsupported pre_tokenizer type: Whitespace"),
        ({"truncation": {"max_length": 4, "strategy": "LongestFirst", "stride": 0}}, "truncates"),
    ],
)
def test_what_is_not_exact_is_not_used(parts: dict[str, object], reason: str) -> None:
    tokenizer = changed(**parts)
    with pytest.raises(NotExactError, match=reason):
        of_huggingface(tokenizer)


@given(tokens=st.lists(st.text("<|ab", min_size=1, max_size=5), max_size=4), text=st.text("<|abc"))
def test_special_tokens_are_found(tokens: list[str], text: str) -> None:
    assert finder(tokens)(text) == any(token in text for token in tokens)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), words=st.sampled_from([*WORDS.values()]))
def test_special_tokens_inside_a_text(data: st.DataObject, words: str) -> None:
    """Whatever they are, and how they overlap; those that take white space along are left."""
    contents = (
        "<s",
        "<|end|>",
        " <x>",
        "<x> ",
        "aa",
        "aab",
        "\n\n",
        "\u00e9",
        EOD + "x",
        "1",
        "  ",
    )
    plain = data.draw(st.lists(st.sampled_from(contents), unique=True, max_size=4))
    tokenizer = Tokenizer.from_str(make(words).to_str())
    tokenizer.add_tokens([AddedToken(content, normalized=False) for content in plain])
    tokenizer.add_special_tokens(
        [AddedToken("<l>", lstrip=True), AddedToken("<w>", single_word=True)]
    )
    engine = of_huggingface(tokenizer)
    parts = st.sampled_from((*contents, EOD, "<l>", "<w>", "<|end", "a", "b", " ", "\n", "x>"))
    for text in data.draw(st.lists(st.lists(parts, max_size=14).map("".join), max_size=9)):
        ids = engine.encode(text)
        if ids is None:
            assert "<l>" in text or "<w>" in text
        else:
            assert ids.tolist() == tokenizer.encode(text).ids


def test_other_tokenizers_have_no_engine() -> None:
    with pytest.raises(NotExactError, match="neither a fast tokenizer of Hugging Face nor"):
        find_engine(object())


def test_verify_stops_at_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make(GPT2)
    wrong = of_huggingface(tokenizer)
    wrong._after = np.array([0], np.int32)
    line = json.dumps({"text": CORPUS}).encode()
    batch = Batch("c.jsonl", 7, [line], 0)
    assert Encoder(Adapter(tokenizer), ["text"], np.uint16, engine=wrong)(batch).documents == 1
    with pytest.raises(DataError, match=r"c\.jsonl:7: the ids of 'text' by gigatoken .* differ"):
        Encoder(Adapter(tokenizer), ["text"], np.uint16, engine=wrong, verify=1000)(batch)
    # A document of gigabytes would take the tokenizer many times its size.
    monkeypatch.setattr(encoding, "VERIFIED_BYTES", len(line))
    encoder = Encoder(Adapter(tokenizer), ["text"], np.uint16, engine=wrong, verify=1000)
    assert encoder(batch).documents == 1


def test_the_run_says_what_encodes(tool, tmp_path: Path, tokenizers) -> None:
    corpus = write_lines(tmp_path / "c.jsonl", [{"text": "the fox"}, {"text": f"a {EOD} b"}])
    run = ["--input", corpus, "--output-prefix", tmp_path / "o", "--overwrite", "--verify", 1000]
    said = {
        "hf": "tokens of text, encoded by gigatoken\n",
        "hf_bos": "tokens of text, encoded by gigatoken\n",
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
    assert tool(*run, *llama2).stderr.endswith("encoded by gigatoken\n")
    folder = tmp_path / "other"
    folder.mkdir()
    changed(pre_tokenizer={"type": "Whitespace"}).save(str(folder / "tokenizer.json"))
    outcome = tool(*run, "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder)
    first = outcome.stderr.splitlines()[0]
    assert first.endswith(
        "encoding is many times slower than with gigatoken: gigatoken does not know it "
        "(Unsupported pre_tokenizer type: Whitespace (no Split regex found))"
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
    ids = of_sentencepiece(processor).encode(text)
    if ids is None:
        assert "<sep>" in text
    else:
        assert ids.tolist() == processor.encode_as_ids(text)


@pytest.mark.parametrize("runs_alike", [False, True])
def test_proof_of_sentencepiece_on_the_stress_text(runs_alike: bool) -> None:
    processor = sentencepiece_model(True, runs_alike)
    prove(of_sentencepiece(processor), processor.encode_as_ids, [CORPUS])


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
            piece.type, piece.score = piece.NORMAL, -1e6 - int(piece.piece[3:5], 16)


@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        (lambda m: setattr(m.trainer_spec, "model_type", 1), "not BPE"),
        (lambda m: setattr(m.normalizer_spec, "remove_extra_whitespaces", True), "normalizes text"),
        (without_bytes, "only byte_fallback"),
        (
            lambda m: setattr(m.trainer_spec, "treat_whitespace_as_suffix", True),
            "as_suffix are not",
        ),
        (lambda m: setattr(m.pieces[270], "score", m.pieces[271].score), "have the same score"),
        (lambda m: setattr(m.pieces[-1], "type", 5), "has unused tokens"),
    ],
)
def test_what_of_sentencepiece_is_not_exact_is_not_used(alter, reason: str) -> None:
    with pytest.raises(NotExactError, match=reason):
        of_sentencepiece(altered_model(alter))


def test_a_token_that_merges_do_not_make_is_never_used() -> None:
    processor = altered_model(lambda model: model.pieces.add(piece="\u2581qqqq", score=-0.5))
    text = "a qqqq qqqq"
    assert processor.vocab_size() - 1 not in processor.encode_as_ids(text)
    assert of_sentencepiece(processor).encode(text).tolist() == processor.encode_as_ids(text)


def test_special_tokens_that_begin_with_a_space() -> None:
    """SentencePiece looks for them when its space is in front of the text, and all are U+2581."""

    def add(model) -> None:
        model.pieces.add(piece="\u2581qd", type=model.pieces[0].USER_DEFINED)

    for text in ("qd", "a qd", "a\u2581qd"):
        processor = altered_model(add)
        assert processor.vocab_size() - 1 in processor.encode_as_ids(text)
        assert of_sentencepiece(processor).encode(text) is None


@functools.cache
def huggingface_llama2() -> Tokenizer:
    """The model of above as a tokenizer.json, as the hub has Llama 2's."""
    model = sentencepiece_model_pb2.ModelProto.FromString(
        sentencepiece_model(runs_alike=True).serialized_model_proto()
    )
    vocab = {piece.piece: number for number, piece in enumerate(model.pieces)}
    merges = [
        (-model.pieces[number].score, -cut, (piece[:cut], piece[cut:]))
        for piece, number in vocab.items()
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    merges.sort(key=lambda merge: merge[:2])
    tokenizer = Tokenizer(
        models.BPE(
            vocab, [pair for _, _, pair in merges], unk_token="<unk>", fuse_unk=True,
            byte_fallback=True,
        )
    )  # fmt: skip
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("<sep>", normalized=True), AddedToken("a b", normalized=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    return tokenizer


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(SPM_TEXTS, st.just("a\u2581b")))
def test_the_same_ids_as_llama2_of_huggingface(text: str) -> None:
    tokenizer = huggingface_llama2()
    ids = of_huggingface(tokenizer).surround(reference(tokenizer)).encode(text)
    if ids is None:
        assert re.search("<s(ep)?>|a[ \u2581]b", text)
    elif text:
        assert ids.tolist() == tokenizer.encode(text).ids


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_the_same_ids_as_any_sentencepiece_model(data: st.DataObject) -> None:
    """Models of a few tokens, which meet each other in more ways than those of a language."""
    alphabets = ("ab", "ab\u2581", "a.1\u2581", "a\u4f60\u2581", "a\n\u2581")
    letters = data.draw(st.sampled_from(alphabets))
    longer = data.draw(
        st.lists(st.text(letters, min_size=2, max_size=6), min_size=1, max_size=14, unique=True)
    )
    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.remove_extra_whitespaces = False
    model.pieces.add(piece="<unk>", type=model.SentencePiece.UNKNOWN)
    for byte in range(256):
        model.pieces.add(piece=f"<0x{byte:02X}>", type=model.SentencePiece.BYTE)
    for rank, piece in enumerate([*longer, *sorted({*letters, "\u2581"})]):
        model.pieces.add(piece=piece, score=-rank)
    processor = SentencePieceProcessor(model_proto=model.SerializeToString())
    engine = of_sentencepiece(processor)
    for text in data.draw(st.lists(st.text(letters.replace("\u2581", " ") + "\u00e9"), max_size=9)):
        ids = engine.encode(text)
        assert not text or (ids is not None and ids.tolist() == processor.encode_as_ids(text))


def test_what_is_remembered_of_texts_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begins anew where memory has grown by more than 20; that of a large text is none of it."""
    monkeypatch.setattr(gigatoken_bpe, "_LOOK_EVERY", 1)
    monkeypatch.setattr(gigatoken_bpe, "_REMEMBERED", 20)
    sizes = iter([100, 108, 116, 124, 124, 132, 500, 500, 110, 118, 126, 134, 134])
    monkeypatch.setattr(gigatoken_bpe, "resident_bytes", lambda: next(sizes))
    made, backends = engine.__wrapped__(GPT2), []
    for _ in range(8):
        ids = made.encode(CORPUS)
        assert ids is not None and ids.tolist() == make(GPT2).encode(CORPUS).ids
        backends.append(made._bpe)
    first, second, third, fourth = dict.fromkeys(backends)
    assert backends == [first, second, second, *[third] * 4, fourth]


def test_without_gigatoken_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    with pytest.raises(NotExactError, match=r"^gigatoken is not installed: pip install 'megatron"):
        find_engine(KeptTokenizer(make(GPT2), reference(make(GPT2)), str, 450, 0))


def test_the_benchmark_trains_tokenizers_that_gigatoken_takes(tmp_path: Path) -> None:
    from tools.benchmarks.preprocess_speed import train_byte_level, write_corpus

    sample = write_corpus(tmp_path / "c.jsonl", 0.1)
    for kind in EXPRESSIONS:
        *_, folder = train_byte_level(tmp_path / kind, sample, kind, 500)
        tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
        prove(of_huggingface(tokenizer), reference(tokenizer), sample)

"""What the tests of tools/preprocess_data.py share: a corpus, tokenizers and the tool itself.

Everything is written out here, nothing is trained or downloaded, so that the golden checksums in
test_preprocess_golden.py depend on the tool alone.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[3] / "tools" / "preprocess_data.py"

# The tokenizers' "end of text" and the corpus's words.
EOD = "<|endoftext|>"
WORDS = [
    *("the", "quick", "fox", "met", "Dr.", "Fox", ".", "He", "said:", "Hello!", "(Really?)"),
    *("It", "was", "3.14", "p.m.", "na\u00efve", "\u4f60\u597d", "\U0001f600", "tab\there"),
    *("line\nbreak\n\nnew", "\x00", "nul", "a\u0301", "end."),
]


def documents(count: int = 300) -> list[dict[str, str]]:
    """A corpus from a linear congruential generator; some texts and titles are empty."""
    state = 12345

    def draw(limit: int) -> int:
        nonlocal state
        state = (1103515245 * state + 12345) % 2**31
        return (state >> 16) % limit

    result = []
    for number in range(count):
        words = [WORDS[draw(len(WORDS))] for _ in range(draw(40))]
        ids = [str(draw(90)) for _ in range(1 + draw(20))]
        title = f"Title {number}." if draw(4) else ""
        result.append({"text": " ".join(words), "title": title, "ids": " ".join(ids)})
    return result


def write_lines(path: Path, items: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def make_huggingface(folder: Path, bos: bool = False) -> Path:
    """A byte-level BPE with a few merges; `bos` puts the end-of-text id before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("e", "n"), ("Ġ", "F"), ("l", "l")]
    pieces = [EOD, *letters, *(left + right for left, right in merges)]
    model = models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{EOD} $A", special_tokens=[(EOD, 0)]
        )
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOD}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def make_sentencepiece(path: Path) -> Path:
    """A unigram model of a few pieces; unknown characters become <unk>."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type = model.trainer_spec.UNIGRAM
    model.normalizer_spec.name = "identity"
    kinds = model.SentencePiece
    specials = [("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)]
    for piece, kind in specials:
        model.pieces.add(piece=piece, score=0, type=kind)
    for rank, piece in enumerate(["▁the", "▁fox", "he", "ll", "▁", *"abcdefghilmnoqrstuxy.!"]):
        model.pieces.add(piece=piece, score=-1.0 - rank, type=kinds.NORMAL)
    path.write_bytes(model.SerializeToString())
    return path


def make_punkt(folder: Path) -> Path:
    """nltk data with a small English Punkt model: two abbreviations, nothing else known."""
    model = folder / "tokenizers" / "punkt_tab" / "english"
    model.mkdir(parents=True)
    (model / "abbrev_types.txt").write_text("dr\np.m")
    (model / "collocations.tab").write_text("")
    (model / "sent_starters.txt").write_text("it")
    (model / "ortho_context.tab").write_text("he\t34\nthe\t46")
    return folder


@dataclass
class ToolEnd:
    """How a run of the tool ended."""

    code: int
    stderr: str

    @property
    def error(self) -> str:
        """The message of a run that failed with exactly one line on stderr."""
        prefix = "preprocess_data.py: error: "
        assert self.code != 0
        assert self.stderr.startswith(prefix) and self.stderr.count("\n") == 1, self.stderr
        return self.stderr.removeprefix(prefix).strip()


class ForkedTool:
    """The tool running as a process and process group of its own.

    Forked instead of started, so that a test does not wait seconds for PyTorch to be imported
    again; test_preprocess_errors.py also starts it as a user does.
    """

    def __init__(
        self, arguments: list[str], log: Path, prepare: Callable[[], None] | None = None
    ) -> None:
        self.log = log
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.setsid()
                descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
                sys.argv = [str(TOOL), *arguments]
                if prepare:
                    prepare()
                runpy.run_path(str(TOOL), run_name="__main__")
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def wait(self, seconds: float = 60) -> ToolEnd:
        """The outcome; kills the run and fails if it does not end in time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return ToolEnd(os.waitstatus_to_exitcode(status), self.log.read_text())
            time.sleep(0.01)
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        pytest.fail(f"the tool still ran after {seconds} s: {self.log.read_text()}")

    def children(self) -> list[int]:
        """Process ids of the workers."""
        listing = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.pid)], capture_output=True, text=True
        )
        return [int(pid) for pid in listing.stdout.split()]


@pytest.fixture(scope="session")
def preloaded() -> None:
    """The large imports, once, before anything is forked."""
    sys.path.insert(0, str(TOOL.parents[1]))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import megatron.core.tokenizers.utils.build_tokenizer  # noqa: F401
    import transformers  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where tokenizers are kept, instead of the user's own folder."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture
def start(preloaded: None, tmp_path: Path):
    """Starts the tool; the test goes on while it runs."""

    def start(*arguments: object, prepare: Callable[[], None] | None = None) -> ForkedTool:
        return ForkedTool([str(argument) for argument in arguments], tmp_path / "log", prepare)

    return start


@pytest.fixture
def tool(start):
    """Runs the tool to its end."""

    def tool(*arguments: object, prepare: Callable[[], None] | None = None) -> ToolEnd:
        return start(*arguments, prepare=prepare).wait()

    return tool


@pytest.fixture
def null_arguments(tmp_path: Path) -> list[object]:
    """Options for the tokenizer that reads numbers, and an output in the test's folder."""
    output = tmp_path / "out" / "corpus"
    return ["--tokenizer-type", "NullTokenizer", "--vocab-size", 100, "--output-prefix", output]


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Name of a tokenizer to its options."""
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "null": ["--tokenizer-type", "NullTokenizer", "--vocab-size", "100"],
        "hf": [
            "--tokenizer-type", "HuggingFaceTokenizer",
            "--tokenizer-model", str(make_huggingface(folder / "hf")),
        ],
        "hf_bos": [
            "--tokenizer-type", "HuggingFaceTokenizer",
            "--tokenizer-model", str(make_huggingface(folder / "hf_bos", bos=True)),
        ],
        "sp": [
            "--tokenizer-type", "SentencePieceTokenizer",
            "--tokenizer-model", str(make_sentencepiece(folder / "sp.model")),
        ],
    }  # fmt: skip


@pytest.fixture(scope="session")
def punkt_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_punkt(tmp_path_factory.mktemp("nltk_data"))

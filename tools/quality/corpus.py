"""The text: Python's sources and manuals as the quick start has them, without near duplicates.

Held out by document. The standard library of one version of Python is the same everywhere
(licence PSF-2.0): modules, their tests, documentation strings of C modules, the language reference.
The digest of its tokens stands in every result.
"""

import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tools.benchmarks.provenance import REPOSITORY
from tools.quality.scales import Scale

SPLITS = ("train", "valid")


@dataclass(frozen=True)
class Text:
    """Both data sets and the tokenizer, in a folder."""

    folder: Path
    digest: str
    """Of the tokens of both."""
    tokens: dict[str, int]
    """By split."""

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    def prefix(self, split: str) -> Path:
        return self.folder / f"{split}_text_document"

    def options(self) -> list[str]:
        return [
            *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(self.tokenizer)),
            *("--train-data-path", str(self.prefix("train"))),
            *("--valid-data-path", str(self.prefix("valid"))),
            *("--data-cache-path", str(self.folder / "cache"), "--num-workers", "0"),
        ]


def write(folder: Path, scale: Scale) -> Text:
    """The text of a scale, unless an earlier run has left it whole.

    Raises:
        ValueError: it is too short for one epoch, or the data sets cannot be read; one line.
        subprocess.CalledProcessError: a program of the quick start failed; `stderr` says why.
    """
    sizes = {"MEGABYTES": f"{scale.megabytes:g}", "VOCABULARY": str(scale.vocabulary)}
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(
        ["bash", "examples/text.sh", str(folder.resolve())],
        cwd=REPOSITORY,
        env=os.environ | sizes | path,
        check=True,
        capture_output=True,
        text=True,
    )
    tokens, sha = {}, hashlib.sha256()
    for split in SPLITS:
        content = Path(f"{folder / split}_text_document.bin").read_bytes()
        sha.update(content)
        tokens[split] = len(content) // 2  # uint16: vocabularies here are smaller than 65,536
    wanted = {
        "train": scale.tokens,
        "valid": scale.eval_iterations * scale.batch * scale.seq_length,
    }
    for split, needed in wanted.items():
        if tokens[split] < needed:
            raise ValueError(
                f"{split} has {tokens[split]:,} tokens and a run reads {needed:,}: more than one "
                "epoch is never trained."
            )
    return Text(folder, sha.hexdigest()[:16], tokens)

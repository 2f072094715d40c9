"""Is a Hugging Face directory the model of a checkpoint?

Tensor by tensor first, bit for bit in the directory's types, which needs neither side's model.
Then by what both models say about a text: the host's in processes of its own.

Shapes: b samples, s tokens, v vocabulary
"""

import subprocess
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from megatron_scmoe.huggingface import export, load, tensor_names, tokenizer
from megatron_scmoe.huggingface.progress import progress
from megatron_scmoe.huggingface.tensor_names import Config
from megatron_scmoe.words import read_json, size

LARGEST_DIFFERENCE = 1e-4
"""Of two logits in fp32."""
SAMPLE_TOKENS = 64
TEXT_TOKENS = 2048
"""At most, of a file."""
TEXT = (
    "We hold these truths to be self-evident, that all men are created equal, that they are "
    "endowed by their Creator with certain unalienable Rights, that among these are Life, Liberty "
    "and the pursuit of Happiness. That to secure these rights, Governments are instituted among "
    "Men, deriving their just powers from the consent of the governed."
)
OF_TRAINING = (
    "megatron",
    "dtype",
    "router_aux_loss_coef",
    "router_tau",
    "routed_topk",
    "balance_groups",
    *tokenizer.IDS,
)
"""Fields of config.json that no logit depends on."""
PROGRAM = ("-m", "megatron_scmoe.huggingface.logits")
TYPES = {"fp32": (torch.float32, []), "bf16": (torch.bfloat16, ["--bf16"])}
"""What both models can be computed in, and Megatron's options for it."""


def compare_tensors(
    checkpoints: Path, folder: Path, step: int | None = None, say: Any = print
) -> str | None:
    """Compare every tensor of a checkpoint with the directory's.

    Returns:
        The first difference, in one line; None if there is none.

    Raises:
        ValueError: one of the two is not whole; one line.
    """
    source = _opened(checkpoints, folder, step)
    directory = load.open_directory(folder)
    changed = sorted(
        name
        for name in source.config
        if name not in OF_TRAINING
        and source.config[name] != directory.config.get(name, source.config[name])
    )
    if changed:
        name = changed[0]
        return (
            f"{folder} is another model than {source.reader.folder}: {name} is "
            f"{directory.config[name]} there and {source.config[name]} here"
        )
    located, _ = export.locate(source)
    count = 0
    load.locate(directory)
    with progress(len(located), "verify") as advance:
        for tensor, place in located:
            whole = source.reader.read(place)
            for name, values in export.parts_of(tensor, whole, source.config, {}):
                where = directory.dialect.where(name, directory.config, directory.reader.names())
                there = load.read(directory.reader, where, tuple(values.shape))
                if not torch.equal(values.to(there.dtype), there):
                    most = (values.float() - there.float()).abs().max().item()
                    return f"{name} differs by up to {most:.3g} ({tensor.megatron} in {place.key})"
                count += 1
            advance(1)
    say(f"{count} tensors of {folder} are those of iteration {source.iteration}, bit for bit")
    return None


@dataclass(frozen=True)
class Agreement:
    """What two models say about the same tokens."""

    difference: float
    """The largest, of all logits."""
    other_tokens: int
    """Places where another token is the likeliest."""
    places: int
    perplexity: float
    other_perplexity: float
    rounded: bool
    """Whether the directory holds the weights in a type that cannot hold the checkpoint's."""
    dtype: str = "fp32"
    """In which both were computed, a key of TYPES."""

    @property
    def same(self) -> bool:
        return self.difference <= LARGEST_DIFFERENCE and self.other_tokens == 0

    def text(self) -> str:
        rounded = " (the directory's weights are rounded)" if self.rounded else ""
        return (
            f"logits of both models at {self.places} places, in {self.dtype}{rounded}: largest "
            f"difference {self.difference:.2g}, another token at {self.other_tokens}; perplexity "
            f"{self.perplexity:.5g} in Megatron, {self.other_perplexity:.5g} exported"
        )


def compare_logits(
    checkpoints: Path,
    folder: Path,
    step: int | None = None,
    text: Path | None = None,
    ranks: int = 1,
    options: list[str] | None = None,
    dtype: str = "fp32",
) -> Agreement:
    """Compute both models on a text.

    Args:
        text: a file, of which TEXT_TOKENS are read; None for a paragraph.
        ranks: processes of Megatron's model.
        options: of Megatron, such as the layout of these ranks.
        dtype: in which both are computed, a key of TYPES.

    Raises:
        ValueError: a model cannot be computed here; one line.
    """
    if find_spec("transformers") is None:
        raise ValueError("transformers is not installed: pip install 'megatron-scmoe[hf]'")
    source = _opened(checkpoints, folder, step)
    tokens = sample(folder, source.config, text)
    kind, more = TYPES[dtype]
    there = _logits_there(folder, tokens, kind)
    here = _logits_here(source, tokens, ranks, [*(options or []), *more])[..., : there.shape[-1]]
    return _compare(here, there, tokens, _is_rounded(source, folder), dtype)


def _opened(checkpoints: Path, folder: Path, step: int | None) -> export.SourceCheckpoint:
    """A checkpoint, with the directory's tokenizer where the record's is not on this machine."""
    source = export.open_checkpoint(checkpoints, step)
    if source.tokenizer is not None:
        return source
    return replace(source, config=tokenizer.complete(source.config, source.record, folder))


def why_not(checkpoints: Path, step: int | None = None) -> str | None:
    """Why an export is not followed by a comparison of logits; None if it is."""
    if find_spec("transformers") is None:
        return "transformers is not installed"
    source = export.open_checkpoint(checkpoints, step)
    tensors = tensor_names.tensors(source.config)
    needed = 4 * sum(prod(shape) for tensor in tensors for _, shape in tensor.parts)
    free = free_memory()
    if 3 * needed > free:
        return f"both models in fp32 take {size(2 * needed)}, and {size(free)} are free"
    return None


def free_memory() -> int:
    """Bytes that programs can still get."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def sample(folder: Path, config: Config, text: Path | None) -> Tensor:
    """Tokens, [b, s]: of a text where there is a tokenizer, else all of them in turn.

    Raises:
        ValueError: there is no tokenizer to read the text with, or it is empty.
    """
    most = SAMPLE_TOKENS if text is None else TEXT_TOKENS
    longest = min(config["max_position_embeddings"], most)
    has_tokenizer = (folder / "tokenizer.json").exists()
    if text is None:
        tokens = tokenizer.encode(folder, TEXT)[:longest] if has_tokenizer else []
        if len(tokens) < 2:  # a tokenizer may know none of its words
            return (torch.arange(longest)[None] * 7919 + 1) % config["vocab_size"]
        return torch.tensor([tokens])
    if not has_tokenizer:
        raise ValueError(f"{folder} has no tokenizer.json to read {text} with")
    tokens = tokenizer.encode(folder, text.read_text(encoding="utf-8"))[:most]
    if len(tokens) < 2:
        raise ValueError(f"{text} has no text")
    samples = max(1, len(tokens) // longest)
    return torch.tensor(tokens[: samples * longest]).view(samples, -1)


def _logits_there(folder: Path, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the directory's model, [b, s, v]."""
    import transformers

    from megatron_scmoe.huggingface.modeling_scmoe import ScMoEForCausalLM

    transformers.utils.logging.disable_progress_bar()
    ours = read_json(folder / "config.json").get("model_type") == "scmoe"
    kind = ScMoEForCausalLM if ours else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=dtype).eval()
    with torch.inference_mode():
        return model(tokens).logits.float()


def _logits_here(
    source: export.SourceCheckpoint, tokens: Tensor, ranks: int, options: list[str]
) -> Tensor:
    """Of Megatron's model, [b, s, v].

    Raises:
        ValueError: the program that computes them fails.
    """
    from safetensors.torch import load_file, save_file

    with TemporaryDirectory() as scratch:
        files = [str(Path(scratch, name)) for name in ("tokens", "logits")]
        save_file({"tokens": tokens}, files[0])
        places = ["--load", str(source.folder), "--ckpt-step", str(source.iteration)]
        places += ["--tokens", files[0], "--logits", files[1]]
        code, errors = run_program([*places, *options], ranks)
        if code:
            lines = [line for line in errors.splitlines() if "error: " in line]
            last = (lines or errors.splitlines() or [f"exit code {code}"])[-1]
            what = last.partition("error: ")[2] or last
            raise ValueError(f"Megatron's model cannot be computed: {what}")
        return load_file(files[1])["logits"]


def run_program(options: list[str], ranks: int) -> tuple[int, str]:
    """Exit code and standard error of logits.py over so many processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *(launcher if ranks > 1 else ()), *PROGRAM, *options]
    run = subprocess.run(command, capture_output=True, text=True)
    return run.returncode, run.stderr


def _is_rounded(source: export.SourceCheckpoint, folder: Path) -> bool:
    own = source.reader.dtype(source.reader.place("embedding.word_embeddings.weight"))
    there = getattr(torch, read_json(folder / "config.json").get("dtype") or "float32")
    return torch.promote_types(own, there) != there


def _compare(here: Tensor, there: Tensor, tokens: Tensor, rounded: bool, dtype: str) -> Agreement:
    own, other = (
        torch.nn.functional.cross_entropy(logits[:, :-1].double().mT, tokens[:, 1:]).exp().item()
        for logits in (here, there)
    )
    return Agreement(
        (here - there).abs().max().item(),
        int((here.argmax(-1) != there.argmax(-1)).sum()),
        tokens.numel(),
        own,
        other,
        rounded,
        dtype,
    )

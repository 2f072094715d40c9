"""tools/generate.py on checkpoints of training runs: the same text at every layout.

Against the uncached model, with every position and attention: distributed_tests/test_inference.py.
"""

import json
import os
import re
import shlex
import signal
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_scmoe.c2r import placement
from megatron_scmoe.commands import generate
from tests.limits import JOB_S
from tools.benchmarks import offload

from .forked import launch_forked, start_ranks
from .launch import TINY_MODEL, TINY_MOE

ITERATIONS = 6
# Of different lengths.
PROMPTS = ["7 8 9 10 11", "30", "1 5 2"]
# On two ranks. Data parallel ranks have prompts of their own, and the second one fewer.
LAYOUTS = {
    "data parallel": "--inference-max-requests 1",
    "expert parallel": "--expert-model-parallel-size 2",
    "tensor and expert parallel": "--tensor-model-parallel-size 2 --expert-model-parallel-size 2 "
    "--expert-tensor-parallel-size 1",
    "expert tensor parallel": "--tensor-model-parallel-size 2",
    "data parallel, experts in a file": "--scmoe-offload-experts disk --scmoe-expert-cache-size 2",
    "grouped experts in a file": "--scmoe-offload-experts disk --moe-grouped-gemm",
    "expert parallel, experts in memory": "--expert-model-parallel-size 2 "
    "--scmoe-offload-experts cpu",
    "pipeline parallel": "--pipeline-model-parallel-size 2",
    "expert parallel, placed": "--expert-model-parallel-size 2 "
    "--scmoe-expert-placement {placement}",
}


# Seen by the tensor and expert parallel ranks, and by those with single experts in a file.
SLOW = ("expert tensor parallel", "grouped experts in a file")


@pytest.fixture(scope="module")
def checkpoints(data_prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model with four layers, trained at EP 2 with the distributed optimizer."""
    folder = tmp_path_factory.mktemp("trained")
    options = shlex.split(
        f"--num-layers 4 --moe-layer-freq ([0,1]*2) --scmoe-shortcut-position pos2 "
        f"--group-query-attention --num-query-groups 2 --expert-model-parallel-size 2 "
        f"--use-distributed-optimizer --train-iters {ITERATIONS} --save-interval {ITERATIONS}"
    )
    data = ["--data-path", str(data_prefix), "--split", "100,0,0", "--eval-iters", "0"]
    cache = ["--data-cache-path", str(folder / "cache"), "--save", str(folder / "checkpoints")]
    moe = [option for option in TINY_MOE if option != "--moe-grouped-gemm"]
    run = launch_forked([*TINY_MODEL, *moe, *options, *data, *cache], 2, folder)
    assert run.returncode == 0, run.stdout[-3000:]
    return folder / "checkpoints"


def written(checkpoints: Path, folder: Path, layout: str, ranks: int) -> list[dict[str, Any]]:
    """What is drawn with one seed, from all prompts in a file."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    options = f"--prompt-file {prompts} --max-new-tokens 6 --json --top-p 0.9 --seed 5 {layout}"
    command = ["--load", str(checkpoints), *shlex.split(options)]
    run = launch_forked(command, ranks, folder, main=generate.main)
    assert run.returncode == 0, run.stdout[-3000:]
    assert re.search(r"^prefill \d+ tokens, .* decode \d+ tokens", run.stdout, re.M)
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def test_another_tokenizer_is_one_line_that_does_not_speak_of_training(
    checkpoints: Path, tmp_path: Path
) -> None:
    command = ["--load", str(checkpoints), "--prompt", "1", "--vocab-size", "60"]
    run = launch_forked(command, 1, tmp_path, main=generate.main)
    assert run.returncode == 2
    line = run.stdout.splitlines()[-1]
    assert line.endswith("another tokenizer: vocab_size 64 there, 60 here. Use that one.")


@pytest.fixture(scope="module")
def one_process(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return written(checkpoints, tmp_path_factory.mktemp("one_process"), "", 1)


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in LAYOUTS],
)
def test_every_layout_writes_the_same(
    layout: str, checkpoints: Path, one_process: Any, tmp_path: Path
) -> None:
    file = tmp_path / "placement.json"
    orders = {2: ((3, 0), (1, 2)), 4: ((2, 1), (0, 3))}
    placement.write(file, placement.Placement(4, 2, 2, orders))
    found = written(checkpoints, tmp_path, LAYOUTS[layout].format(placement=file), 2)
    assert [each["prompt"] for each in found] == PROMPTS
    for each, expected in zip(found, one_process, strict=True):
        assert each["tokens"] == expected["tokens"] and 0 < len(each["tokens"]) <= 6
        assert each["log_probs"] == pytest.approx(expected["log_probs"], abs=1e-5)


def in_folder(folder: Path) -> None:
    """A hook: temporary files lie there, and an interrupt is heard."""
    tempfile.tempdir = str(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_an_interrupt_leaves_no_file_of_experts(checkpoints: Path, tmp_path: Path) -> None:
    """It has no name while it is used, so that nothing has to be removed."""
    options = shlex.split(
        f"--load {checkpoints} --prompt 7 --max-new-tokens 20000 --scmoe-offload-experts disk"
    )
    folder = tmp_path / "temporary"
    folder.mkdir()
    hook = partial(in_folder, folder)
    (rank,) = start_ranks(options, [tmp_path / "rank0.txt"], hook=hook, main=generate.main)
    try:
        maps, deadline = Path(f"/proc/{rank.pid}/maps"), time.monotonic() + JOB_S
        while str(folder) not in maps.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert str(folder) in maps.read_text() and [*folder.iterdir()] == []
        assert rank.pid is not None
        os.kill(rank.pid, signal.SIGINT)
        rank.join(JOB_S)
        assert rank.exitcode and [*folder.iterdir()] == []
    finally:
        rank.kill()
        rank.join()


@pytest.mark.slow  # its parts: unit_tests/test_offload_benchmark.py
def test_the_benchmark_of_offloading_on_a_model_of_the_command_line(tmp_path: Path) -> None:
    """All arms write the same text; only those that are early have windows."""
    words = Tokenizer(models.WordLevel({"a": 0, "the": 1, "<eod>": 2}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eod>").save_pretrained(tmp_path)
    moe = [option for option in TINY_MOE if option != "--moe-grouped-gemm"]
    text = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tmp_path)]
    asked = shlex.split(
        "--moe-layer-freq ([0,1]*1) --scmoe-shortcut-position pos2 --uniform --batches 2 "
        "--prompt-tokens 4 --max-new-tokens 3 --shares 0.5 --repetitions 1"
    )
    command = [*TINY_MODEL, *moe, *text, *asked]
    run = launch_forked(command, 1, tmp_path / "run", main=offload.main)
    assert run.returncode == 0, run.stdout[-3000:]
    assert "the same text from every arm: True." in run.stdout
    header, _, *rows = [line for line in run.stdout.splitlines() if line.startswith("|")]
    columns = [name.strip() for name in header.split("|")]
    arms = [dict(zip(columns, row.split("|"), strict=True)) for row in rows]
    assert [row["arm"].strip() for row in arms] == [offload.RESIDENT, *offload.ARMS]
    assert [row["window, ms"].strip() == "-" for row in arms] == [True, True, True, False, False]
    assert [row["of experts"].strip() for row in arms] == ["49.2 kB"] + ["24.6 kB"] * 4

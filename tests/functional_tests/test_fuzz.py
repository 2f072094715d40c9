"""What somebody may give to the programs: each is taken, or refused in one line.

Command lines of a run and of the planner, corpora and command lines of preprocessing, data sets
whose files are damaged: 1,000 inputs, seeded. Every one is handed to a fork of this process, which
has imported everything, as far as a run goes without process groups. None may end in a traceback or
by a signal, take long, eat memory or leave something behind. FUZZ is how often as many are tried.
Damaged checkpoints, traces, records and files of times: tests/unit_tests/test_damaged_files.py.
"""

import faulthandler
import gc
import gzip
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import megatron.core.tokenizers.text  # what every run imports late
import numpy
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.training import get_args
from megatron.training.arguments import add_megatron_arguments

import pretrain_gpt_scmoe
import tests.forkserver
from megatron_scmoe import say
from megatron_scmoe.arguments import add_scmoe_args, parse_and_validate_args, prepare
from megatron_scmoe.commands import plan_overlap, preprocess_data
from megatron_scmoe.planner.plan_arguments import add_planner_args
from megatron_scmoe.run.doctor.machine import start_up
from tests.functional_tests.launch import TINY_MODEL, TINY_MOE
from tests.unit_tests.test_plan_overlap import CLUSTER, MODEL
from tests.unit_tests.test_readme import parser_of

assert megatron.core.tokenizers.text and tests.forkserver  # imported for their effect

# The refusals that it meets are seen one by one in test_every_refusal.py.
pytestmark = pytest.mark.slow

Input = tuple[object, Callable[[], Any]]
Draw = Callable[[random.Random], Input]

SEED = 20261127
SECONDS = 20
MEMORY = 2**33  # bytes beyond what the process has

VALUES = (
    *("0", "1", "-1", "2", "3", "7", "64", "100000", "1000000000", "99999999999999999999"),
    *("0.5", "-0.5", "2.5", "1e-400", "1e400", "nan", "inf", "-inf", "1e9", "0x10", "1_000"),
    *("", " ", "x", "none", "None", "True", "pos2", "auto", "alltoall", "[]", "[0", "([0,1]*1)"),
    *(
        "1,2",
        "0:4 512:8",
        "/",
        "/dev/null",
        "/nowhere/x",
        "a=b",
        "é",
        "\u2028",
        "%",
        "'",
        '"',
        "\\",
    ),
)
BASE = [*TINY_MODEL, *TINY_MOE, "--mock-data"]
# What the host does before it reads options, asks a network for, or starts elsewhere.
LEFT_OUT = {"--help", "-h", "--help-scmoe", "--fault-injector-ranks"}


def in_fork(call: Callable[[], Any], output: Path) -> tuple[int, float, str]:
    """Exit code, seconds and output; -1 for a traceback, the negative signal for a killed one."""
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 0
        gc.disable()  # it would copy all that the parent has
        with output.open("w") as file, redirect_stdout(file), redirect_stderr(file):
            try:
                used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf(
                    "SC_PAGE_SIZE"
                )
                resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
                # Not pytest's handler: what hangs in native code never returns to Python for it.
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(SECONDS)
                faulthandler.dump_traceback_later(SECONDS - 1, file=file)
                # One that tests before have left would be waited for: its threads are not here.
                torch.distributed.distributed_c10d._update_default_pg(None)
                code = call() or 0
            except SystemExit as left:
                code = left.code if isinstance(left.code, int) else 0
            except BaseException:
                traceback.print_exc()
                code = 255
            file.flush()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return (-1 if code == 255 else code), time.monotonic() - began, output.read_text("utf-8")


def judge(code: int, seconds: float, output: str) -> str:
    """What is wrong with the end of one input, or nothing."""
    if code not in (0, 2):
        return f"exit code {code}: {output[-700:]}"
    if seconds > SECONDS:
        return f"took {seconds:.0f} s"
    lines = [line for line in output.splitlines() if ": error: " in line]
    if code and len(lines) != 1:
        return f"{len(lines)} lines of error: {output[-700:]}"
    return "" if "Traceback" not in output else output[-700:]


def options() -> list[Any]:
    parser = add_scmoe_args(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))
    return [
        action
        for action in parser._actions
        if action.option_strings and not set(action.option_strings) & LEFT_OUT
    ]


def command_line(chance: random.Random, actions: list[Any]) -> list[str]:
    """The base with one to three options that make no sense, of all or of those that it has."""
    line = list(BASE)
    if chance.random() < 0.7:
        line += ["--scmoe-shortcut-position", chance.choice(["pos1", "pos2", "pos3"])]
    for _ in range(chance.randint(1, 3)):
        action = chance.choice(actions)
        name = action.option_strings[0]
        if action.nargs == 0:
            line.append(name)
        elif action.choices and chance.random() < 0.5:
            line += [name, str(chance.choice(list(action.choices)))]
        else:
            line += [name, chance.choice(VALUES)]
    return line


def start(line: list[str]) -> None:
    """A run until it would join its process groups."""
    sys.argv = ["pretrain_gpt_scmoe.py", *line]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "WANDB_MODE": "disabled"}
    with say.user_errors():
        args = parse_and_validate_args()
        prepare(args)
        start_up(args)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def try_all(number: int, draw: Draw, output: Path) -> None:
    """Give inputs to a program, and say what was wrong with any.

    Args:
        number: of inputs.
        draw: an input, as it is shown, and the program that takes it.
    """
    chance = random.Random(SEED)
    bad, outcomes, ends = [], Counter[int](), Counter[str]()
    for _ in range(number * int(os.environ.get("FUZZ", "1"))):
        shown, call = draw(chance)
        code, seconds, text = in_fork(call, output)
        outcomes[code] += 1
        if wrong := judge(code, seconds, text):
            bad.append(f"{shown}: {wrong}")
        ends[text.splitlines()[-1][:150] if text else ""] += 1
    print(outcomes, *ends.most_common(9), sep="\n")
    assert not bad, f"{len(bad)} of {outcomes}:\n" + "\n".join(bad)


def test_command_lines(tmp_path: Path) -> None:
    actions = options()

    def draw(chance: random.Random) -> Input:
        line = command_line(chance, actions)
        return line[len(BASE) :], lambda: start(line)

    try_all(850, draw, tmp_path / "output.txt")


def test_plans(tmp_path: Path) -> None:
    """Of a cluster or a model that there is not."""
    actions = [
        action
        for action in add_planner_args(ArgumentParser(allow_abbrev=False))._actions
        if action.dest.startswith(("cluster_", "measured", "extrapolate", "json"))
    ]
    every = options()

    def draw(chance: random.Random) -> Input:
        line = [*MODEL.split(), *CLUSTER.split()]
        for _ in range(chance.randint(1, 3)):
            action = chance.choice(actions if chance.random() < 0.7 else every)
            value = [] if action.nargs == 0 else [chance.choice(VALUES)]
            line += [action.option_strings[0], *value]
        return line[len(MODEL.split()) :], lambda: run_main(plan_overlap.main, "plan", line)

    try_all(50, draw, tmp_path / "output.txt")


LINES = (
    *(b'{"text": "1 2 3"}',) * 9,
    *(b'{"text": ""}', b'{"text": 1}', b'{"text": null}', b'{"t": "1"}'),
    *(b"", b" ", b"{", b"[]", b"1", b"\xff\xfe", b"\x00", b'{"text": "\\ud800"}', b"[" * 100_000),
    *(b'{"text": "1"}{"text": "1"}', b'{"text": "99"}', b'{"text": "' + b"7 " * 100_000 + b'"}'),
)


def test_corpora(tmp_path: Path) -> None:
    """Lines, packed or not, and the options that say what to do with them."""
    actions = [
        action
        for action in parser_of(preprocess_data.parse_arguments)._actions
        if action.dest not in ("help", "workers", "trust_remote_code", "output_prefix")
    ]
    corpus = tmp_path / "corpus"

    def draw(chance: random.Random) -> Input:
        shutil.rmtree(corpus, ignore_errors=True)
        corpus.mkdir()
        text = b"\n".join(chance.choices(LINES, k=chance.randrange(4)))
        name = "text" + chance.choice((".jsonl", ".jsonl", ".gz", ".zst", ".xz", ".json"))
        packed = gzip.compress(text) if name.endswith("gz") and chance.random() < 0.7 else text
        (corpus / name).write_bytes(packed[: chance.choice((None, None, len(packed) // 2))])
        line = ["--input", str(corpus / name), "--output-prefix", str(corpus / "out")]
        line += ["--workers", "2", "--tokenizer-type", "NullTokenizer", "--vocab-size", "100"]
        for _ in range(chance.randrange(3)):
            action = chance.choice(actions)
            value = [] if action.nargs == 0 else [chance.choice(VALUES)]
            line += [action.option_strings[-1], *value]

        def call() -> int:
            code = run_main(preprocess_data.main, "preprocess", line)
            left = {path.name for path in corpus.iterdir()} - {name}
            assert not (code and left), left
            return code

        return (name, text[:40], line[8:]), call

    try_all(50, draw, tmp_path / "output.txt")


def test_damaged_data_sets(tmp_path: Path) -> None:
    """Bytes of either file changed, cut off or added; what is not refused is read to the end."""
    prefix = tmp_path / "text"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for length in (0, 1, 70, 3, 200) * 12:
        builder.add_document(numpy.arange(length) % 60, [length])
    builder.finalize(f"{prefix}.idx")
    whole = {end: Path(f"{prefix}.{end}").read_bytes() for end in ("idx", "bin")}

    def draw(chance: random.Random) -> Input:
        for end, content in whole.items():
            Path(f"{prefix}.{end}").write_bytes(content)
        end = chance.choice(("idx", "idx", "idx", "bin"))
        content = bytearray(whole[end])
        at = chance.randrange(len(content) if chance.random() < 0.7 else min(len(content), 42))
        how = chance.choice(("changed", "changed", "set", "cut", "added", "empty"))
        match how:
            case "changed":
                content[at] = chance.randrange(256)
            case "set":
                content[at : at + 8] = chance.choice((b"\xff", b"\x00", b"\x7f")) * 8
            case "cut":
                del content[at:]
            case "added":
                content[at:at] = chance.randbytes(chance.randint(1, 9))
            case "empty":
                content.clear()
        Path(f"{prefix}.{end}").write_bytes(content)
        return (end, how, at), lambda: read_all(["--data-path", str(prefix)])

    try_all(50, draw, tmp_path / "output.txt")


def read_all(data: list[str]) -> None:
    """What a run does with its data, and every sample of it."""
    start([*TINY_MODEL, *TINY_MOE, *data, "--split", "50,50,0", "--vocab-size", "70"])
    config = pretrain_gpt_scmoe.dataset_config_from_args(get_args())
    builder = BlendedMegatronDatasetBuilder(GPTDataset, (8, 8, 0), lambda: True, config)
    for dataset in filter(None, builder.build()):
        for sample in dataset:
            assert len(sample["tokens"]) == config.sequence_length


def run_main(main: Callable[..., int], name: str, line: list[str]) -> int:
    """A program's end with these words."""
    sys.argv = [name, *line]
    return main()

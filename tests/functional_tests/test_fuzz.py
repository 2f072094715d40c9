"""Command lines that somebody may type: each is taken, or refused in one line.

Seeded. Every line is handed to a fork of this process, which has imported everything, as far as a
run goes without process groups. None may end in a traceback, take long or eat memory.
FUZZ_LINES chooses how many.
"""

import os
import random
import resource
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

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_scmoe import say
from megatron_scmoe.arguments import add_scmoe_args, parse_and_validate_args, prepare
from megatron_scmoe.run.doctor.machine import start_up
from tests.functional_tests.launch import TINY_MODEL, TINY_MOE

# The refusals that it meets are seen one by one in test_every_refusal.py.
pytestmark = pytest.mark.slow

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
        with output.open("w") as file, redirect_stdout(file), redirect_stderr(file):
            try:
                used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf(
                    "SC_PAGE_SIZE"
                )
                resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
                signal.alarm(SECONDS)
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


def judge(code: int, seconds: float, output: str, codes: tuple[int, ...] = (0, 2)) -> str:
    """What is wrong with the end of one input, or nothing."""
    if code not in codes:
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


def test_command_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    chance, actions = random.Random(SEED), options()
    bad, outcomes = [], Counter[int]()
    for _ in range(int(os.environ.get("FUZZ_LINES", "250"))):
        line = command_line(chance, actions)
        code, seconds, output = in_fork(lambda line=line: start(line), tmp_path / "output.txt")
        outcomes[code] += 1
        if wrong := judge(code, seconds, output):
            bad.append(f"{line[len(BASE) :]}: {wrong}")
    print(outcomes)
    assert not bad, f"{len(bad)} of {outcomes}:\n" + "\n".join(bad)

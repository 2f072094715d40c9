"""README's cheap commands run; its options, files and links exist, and those of docs/."""

import argparse
import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.run
from megatron.training.arguments import add_megatron_arguments

from megatron_scmoe.arguments import add_scmoe_args
from megatron_scmoe.commands import generated_text, inspect_data, preprocess_data
from megatron_scmoe.planner.plan_arguments import add_planner_args

ROOT = Path(__file__).parents[2]
README, OPTIONS = ROOT / "README.md", ROOT / "docs" / "options.md"
WITH_OPTIONS = (
    *(README, OPTIONS, ROOT / "docs" / "operations.md"),
    *(ROOT / "examples" / name for name in ("paper_size.sh", "presets.sh", "small.sh")),
)
COMMANDS = (README, OPTIONS, ROOT / "docs" / "generation.md")
PAGES = (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")))
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
# Not on a command line of this package: Megatron's after 0.19, and Slurm's.
OTHERS = {"--moe-shortcut-connection", "--signal"}


def commands(page: Path) -> list[str]:
    """The lines of the page's sh blocks, without comments and placeholders."""
    text = page.read_text(encoding="utf-8")
    scripts = [
        block.replace("\\\n", "") for language, block in FENCED.findall(text) if language == "sh"
    ]
    lines = [line for script in scripts for line in script.splitlines()]
    return [re.sub(r"<.*?>|\s+#.*", "", line).strip() for line in lines]


README_COMMANDS = commands(README)


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize(
    "command", [command for command in README_COMMANDS if command.startswith("python")]
)
def test_command_runs(command: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) > 10


def test_make_has_the_targets() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    named = [command.split()[1] for command in README_COMMANDS if command.startswith("make")]
    assert named == ["pretrain", "test", "test-all"]
    assert set(named) <= set(targets)


def parser_of(parse: Callable[[list[str]], Any]) -> argparse.ArgumentParser:
    """The parser that a program parses its options with."""
    caught = []

    def parse_args(parser: argparse.ArgumentParser, *_: Any) -> None:
        caught.append(parser)
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        parse([])
    return caught[0]


def options_of(*parsers: argparse.ArgumentParser) -> set[str]:
    return {option for parser in parsers for option in parser._option_string_actions}


def training(add_options: Callable[[argparse.ArgumentParser], Any]) -> argparse.ArgumentParser:
    """The host's parser with the options of a program."""
    parser = argparse.ArgumentParser()
    add_megatron_arguments(parser)
    add_options(parser)
    return parser


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    """The options of each program."""
    return {
        "torchrun": options_of(torch.distributed.run.get_args_parser()),
        "pretrain_gpt_scmoe.py": options_of(training(add_scmoe_args)),
        "tools/generate.py": options_of(training(generated_text.add_options)),
        "tools/inspect_data.py": options_of(parser_of(inspect_data.parse_arguments)),
        "tools/plan_overlap.py": options_of(training(add_planner_args)),
        "tools/preprocess_data.py": options_of(parser_of(preprocess_data.parse_arguments)),
    }


@pytest.mark.parametrize(
    "command",
    [line for page in COMMANDS for line in commands(page) if ".py" in line],
)
def test_command_has_options_of_its_programs(command: str, known: dict[str, set[str]]) -> None:
    program = None
    for word in shlex.split(command):
        if word == "torchrun" or word.endswith(".py"):
            program = word
            assert word == "torchrun" or (ROOT / word).exists()
        elif word.startswith("--"):
            assert program is not None and word.split("=")[0] in known[program]


def test_options_exist(known: dict[str, set[str]]) -> None:
    # Neither --scmoe-* nor the arrows of README's figure.
    name = re.compile(r"(?<![\w-])--[a-z]\w*+(?:-\w++)*+(?![\w*-])")
    named = {option for page in WITH_OPTIONS for option in name.findall(page.read_text("utf-8"))}
    assert named - set().union(*known.values()) == OTHERS


def test_every_option_of_ours_has_a_row() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    add_scmoe_args(parser)
    rows = re.findall(r"^\| `(--[\w-]+)", OPTIONS.read_text(encoding="utf-8"), re.M)
    assert len(rows) == len(parser._actions)
    for action in parser._actions:
        assert set(action.option_strings) & set(rows), action.option_strings


def added_options(source: Path) -> Iterator[tuple[str, set[str]]]:
    """Every call of argparse's add_argument, or of `add`, its short name: option and keywords."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and node.args:
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            option = ast.unparse(node.args[0])
            if called == "add_argument" or (called == "add" and "--" in option):
                yield option, {str(keyword.arg) for keyword in node.keywords}


def test_every_option_of_every_program_is_explained() -> None:
    """In words, and its value by a name that is not the option's again."""
    programs = [
        path
        for part in ("megatron_scmoe", "tools", "examples", "docker", "tests")
        for path in (ROOT / part).rglob("*.py")
        if path.parent.name != "unit_tests"
    ]
    options = {
        (path.name, option): given for path in programs for option, given in added_options(path)
    }
    assert len(options) > 90
    silent = [name for name, given in options.items() if "help" not in given]
    named = {"metavar", "action", "choices"}
    nameless = [name for name, given in options.items() if "'--" in name[1] and not given & named]
    assert (silent, nameless) == ([], [])


def test_tree_is_the_packages() -> None:
    """Files that README's tree names exist, and no part of the package is left out."""
    blocks = [block for _, block in FENCED.findall(README.read_text("utf-8"))]
    (tree,) = [block for block in blocks if "megatron_scmoe/\n" in block]
    names = set()
    for line in tree.splitlines():
        base = ROOT / "megatron_scmoe" if line.startswith(" ") else ROOT
        first, *others = re.findall(r"[\w/]+(?:\.py|/)(?=[\s,;]|$)", line)
        assert (base / first).exists(), first
        for other in others:
            assert (base / other).exists() or (base / first / other).exists(), other
        names |= {first, *others}
    package = [
        *(ROOT / "megatron_scmoe").glob("*.py"),
        *(ROOT / "megatron_scmoe").glob("*/__init__.py"),
    ]
    parts = {
        path.name if path.parent.name == "megatron_scmoe" else f"{path.parent.name}/"
        for path in package
    }
    assert parts - {"__init__.py"} <= names


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the page's headings."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    assert len(set(headings)) == len(headings), "two headings of one name"
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_capabilities_are_short_and_have_their_tests() -> None:
    text = (ROOT / "docs" / "verification.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| (.+) \|$", text.split("## Layouts")[0], re.M)
    assert len(rows) > 40
    for capability, proof in rows:
        assert len(capability.split()) <= 12, capability
        for path in re.findall(r"tests/[\w/]+(?:\.py)?", proof):
            assert (ROOT / path).exists(), path

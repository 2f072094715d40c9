"""C2R through the entry script: counted, listed, gone on with, at any layout, out to Hugging Face.

The rule: unit_tests/test_c2r_router.py. The counts: unit_tests/test_collaboration_counts.py.
"""

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_scmoe.c2r import collaboration, lists, placement
from megatron_scmoe.commands import c2r, profile_experts
from megatron_scmoe.huggingface import export, load, verify

from .forked import launch_forked
from .launch import TINY_MODEL, TINY_MOE, Run

BEFORE, AFTER = 4, 3
EP2 = "--expert-model-parallel-size 2"
SAMPLES, LENGTH = 8, 32  # of a step, of a sample
OPTIONS = shlex.split(
    "--num-layers 4 --moe-layer-freq ([0,1]*2) --scmoe-shortcut-position pos2 --num-experts 8 "
    "--moe-router-topk 3 --moe-aux-loss-coeff 0 --lr-decay-style constant --adam-eps 1e-5 "
    "--use-distributed-optimizer --hidden-dropout 0 --attention-dropout 0"
)
LAYOUTS = {
    "expert parallel": EP2,
    "tensor and expert parallel": f"--tensor-model-parallel-size 2 --sequence-parallel {EP2} "
    "--expert-tensor-parallel-size 1",
    "pipeline parallel": "--pipeline-model-parallel-size 2",
    "expert parallel, placed, sent once": f"{EP2} --scmoe-dispatch-copies rank "
    "--scmoe-expert-placement {placement}",
}
PLACED = ((6, 1, 3, 4), (0, 7, 2, 5))


def train(data: Path, folder: Path, layout: str, *options: str, ranks: int = 2) -> Run:
    source = ["--data-path", str(data), "--split", "100,0,0", "--eval-iters", "0"]
    cache = ["--data-cache-path", str(data.parent / "cache")]
    words = [*TINY_MODEL, *TINY_MOE, *OPTIONS, *shlex.split(layout), *source, *cache, *options]
    return launch_forked(words, ranks, folder)


def succeeded(run: Run) -> Run:
    assert run.returncode == 0, run.stdout[-3000:]
    return run


@pytest.fixture(scope="module")
def base(data_prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained at EP 2 without lists: `checkpoints`, `counts/`, and `lists.json` from the counts."""
    folder = tmp_path_factory.mktemp("base")
    saves = ["--save", str(folder / "checkpoints"), "--save-interval", "3"]
    steps = ["--train-iters", str(BEFORE), "--scmoe-collaboration-dir", str(folder / "counts")]
    succeeded(train(data_prefix, folder, EP2, *saves, *steps))
    matrix = folder / "counts" / f"iter_{BEFORE:07d}.json"
    words = ["lists", "--matrix", str(matrix), "--output", str(folder / "lists.json")]
    assert c2r.main(words) == 0
    return folder


def continued(base: Path, *options: str) -> list[str]:
    """The options of a run that goes on from the base."""
    steps = ["--train-iters", str(BEFORE + AFTER)]
    return ["--load", str(base / "checkpoints"), *steps, *options]


@pytest.fixture(scope="module")
def constrained(base: Path, data_prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gone on with lists, T = 2, on one process: the run, and its checkpoints."""
    folder = tmp_path_factory.mktemp("constrained")
    own = ["--scmoe-c2r-lists", str(base / "lists.json"), "--scmoe-c2r-top-t", "2"]
    save = ["--save", str(folder / "checkpoints"), "--save-interval", str(AFTER)]
    run = train(data_prefix, folder, "", *continued(base, *own, *save), ranks=1)
    return succeeded(run), folder / "checkpoints"


def test_a_run_counts_all_its_tokens(base: Path) -> None:
    """Over its ranks; a file has what was chosen since the one before."""
    names = sorted(path.name for path in (base / "counts").iterdir())
    assert names == ["iter_0000003.json", "iter_0000004.json"]
    for name, steps in zip(names, (3, 1), strict=True):
        counts = collaboration.read(base / "counts" / name)
        assert (counts.experts, counts.topk, [*counts.layers]) == (8, 3, [2, 4])
        for layer in counts.layers.values():
            assert layer.tokens == steps * SAMPLES * LENGTH
            assert layer.chosen.sum() == 3 * layer.tokens
            assert layer.together.sum() == 3 * 2 * layer.tokens
            assert layer.set_tokens is not None and layer.set_tokens.sum() == layer.tokens


def test_a_run_takes_lists_up(constrained: Any) -> None:
    """From a checkpoint without, with its optimizer; and says so."""
    run, _ = constrained
    assert "--scmoe-c2r-lists sets --scmoe-router c2r" in run.stdout
    assert f"iteration {BEFORE}: experts are chosen by --scmoe-router c2r from now on" in run.stdout
    assert [*run.log] == [*range(BEFORE + 1, BEFORE + AFTER + 1)]


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param("expert parallel", marks=pytest.mark.slow),  # the next one has it
        "tensor and expert parallel",
        "pipeline parallel",
        "expert parallel, placed, sent once",
    ],
)
def test_every_layout_computes_what_one_process_does(
    base: Path, data_prefix: Path, constrained: Any, layout: str, tmp_path: Path
) -> None:
    own = ["--scmoe-c2r-lists", str(base / "lists.json"), "--scmoe-c2r-top-t", "2"]
    file = tmp_path / "placement.json"
    placement.write(file, placement.Placement(8, 2, 2, {2: PLACED, 4: PLACED[::-1]}))
    words = LAYOUTS[layout].format(placement=file)
    run = succeeded(train(data_prefix, tmp_path, words, *continued(base, *own)))
    for iteration, wanted in constrained[0].log.items():
        found = run.log[iteration]
        assert found["lm loss"] == pytest.approx(wanted["lm loss"], rel=1e-5)
        assert found["grad norm"] == pytest.approx(wanted["grad norm"], abs=2e-3)


def test_the_lists_are_the_checkpoints(
    base: Path, data_prefix: Path, constrained: Any, tmp_path: Path
) -> None:
    """A run goes on without naming them, at another layout; named ones take their place."""
    _, checkpoints = constrained
    last = BEFORE + AFTER
    more = ["--load", str(checkpoints), "--train-iters", str(last + 1)]
    save = ["--save", str(tmp_path / "more"), "--save-interval", "1"]
    words = [*more, *save, "--scmoe-router", "c2r"]
    layout = LAYOUTS["pipeline parallel"]
    run = succeeded(train(data_prefix, tmp_path / "pp2", layout, *words))
    assert "sets the lists of partners; --scmoe-c2r-top-t 2 there, 2 here" in run.stdout
    there, here = (export.open_checkpoint(path) for path in (checkpoints, tmp_path / "more"))
    given = lists.read(base / "lists.json")
    for number in (2, 4):
        name = f"decoder.layers.{number - 1}.mlp.router.partners"
        for source in (there, here):
            found = source.reader.read(source.reader.place(name)).numpy()
            np.testing.assert_array_equal(found, given.layers[number])

    for number, partners in given.layers.items():
        given.layers[number] = partners[:, ::-1].copy()
    lists.write(tmp_path / "others.json", given)
    others = ["--scmoe-c2r-lists", str(tmp_path / "others.json"), "--scmoe-c2r-top-t", "3"]
    save = ["--save", str(tmp_path / "others"), "--save-interval", "1"]
    run = succeeded(train(data_prefix, tmp_path / "one", "", *more, *save, *others, ranks=1))
    assert "others.json take the place of the checkpoint's; --scmoe-c2r-top-t 2" in run.stdout
    source = export.open_checkpoint(tmp_path / "others")
    found = source.reader.read(source.reader.place("decoder.layers.1.mlp.router.partners"))
    np.testing.assert_array_equal(found.numpy(), given.layers[2])


def test_there_and_back_from_hugging_face(constrained: Any, tmp_path: Path) -> None:
    """Every tensor as it was, partners too."""
    _, checkpoints = constrained
    export.export(checkpoints, tmp_path / "hf", say=lambda line: None)
    assert verify.compare_tensors(checkpoints, tmp_path / "hf", say=lambda line: None) is None
    load.load(tmp_path / "hf", tmp_path / "back", say=lambda line: None)
    assert verify.compare_tensors(tmp_path / "back", tmp_path / "hf", say=lambda line: None) is None


@pytest.mark.slow  # unit_tests/test_huggingface_model.py has the rule of one layer
def test_both_models_give_the_same_logits(constrained: Any, tmp_path: Path) -> None:
    _, checkpoints = constrained
    export.export(checkpoints, tmp_path / "hf", say=lambda line: None)
    found = verify.compare_logits(checkpoints, tmp_path / "hf")
    assert found.same, found.text()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--scmoe-router c2r --scmoe-c2r-top-t 2", "--scmoe-router c2r has no lists of partners"),
        ("--scmoe-c2r-lists LISTS --scmoe-c2r-top-t 2 --num-layers 2", "it has layer 4, which"),
        ("--scmoe-collaboration-dir LISTS", "--scmoe-collaboration-dir would stay empty"),
    ],
)
def test_refused(base: Path, data_prefix: Path, tmp_path: Path, options: str, line: str) -> None:
    words = shlex.split(options.replace("LISTS", str(base / "lists.json")))
    if "--num-layers" in words:
        words += ["--moe-layer-freq", "([0,1]*1)"]
    run = train(data_prefix, tmp_path, "", *words, ranks=1)
    assert run.returncode == 2
    (said,) = [text for text in run.stdout.splitlines() if "error: " in text]
    assert line in said


def profiled(base: Path, data: Path, folder: Path, layout: str, ranks: int) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / "profile.safetensors"
    words = ["--load", str(base / "checkpoints"), "--data-path", str(data), "--tokens", "1500"]
    words += ["--output", str(output), *shlex.split(layout.replace("--sequence-parallel", ""))]
    run = succeeded(launch_forked(words, ranks, folder, main=profile_experts.main))
    assert "ranks of 4" in run.stdout
    return collaboration.read(output)


@pytest.fixture(scope="module")
def by_one(base: Path, data_prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return profiled(base, data_prefix, tmp_path_factory.mktemp("by_one"), "", 1)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param("expert parallel", marks=pytest.mark.slow),
        "tensor and expert parallel",
        pytest.param("pipeline parallel", marks=pytest.mark.slow),
    ],
)
def test_every_layout_profiles_the_same(
    base: Path, data_prefix: Path, by_one: Any, layout: str, tmp_path: Path
) -> None:
    """Every token once, whoever sees it; a token at a tie may choose otherwise."""
    assert by_one.provenance["iteration"] == BEFORE
    found = profiled(base, data_prefix, tmp_path, LAYOUTS[layout], 2)
    assert [*found.layers] == [*by_one.layers]
    for number, layer in by_one.layers.items():
        other = found.layers[number]
        assert other.tokens == layer.tokens == 1500 // LENGTH * LENGTH
        assert np.abs(other.together - layer.together).sum() <= 8
        assert other.set_tokens.sum() == layer.tokens

"""The frame of the proof on a GPU, with toy parts; its bundle; and what it counts as a wait.

The parts themselves are rehearsed in tests/functional_tests/test_gpu_proof.py.
"""

import json
import os
import stat
import subprocess
import sys
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch

from tools.gpu_proof import environment
from tools.gpu_proof.bundle import PACKAGES, TRANSFORMER_ENGINE, pack, requirements
from tools.gpu_proof.observed_run import Wait, watched
from tools.gpu_proof.parts import PARTS
from tools.gpu_proof.results import ProofFinding, Results, read_findings
from tools.gpu_proof.runs import ProofRun, difference
from tools.gpu_proof.summary import write_summary

REPOSITORY = Path(__file__).parents[2]
RUN = "def run(results, device, seconds):\n"
HANG_S = 20  # longer than torch takes to import on a busy machine; on a GPU a quarter of it
TOYS = {
    "good": "import os, pathlib\n"
    + RUN
    + "    sleeper = pathlib.Path(os.environ['SLEEPER'])\n"
    + "    pid = sleeper.read_text().strip() if sleeper.exists() else 'none'\n"
    + "    results.check('alone', not pathlib.Path('/proc', pid).exists())\n"
    + "    results.check('device', device.type == 'cpu')\n"
    + "    results.check('time', 60 < seconds < 240)\n"
    + "    results.measured('size', bytes=12)\n",
    # What it starts lives in a session of its own, and has lost its parent.
    "hangs": "import os, subprocess, sys, time\n"
    + RUN
    + "    results.check('before', True)\n"
    + "    subprocess.run(['sh', '-c', 'setsid sleep 1000 & echo $! > ' + os.environ['SLEEPER']])\n"
    + '    results._file.open(\'a\').write(\'{"part": "hangs", "na\')\n'
    + "    time.sleep(1000)\n",
    "crashes": "import os\n" + RUN + "    results.check('before', True)\n    os.abort()\n",
    "raises": RUN + "    raise ValueError('too small: 3')\n",
    "wrong": RUN + "    results.check('sum', False, 'is 3')\n",
}
DRIVER = f"""\
import sys
from tools.gpu_proof.__main__ import main
from tools.gpu_proof.parts import ProofPart
limits = {{name: {HANG_S / 4} if name == "hangs" else 60 for name in sys.argv[1].split(",")}}
parts = {{name: ProofPart(limit_s, True) for name, limit_s in limits.items()}}
sys.exit(main(sys.argv[2:], "toys", parts))
"""


@pytest.fixture
def toys(tmp_path: Path) -> Path:
    folder = tmp_path / "toys"
    folder.mkdir()
    for name, text in TOYS.items():
        (folder / f"{name}.py").write_text(text)
    (tmp_path / "driver.py").write_text(DRIVER)
    return tmp_path


def prove(
    toys: Path, names: str, *options: str, device: str = "cpu"
) -> tuple[subprocess.CompletedProcess, Path]:
    """The frame on toy parts, and its output folder."""
    output = toys / "output"
    command = [sys.executable, str(toys / "driver.py"), names, "--output", str(output)]
    env = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{toys}", "SLEEPER": str(toys / "sleeper")}
    done = subprocess.run(
        [*command, "--device", device, *options],
        cwd=REPOSITORY,
        env=env | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    return done, output


def outcomes(output: Path) -> list[tuple[str, str, str]]:
    return [(f.part, f.name, f.outcome) for f in read_findings(output)]


def test_a_part_that_fails_in_any_way_takes_no_other_with_it(toys: Path) -> None:
    done, output = prove(toys, "hangs,crashes,raises,good")
    assert done.returncode == 1, done.stderr
    assert outcomes(output) == [
        ("hangs", "before", "passed"),
        ("hangs", "the part ends", "failed"),
        ("crashes", "before", "passed"),
        ("crashes", "the part ends", "failed"),
        ("raises", "the part ends", "failed"),
        ("good", "alone", "passed"),
        ("good", "device", "passed"),
        ("good", "time", "passed"),
        ("good", "size", "measured"),
    ]
    notes = {f.part: f.note for f in read_findings(output) if f.name == "the part ends"}
    assert notes == {
        "hangs": f"killed at its limit of {HANG_S} s",
        "crashes": notes["crashes"],
        "raises": "exit code 1: ValueError: too small: 3",
    }
    assert notes["crashes"].startswith("ended by SIGABRT: ")
    assert not Path("/proc", (toys / "sleeper").read_text().strip()).exists()

    summary = json.loads((output / "summary.json").read_text())
    assert summary["parts"]["hangs"]["failed"] == 1
    assert HANG_S <= summary["parts"]["hangs"]["seconds"] < HANG_S + 5
    assert len(summary["findings"]) == 9
    assert summary["environment"] == json.loads((output / "environment.json").read_text())
    assert summary["environment"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert len(list(output.iterdir())) <= 8  # the lent machine gives back no more

    screen = done.stdout.splitlines()
    assert [line for line in screen if line.startswith("measured")] == [
        "measured good: size; bytes 12"
    ]
    assert screen[-1].split() == ["good", "3", "0", "1", "0", *screen[-1].split()[5:]]
    failed = [line for line in screen if line.startswith("failed")]
    assert failed[:3] == failed[3:]  # as they came, and again above the table


@pytest.mark.slow  # both codes are seen in the tests around it
def test_exit_codes_and_what_is_left_out(toys: Path) -> None:
    done, output = prove(toys, "wrong,good", "--only", "good")
    assert (done.returncode, {part for part, *_ in outcomes(output)}) == (0, {"good"})
    again, _ = prove(toys, "wrong,good")
    assert again.returncode == 2
    assert again.stderr.splitlines() == [
        f"gpu_proof: error: {output} holds an earlier proof: choose another --output"
    ]
    (output / "findings.jsonl").unlink()
    assert prove(toys, "wrong")[0].returncode == 1


def test_parts_for_which_no_time_is_left_are_skipped(toys: Path) -> None:
    done, output = prove(toys, "wrong,good", "--minutes", "0.1")
    assert done.returncode == 0
    assert outcomes(output) == [
        ("wrong", "the part", "skipped"),
        ("good", "the part", "skipped"),
    ]
    assert read_findings(output)[0].note == "6 s are left, it needs 20"


def test_without_a_device_it_is_one_line(toys: Path) -> None:
    done, output = prove(toys, "good", device="cuda")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "gpu_proof: error: no CUDA device here; --device cpu rehearses the proof at tiny sizes"
    ]
    assert not output.exists()


def test_parts_are_modules_that_run() -> None:
    """All together in twelve minutes, as docs/gpu.md has it."""
    for name, part in PARTS.items():
        source = REPOSITORY / "tools" / "gpu_proof" / f"{part.module or name}.py"
        assert (
            "\ndef run(results: Results, device: torch.device, seconds: float)"
            in source.read_text()
        )
    assert sum(part.limit_s for part in PARTS.values()) <= 750


def test_findings_on_the_page(tmp_path: Path) -> None:
    results = Results("toy", tmp_path, echo=False)
    results.check("right", True)
    results.check("wrong", False, "1 | 2", seconds=0.25)
    with results.guarded("block"):
        raise RuntimeError("first line\nsecond line")
    machine = {
        "command": "python -m tools.gpu_proof",
        "commit": "abc",
        "date": "today",
        "machine": {"processor": "p", "cores": 1, "memory_gib": 1, "kernel": "k"}
        | {"load_average": 0.0},
        "versions": {"torch": "2"},
        "gpu": {"card": "H100", "driver": "580"},
    }
    findings = read_findings(tmp_path)
    screen = write_summary(tmp_path, machine, findings, {"toy": 3.0})
    assert "failed   toy: block; RuntimeError: first line" in screen
    page = (tmp_path / "summary.md").read_text()
    assert "card H100, driver 580." in page
    assert page.index("- failed   toy: wrong") < page.index("| passed | right |")
    assert "| failed | wrong | seconds 0.25 | 1 \\| 2 |" in page


# Runs. --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("a\n[rank0]: ValueError: two\n  error_file: <N/A>\n", "[rank0]: ValueError: two"),
        ("pretrain_gpt_scmoe.py: error: three\nlast\n", "pretrain_gpt_scmoe.py: error: three"),
        ("nothing\nlast\n\n", "last"),
    ],
)
def test_the_line_of_a_run_that_says_what_was_wrong(output: str, said: str) -> None:
    assert ProofRun("toy", 3, output, 1.0).error() == f"exit code 3: {said}"


@pytest.mark.parametrize("losses", [{}, {1: float("nan")}])
def test_a_run_without_finite_losses_has_failed(tmp_path: Path, losses: dict[int, float]) -> None:
    results = Results("toy", tmp_path, echo=False)
    assert not ProofRun("toy", 0, "", 1.0, {"lm loss": losses}).ended(results)
    assert ProofRun("toy", 0, "", 1.0, {"lm loss": {1: 2.0}}).ended(results)
    assert [finding.outcome for finding in read_findings(tmp_path)] == ["failed", "passed"]


def test_difference_of_curves() -> None:
    assert difference({1: 2.0, 2: 4.1}, {1: 2.0, 2: 4.0}) == pytest.approx(0.025)
    assert difference({1: 2.0}, {1: 2.0, 2: 4.0}) == float("inf")
    assert difference({}, {}) == float("inf")


def asks_for_a_value() -> None:
    warnings.warn("called a synchronizing CUDA operation", stacklevel=1)


def test_waits_are_counted_where_they_are_asked_for() -> None:
    counts: Counter[Wait] = Counter()
    with pytest.warns(UserWarning, match="something else"), watched(counts):
        for _ in range(3):
            asks_for_a_value()
        torch.cuda.Event().synchronize()
        torch.cuda.synchronize()
        warnings.warn("something else", stacklevel=1)
    with pytest.warns(UserWarning):
        asks_for_a_value()
    torch.cuda.synchronize()
    found = {
        (kind, site.rpartition(":")[0], site.split()[-1]): n for (kind, site), n in counts.items()
    }
    here = "tests/unit_tests/test_gpu_proof.py"
    name = "test_waits_are_counted_where_they_are_asked_for"
    assert found == {
        ("reported by torch", here, "asks_for_a_value"): 3,
        ("event", here, name): 1,
        ("device", here, name): 1,
    }


# The bundle. --------------------------------------------------------------------------------------


def test_packages_of_the_bundle_have_versions() -> None:
    wanted = requirements(PACKAGES + TRANSFORMER_ENGINE)
    assert "megatron-core==0.19.2" in wanted
    assert [name for name in wanted if name.count("==") != 1] == []


def test_packing_a_wheel_changes_its_size_only(tmp_path: Path) -> None:
    wheel, packed = tmp_path / "a.whl", tmp_path / "b.whl"
    text = ("abc" * 5 + "\n") * 4000
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as file:
        entry = zipfile.ZipInfo("bin/tool")
        entry.external_attr = (stat.S_IFREG | 0o755) << 16
        file.writestr(entry, text)
    pack(wheel, packed)
    with zipfile.ZipFile(packed) as file:
        (info,) = file.infolist()
        assert file.read("bin/tool").decode() == text
        assert info.external_attr >> 16 == stat.S_IFREG | 0o755
        assert info.compress_type == zipfile.ZIP_LZMA


def test_a_finding_is_one_line() -> None:
    finding = ProofFinding("toy", "sum", "failed", "is 3", {"seconds": 0.123456})
    assert finding.line() == "failed   toy: sum; seconds 0.1235; is 3"


def test_the_wrong_python_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "needed_by", lambda name: set())
    assert environment.main(str(tmp_path / "new")) == 2
    assert "has no torch: put the python3 that has it first" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()

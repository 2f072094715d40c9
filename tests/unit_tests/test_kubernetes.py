"""Manifests agree with themselves and with the options of a run; docker/node.sh passes SIGTERM on.

Whether they follow the published schemas is said by examples/kubernetes/validate.py.
"""

import argparse
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from megatron.training.arguments import add_megatron_arguments

from megatron_scmoe.arguments import add_scmoe_args

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "kubernetes"
NODE = ROOT / "docker" / "node.sh"
LIMIT_S = 60


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def test_the_jobset_names_one_number_of_nodes_and_its_first_node() -> None:
    (jobset,) = documents("jobset.yaml")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    values = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert {str(job["parallelism"]), str(job["completions"])} == {values["PET_NNODES"]}
    assert values["PET_NPROC_PER_NODE"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    name = jobset["metadata"]["name"]
    assert values["PET_MASTER_ADDR"] == f"{name}-{replicated['name']}-0-0.{name}"


def test_the_trainjob_finds_its_runtime() -> None:
    runtime, job = documents("trainjob.yaml")
    reference = job["spec"]["runtimeRef"]
    assert reference["name"] == runtime["metadata"]["name"]
    assert reference["kind"] == runtime["kind"]
    assert runtime["apiVersion"].startswith(f"{reference['apiGroup']}/")
    trainer = job["spec"]["trainer"]
    assert trainer["numProcPerNode"] == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]


def trainers() -> list[dict[str, Any]]:
    """What the pods run."""
    (jobset,) = documents("jobset.yaml")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    return [*pod["containers"], documents("trainjob.yaml")[1]["spec"]["trainer"]]


@pytest.mark.parametrize("trainer", trainers(), ids=["jobset", "trainjob"])
def test_options_and_files_exist(trainer: dict[str, Any]) -> None:
    script, program = trainer["command"]
    assert (ROOT / program).exists() and os.access(ROOT / script, os.X_OK)
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    args = add_scmoe_args(parser).parse_args(trainer["args"])
    assert args.exit_signal_handler and args.save == args.load
    assert all((ROOT / file).exists() for file in args.config)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """One with a torchrun whose rank ends well when it is told to."""
    launcher = tmp_path / "torchrun"
    launcher.write_text(
        "#!/bin/bash\n"
        'if [ "$3" = fail ]; then exit 5; fi\n'
        "bash -c 'trap \"exit 0\" TERM; echo ready; while :; do sleep 0.05; done' &\n"
        "wait $!\n"
    )
    launcher.chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}


def test_sigterm_goes_to_the_ranks_and_is_no_success(environment: dict[str, str]) -> None:
    with subprocess.Popen([NODE, "program"], env=environment, stdout=subprocess.PIPE) as node:
        assert node.stdout is not None and node.stdout.readline() == b"ready\n"
        node.send_signal(signal.SIGTERM)
        assert node.wait(LIMIT_S) == 143


def test_the_exit_code_is_torchruns(environment: dict[str, str]) -> None:
    assert subprocess.run([NODE, "fail"], env=environment, timeout=LIMIT_S).returncode == 5

"""Two nodes in containers: a job by each of the ways of docker/, and what a killed node costs.

    python -m tests.functional_tests.containers [--image IMAGE] [--build BASE_IMAGE]

Needs a Docker engine, and compose as its plugin or as docker-compose. `--build` makes the image
first (docker/Dockerfile.cpu on BASE_IMAGE; the build uses the network of this machine).

    compose     docker/compose.yaml: text, tokens, training, checkpoints, report
    run         docker/two_nodes.sh: the same losses, bit for bit
    killed      a node's container gets SIGKILL in mid-run and is started again, first the one
                without the rendezvous, then the one with it: the job goes on from the last
                checkpoint, and every loss that any attempt logged is that of the first run
    user        the doctor as a user without a name

Prints a line for each; exit code 1 if anything differs.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.functional_tests.launch import REPOSITORY, read_events
from tests.functional_tests.layouts import CURVES
from tests.limits import CLUSTER_S

ITERATIONS = 200
KILL_AFTER = 50  # iterations saved
JOB = "scmoe-test"

Curves = dict[str, set[tuple[int, float]]]


def docker(*arguments: str, check: bool = True, seconds: float = CLUSTER_S) -> str:
    """What a command of Docker's prints."""
    done = subprocess.run(
        ["docker", *arguments], capture_output=True, text=True, timeout=seconds, check=False
    )
    if check and done.returncode:
        raise RuntimeError(f"docker {arguments[0]}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def compose() -> list[str]:
    """How compose is called here."""
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
    return ["docker", "compose"] if plugin.returncode == 0 else ["docker-compose"]


def curves(image: str, volume: str) -> Curves:
    """What all attempts of the job in a volume logged."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.tar"
        with path.open("wb") as file:
            content = ["tar", "--create", "--directory", "/data", "tensorboard"]
            subprocess.run(
                ["docker", "run", "--rm", "--volume", f"{volume}:/data", image, *content],
                stdout=file,
                timeout=CLUSTER_S,
                check=True,
            )
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")
        return {tag: set(read_events(Path(folder) / "tensorboard", tag)) for tag in CURVES}


@contextlib.contextmanager
def by_compose(image: str) -> Iterator[str]:
    """A job by compose.yaml that has ended; its volume, which goes with the block."""
    command = [*compose(), "--file", "docker/compose.yaml", "--project-name", JOB]
    environment = os.environ | {"IMAGE": image, "ITERATIONS": str(ITERATIONS)}
    try:
        subprocess.run(
            [*command, "up"],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            timeout=CLUSTER_S,
            check=True,
        )
        yield f"{JOB}_data"
    finally:
        subprocess.run(
            [*command, "down", "--volumes"],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            timeout=CLUSTER_S,
            check=False,
        )


@contextlib.contextmanager
def by_run(image: str, killed: int | None = None) -> Iterator[tuple[str, str]]:
    """A job by two_nodes.sh that has ended, one of its nodes killed meanwhile.

    Yields:
        its volume, which goes with the block, and what the script printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = subprocess.Popen(
            [REPOSITORY / "docker" / "two_nodes.sh", image],
            cwd=folder,
            env=os.environ | {"JOB": JOB, "ITERATIONS": str(ITERATIONS)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            if killed is not None:
                kill_and_start(f"{JOB}-node{killed}", job)
            output, _ = job.communicate(timeout=CLUSTER_S)
            if job.returncode:
                logs = "".join(path.read_text()[-2000:] for path in Path(folder).glob("*.log"))
                raise RuntimeError(f"two_nodes.sh: {output[-2000:]}\n{logs}")
            yield JOB, output
        finally:
            job.terminate()
            job.wait()
            docker("volume", "rm", JOB, check=False)


def kill_and_start(node: str, job: subprocess.Popen[str]) -> None:
    """SIGKILL to a node as soon as enough is saved, and its return five seconds later."""
    deadline = time.monotonic() + CLUSTER_S
    tracker = "/data/checkpoints/latest_checkpointed_iteration.txt"
    while True:
        saved = docker("exec", node, "cat", tracker, check=False).strip()
        if saved.isdigit() and int(saved) >= KILL_AFTER:
            break
        if job.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"nothing to kill: {saved} iterations were saved")
        time.sleep(1)  # each look starts a process in the container
    docker("kill", node)
    time.sleep(5)
    docker("start", node)


def main() -> int:
    """Run the program; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--image", default="megatron-scmoe:cpu", metavar="IMAGE", help="made by Dockerfile.cpu"
    )
    parser.add_argument("--build", metavar="BASE_IMAGE", help="make the image first, on this one")
    options = parser.parse_args()
    if shutil.which("docker") is None or not docker("info", check=False):
        parser.error("needs a Docker engine: install one, or start it.")
    if options.build:
        base = f"BASE_IMAGE={options.build}"
        what = ["--file", "docker/Dockerfile.cpu", "--tag", options.image, str(REPOSITORY)]
        docker("build", "--network", "host", "--build-arg", base, *what, seconds=1800)
    bad = 0

    def report(what: str, good: bool, note: str) -> None:
        nonlocal bad
        bad += not good
        print(f"{'passed' if good else 'FAILED'}  {what}: {note}", flush=True)

    with by_compose(options.image) as volume:
        reference = curves(options.image, volume)
    steps = len(reference["lm loss"])
    (_, first), *_, (_, last) = sorted(reference["lm loss"])
    report("compose", steps == ITERATIONS and last < first, f"{steps} losses, {first} -> {last}")
    for killed in (None, 1, 0):
        with by_run(options.image, killed) as (volume, output):
            same = curves(options.image, volume) == reference
        what = "run" if killed is None else f"killed, node {killed}"
        shown = "hidden" in output
        report(what, same and shown, f"bitwise {same}; the report is printed: {shown}")
    user = ["--user", "12345", "--env", "HOME=/tmp"]
    said = docker("run", "--rm", *user, options.image).strip().splitlines()
    report("user", said[-1:] == ["0 errors, 0 warnings"], " ".join(said[-1:]))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

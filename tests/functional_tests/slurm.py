"""A Slurm of two nodes on this machine, and how examples/slurm/pretrain.sbatch fares on it.

    python -m tests.functional_tests.slurm

Needs root, and of Debian slurmctld, slurmd, slurm-client and munge, which need no configuration.
Everything is in a temporary folder and ends with the program.

    whole       doctor, then EP 2 across the nodes, to the end
    time is up  the script gets the SIGTERM that Slurm sends before the end of a job's time: all
                ranks save and leave, the job is queued again
    preempted   a job of a higher partition takes the nodes: the same
    node lost   Slurm is told that a node is down: the job is queued again at once, nothing is saved

A job that is queued again goes on from its last checkpoint, and every loss that any attempt logged
is that of the whole one, bit for bit. Prints a line for each; exit code 1 if anything differs.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.functional_tests.launch import REPOSITORY, free_port, read_events
from tests.functional_tests.layouts import CURVES
from tests.functional_tests.text import write_text
from tests.limits import CLUSTER_S, PROCESS_S

SCRIPT = REPOSITORY / "examples" / "slurm" / "pretrain.sbatch"
CASES = REPOSITORY / "tests" / "functional_tests" / "test_cases"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "mungekey")
NODES = 2
ITERATIONS = 120
DISTURB_AFTER = 20  # iterations saved
GRACE_S = 120  # for a job that is preempted

# What makes a node of a part of this machine, and what lets a job that is queued again start soon.
CONFIG = """
ClusterName=scmoe
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
FirstJobId={first}
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=10
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
StateSaveLocation={folder}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
ReturnToService=2
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime={grace}
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""

Curves = dict[str, set[tuple[int, float]]]


def ask(*command: str) -> str:
    """What a program of Slurm's prints."""
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=PROCESS_S, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:2])}: {done.stderr.strip()[-2000:]}")
    return done.stdout.strip()


def wait_for(what: str, holds: Callable[[], bool]) -> None:
    """Look every half second.

    Raises:
        RuntimeError: it did not come true.
    """
    deadline = time.monotonic() + CLUSTER_S
    while not holds():
        if time.monotonic() > deadline:
            raise RuntimeError(f"no {what} after {CLUSTER_S} s\n{ask('scontrol', 'show', 'job')}")
        time.sleep(0.5)


def end_all_jobs() -> None:
    """Before those who would do it are gone."""
    with contextlib.suppress(RuntimeError):
        for job in ask("squeue", "--noheader", "--format", "%i").split():
            ask("scancel", "--full", "--signal", "KILL", job)
            ask("scancel", job)
        wait_for("end of all jobs", lambda: not ask("squeue", "--noheader"))


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """A controller and two nodes, which SLURM_CONF names within the block."""
    ports = [free_port() for _ in range(NODES)]
    nodes = (
        f"NodeName=node{i} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=1"
        for i, port in enumerate(ports)
    )
    values = {"folder": folder, "host": os.uname().nodename, "port": free_port(), "grace": GRACE_S}
    values["first"] = free_port() - 20_000  # of which the script makes the port of its ranks
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(**values, nodes="\n".join(nodes)))
    os.environ["SLURM_CONF"] = str(config)
    (folder / "state").mkdir()
    ask("mungekey", "--create", "--keyfile", f"{folder}/munge.key")
    files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log"}
    files |= {"seed-file": "seed"}
    munge = [f"--{option}={folder}/munge.{end}" for option, end in files.items()]
    commands = [["munged", "--foreground", "--force", *munge], ["slurmctld", "-D"]]
    commands += [["slurmd", "-D", "-N", f"node{i}"] for i in range(NODES)]
    running = []
    try:
        for command in commands:
            with (folder / f"{command[0]}-{len(running)}.txt").open("w") as log:
                running.append(subprocess.Popen(command, stdout=log, stderr=log))
            time.sleep(1)  # munged has to be there for the others
        idle = ["sinfo", "--noheader", "--partition", "low", "--states", "idle", "--format", "%D"]
        wait_for("idle nodes", lambda: ask(*idle) == str(NODES))
        yield
    except RuntimeError as error:
        logs = "".join(path.read_text()[-1000:] for path in sorted(folder.glob("*.txt")))
        raise RuntimeError(f"{error}\n{logs}") from error
    finally:
        end_all_jobs()
        for process in reversed(running):
            process.terminate()
            process.wait(PROCESS_S)


class SlurmJob:
    """pretrain.sbatch with a folder of its own, submitted to the lower partition."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.run = folder / "run"
        self.events = folder / "tensorboard"
        folder.mkdir()
        os.environ |= {
            "RUN": str(self.run),
            "ACTIVATE": f"{sys.prefix}/bin/activate",
            "OMP_NUM_THREADS": "1",
            "PLATFORM": "cpu",
            "DATA_PATH": str(data),
            "DATA_CACHE_PATH": str(data.parent / "cache"),
            "TENSORBOARD_PATH": str(self.events),
        }
        options = ["--config", str(CASES / "pos2_alltoall" / "model_config.yaml")]
        options += ["--train-iters", str(ITERATIONS), "--save-interval", "20"]
        slurm = ["--parsable", "--partition", "low", "--time", "60"]
        slurm += ["--output", f"{folder}/script.txt"]
        self.number = ask("sbatch", *slurm, str(SCRIPT), *options)

    def says(self, word: str) -> str:
        """'RUNNING' of JobState, as scontrol tells it."""
        told = ask("scontrol", "--oneliner", "show", "job", self.number).split()
        return next(item.split("=", 1)[1] for item in told if item.startswith(f"{word}="))

    def saved(self) -> int:
        tracker = self.run / "checkpoints" / "latest_checkpointed_iteration.txt"
        return int(tracker.read_text() or 0) if tracker.exists() else 0

    def is_under_way(self) -> bool:
        if self.says("JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"):
            raise RuntimeError(f"nothing to disturb: {self.saved()} iterations were saved")
        return self.saved() >= DISTURB_AFTER

    def restarts(self) -> int:
        return int(self.says("Restarts"))

    def log(self, attempt: int) -> str:
        found = sorted(self.run.glob(f"log-{self.number}-{attempt}-*.txt"))
        return "".join(path.read_text() for path in found)

    def finish(self) -> Curves:
        """The curves of all its attempts.

        Raises:
            RuntimeError: it did not end well.
        """
        wait_for("end", lambda: self.says("JobState") not in ("PENDING", "RUNNING", "COMPLETING"))
        if self.says("JobState") != "COMPLETED":
            raise RuntimeError(f"{self.says('JobState')}\n{self.log(self.restarts())[-3000:]}")
        return {tag: set(read_events(self.events, tag)) for tag in CURVES}


def time_is_up(job: SlurmJob) -> None:
    ask("scancel", "--batch", "--signal", "TERM", job.number)


def preempted(job: SlurmJob) -> None:
    other = ["--partition", "high", "--nodes", str(NODES), "--output", "/dev/null"]
    ask("sbatch", *other, "--wrap", "true")


def node_lost(job: SlurmJob) -> None:
    ask("scontrol", "update", "NodeName=node1", "State=DOWN", "Reason=test")
    wait_for("second attempt", lambda: job.restarts() == 1)
    ask("scontrol", "update", "NodeName=node1", "State=RESUME")


def main() -> int:
    """Run the program; returns the exit code."""
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        print(f"error: needs {', '.join(missing)}: install Slurm and munge.", file=sys.stderr)
        return 2
    bad = 0

    def report(what: str, good: bool, note: str) -> None:
        nonlocal bad
        bad += not good
        print(f"{'passed' if good else 'FAILED'}  {what}: {note}", flush=True)

    with tempfile.TemporaryDirectory() as name, cluster(Path(name)):
        folder = Path(name)
        data = write_text(folder)
        whole = SlurmJob(folder / "whole", data)
        reference = whole.finish()
        steps = len(reference["lm loss"])
        examined = "]:0 errors," in whole.log(0)  # torchrun names the rank in front
        report("whole", examined and steps == ITERATIONS, f"{steps} losses; doctor: {examined}")
        for disturb in (time_is_up, preempted, node_lost):
            what = disturb.__name__.replace("_", " ")
            job = SlurmJob(folder / disturb.__name__, data)
            wait_for("checkpoint", job.is_under_way)
            disturb(job)
            same = job.finish() == reference
            again = job.restarts()
            report(what, same and again == 1, f"bitwise {same}, queued again {again} time(s)")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

"""`make test-slurm`: a sweep through Slurm, a job and the node's daemon killed in the middle, equal to a local run.

munged, slurmctld and slurmd run on this machine alone (loopback, ports of their own) out of a temporary folder, and are
ended by their process numbers. The node has two invented GPUs, so that what each job is given can be compared. Prints
one line that begins with "not run" and succeeds where Slurm cannot be had.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pandas as pd
import yaml

from vitreg_lib.base import ROOT

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PLUGINS = ("snakemake-executor-plugin-slurm", "snakemake-executor-plugin-slurm-jobstep")
SWEEP = "items: [fig07]\nmodels: [mini-deit3, planted]\nparameters: {n_images: [8], seed: [0, 1]}\n"
LIMIT_S = 600  # a state that is waited for and does not come in this time is a failure

CONFIGURATION = """
ClusterName=vitreg
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={place}/munge.socket
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=60
MinJobAge=600
NodeName=one NodeHostname={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=5000 Gres=gpu:2 State=UNKNOWN
PartitionName=all Nodes=one Default=YES MaxTime=INFINITE State=UP
"""
# of a site: no accounting here, so squeue tells what became of a job; and a GPU for each notebook
SITE = {
    "slurm-no-account": True,
    "slurm-status-command": "squeue",
    "slurm-init-seconds-before-status-checks": 1,
    "seconds-between-status-checks": 1,
    "slurm-logdir": None,
    "default-resources": ["gpu=1", "runtime=10"],
}


def main() -> int:
    """Run the comparison; the exit code, 0 also where Slurm cannot be had."""
    if why := missing():
        print(f"not run: {why}")
        return 0
    with tempfile.TemporaryDirectory(prefix="vitreg-slurm-") as place, ExitStack() as stack:
        place = Path(place)
        if not (plugin := plugins(place / "plugins")):
            print("not run: Snakemake's executor for Slurm cannot be installed")
            return 0
        (place / "sweep.yaml").write_text(SWEEP)
        cluster = stack.enter_context(Cluster.started(place))
        check(place, cluster, plugin)
    return 0


def missing() -> str:
    """Why Slurm cannot be started here, after an attempt to install it; empty where it can."""
    if sys.platform != "linux" or os.geteuid():
        return "Slurm is started as root of a Linux machine here"
    if not all(shutil.which(name) for name in ("slurmctld", "slurmd", "munged", "sbatch")):
        install = ["apt-get", "install", "-qq", "-y", "--no-install-recommends", *PACKAGES]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        if not shutil.which("apt-get") or (
            subprocess.run(install, **quiet).returncode
            and (subprocess.run(["apt-get", "update", "-qq"], **quiet), subprocess.run(install, **quiet))[1].returncode
        ):
            return f"the packages {' '.join(PACKAGES)} cannot be installed"
    return ""


def plugins(place: Path) -> str:
    """A folder for PYTHONPATH with Snakemake's executor for Slurm, '.' where it is installed, '' where it cannot be."""
    if importlib.util.find_spec("snakemake_executor_plugin_slurm"):
        return "."
    pip = ["uv", "pip"] if shutil.which("uv") else [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    command = [*pip, "install", "-q", "--no-deps", "-c", "constraints.txt", "--target", str(place), *PLUGINS]
    return str(place) if subprocess.run(command, cwd=ROOT, stderr=subprocess.DEVNULL).returncode == 0 else ""


class Cluster:
    """Slurm on this machine, out of one folder."""

    def __init__(self, place: Path):
        self.place, self.processes = place, {}
        # also the jobs find the configuration, whose variable Snakemake's step takes away: `srun` is a script for them
        self.environment = os.environ | {
            "SLURM_CONF": f"{place}/slurm.conf",
            "PATH": f"{place}/bin:{os.environ['PATH']}",
        }

    @classmethod
    @contextmanager
    def started(cls, place: Path):
        """A cluster whose node is idle; all its processes end with the block."""
        self = cls(place)
        self._configure()
        try:
            munge = [f"--{name}={place}/munge.{name.split('-')[0]}" for name in ("socket", "key-file", "pid-file")]
            munge += [f"--log-file={place}/munge.log", f"--seed-file={place}/munge.seed"]
            self.start("munged", "--foreground", "--force", *munge)
            wait("munged listens", lambda: (place / "munge.socket").exists())
            self.start("slurmctld", "-D")
            self.start("slurmd", "-D", "-N", "one")
            wait("the node is idle", lambda: self.ask("sinfo", "-h", "-o", "%T") == "idle")
            yield self
        finally:
            self.ask("scancel", "--user=root", "--signal=KILL")
            for name in ("slurmd", "slurmctld", "munged"):
                if name in self.processes:
                    self.stop(name, signal.SIGTERM)

    def _configure(self) -> None:
        place = self.place
        for name in ("state", "spool", "bin", "site"):
            (place / name).mkdir()
        (place / "munge.key").write_bytes(os.urandom(1024))
        (place / "munge.key").chmod(0o400)
        ports = [free_port(), free_port()]
        text = CONFIGURATION.format(place=place, host=socket.gethostname(), ports=ports)
        (place / "slurm.conf").write_text(text)
        (place / "cgroup.conf").write_text("CgroupAutomount=no\n")
        for number in (0, 1):  # GPUs by name: the devices are those of /dev/null
            os.mknod(place / f"nvidia{number}", 0o20666, os.makedev(1, 3))
        (place / "gres.conf").write_text(f"NodeName=one Name=gpu File={place}/nvidia[0-1]\n")
        srun = place / "bin" / "srun"
        srun.write_text(f'#!/bin/sh\nSLURM_CONF={place}/slurm.conf exec {shutil.which("srun")} "$@"\n')
        srun.chmod(0o755)
        (place / "site" / "config.yaml").write_text(yaml.safe_dump(SITE | {"slurm-logdir": f"{place}/logs"}))

    def start(self, name: str, *arguments: str) -> None:
        """Start one of the daemons; what it says goes to NAME.log."""
        with open(self.place / f"{name}.log", "a") as log:
            self.processes[name] = subprocess.Popen(
                [name, *arguments], env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def stop(self, name: str, how: signal.Signals) -> None:
        """End a daemon and wait for its end."""
        self.processes[name].send_signal(how)
        self.processes.pop(name).wait()

    def ask(self, *command: str) -> str:
        """What a command of Slurm prints."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True).stdout.strip()

    def batch(self, plugin: str, results: Path, log) -> subprocess.Popen:
        """`vitreg batch` through this cluster, started."""
        extra = {"PYTHONPATH": f"{ROOT}:{plugin}", "SNAKEMAKE_PROFILE": f"{self.place}/site"}
        return subprocess.Popen(
            [*batch(self.place), "--cluster", "slurm", "--jobs", "4"],
            env=self.environment | extra | {"VITREG_RESULTS": str(results)},
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )


def check(place: Path, cluster: Cluster, plugin: str) -> None:
    """Disturb a sweep, go on, and compare its table with that of a local run."""
    results, log = place / "results", open(place / "batch.log", "w+")
    run = cluster.batch(plugin, results, log)
    try:
        wait("two notebooks run at once", lambda: len(jobs()) == 2 or run.poll() is not None)
        given = jobs()
        assert run.poll() is None, f"the sweep ended early:\n{said(log)}"
        gpus = {environment["CUDA_VISIBLE_DEVICES"] for environment in given.values()}
        assert gpus == {"0", "1"}, f"each job has a GPU of its own, but they see {gpus}"
        victim = min(given)
        cluster.stop("slurmd", signal.SIGKILL)
        os.kill(victim, signal.SIGKILL)
        wait("the killed notebook is gone", lambda: victim not in jobs())
        cluster.start("slurmd", "-D", "-N", "one")
        code = run.wait(LIMIT_S)
    finally:
        run.kill()
    first = made(results)
    assert code and len(first) < 4, f"one of four notebooks was killed, but the sweep ended with {code}:\n{said(log)}"
    assert "was killed" in said(log), said(log)
    print(f"disturbed: {len(first)} of 4 notebooks made, exit code {code}")

    again = cluster.batch(plugin, results, log)
    assert again.wait(LIMIT_S) == 0, said(log)
    second = made(results)
    assert len(second) == 4, said(log)
    assert first.items() <= second.items(), "what was finished ran again"
    print(f"gone on: {len(second) - len(first)} made, the others kept")

    local = place / "local"
    environment = os.environ | {"VITREG_RESULTS": str(local), "PYTHONPATH": str(ROOT)}
    subprocess.run(batch(place), env=environment, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    tables = [pd.read_parquet(folder / "mini" / "sweeps" / "sweep.parquet") for folder in (results, local)]
    assert len(tables[0]) > 10
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    print(f"equal to a local run: {len(tables[0])} numbers of 4 notebooks")


def batch(place: Path) -> list[str]:
    """The command of the sweep."""
    return [sys.executable, "-m", "vitreg_lib.cli", "batch", str(place / "sweep.yaml")]


def jobs() -> dict[int, dict[str, str]]:
    """The environment of each process that runs a notebook for Slurm, by process number."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            environment = (folder / "environ").read_text(errors="replace").split("\0")
        except OSError:  # it has ended
            continue
        variables = dict(line.split("=", 1) for line in environment if "=" in line)
        if b"vitreg_lib.cli" in command and b"run" in command and "SLURM_JOB_ID" in variables:
            found[int(folder.name)] = variables
    return found


def made(results: Path) -> dict[str, int]:
    """When each finished notebook was made, by the name of its mark."""
    return {path.name: path.stat().st_mtime_ns for path in (results / "mini").glob(".*.made")}


def said(log) -> str:
    log.seek(0)
    return log.read()


def wait(state: str, reached) -> None:
    """Return when a state is reached; TimeoutError with its name where it is not."""
    end = time.monotonic() + LIMIT_S
    while not reached():
        if time.monotonic() > end:
            raise TimeoutError(f"not reached in {LIMIT_S} s: {state}")
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())

"""A private Slurm cluster whose nodes are all this machine, for a test that needs a real one."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from hfllm.runs.signals import signal_at_parents_death
from tests.distributed.launching import ROOT, environment


PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
missing = [name for name in PROGRAMS if shutil.which(name) is None]
needs_slurm = pytest.mark.skipif(
    bool(missing) or os.geteuid() != 0,
    reason=f"needs {', '.join(missing)}: apt-get install slurm-wlm munge" if missing else "Slurm's daemons need root",
)

# Each node's name is an address of this machine, so that a job reaches it without a line in /etc/hosts. The nodes share
# a GPU that is none, for the jobs that ask for one.
CONFIGURATION = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdTimeout=5
KillWait=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/builtin
SelectType=select/cons_tres
GresTypes=gpu
ReturnToService=1
PartitionName=all Nodes=ALL Default=YES
""" + "".join(f"NodeName=127.0.0.{n} Port={{ports[{n}]}} CPUs=2 Gres=gpu:1\n" for n in (1, 2, 3))


class Cluster:
    """Three nodes in a folder of their own; leaving the block ends every daemon and every process of a job.

    `folder` is also where jobs are submitted: it looks like the repository, with an environment to activate.
    """

    def __init__(self, folder: Path):
        self.folder, self.nodes = folder, [f"127.0.0.{n}" for n in (1, 2, 3)]
        self.daemons: dict[str, subprocess.Popen] = {}
        self.environment = environment(SLURM_CONF=str(folder / "slurm.conf"))

    def __enter__(self) -> "Cluster":
        for name in ("accelerate_configs", "recipes"):
            (self.folder / name).symlink_to(ROOT / name)
        (self.folder / ".venv" / "bin").mkdir(parents=True)
        activate = self.folder / ".venv" / "bin" / "activate"
        activate.write_text(f"export PATH={Path(sys.executable).parent}:$PATH\n")
        (self.folder / "state").mkdir()
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o400)
        text = CONFIGURATION.format(folder=self.folder, ports=free_ports(1 + len(self.nodes)))
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        try:
            files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "seed"}
            options = [f"--{name}={self.folder / file}" for name, file in files.items()]
            self._start("munged", "--foreground", "--force", *options)
            wait_for((self.folder / "munge.socket").exists, "munge's socket")
            self._start("slurmctld", "-D")
            for node in self.nodes:
                self.start_node(node)
            wait_for(lambda: self.idle_nodes() == self.nodes, lambda: self.logs("slurmctld", *self.nodes))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        for daemon in self.daemons.values():
            daemon.kill()
            daemon.wait()
        for process in self._processes():  # of jobs
            process.kill()

    def _start(self, name: str, *words: str, log: str | None = None) -> None:
        log = log or name
        with (self.folder / f"{log}.log").open("ab") as output:
            self.daemons[log] = subprocess.Popen(
                [name, *words],
                env=self.environment,
                stdout=output,
                stderr=output,
                preexec_fn=lambda: signal_at_parents_death(9),
            )

    def start_node(self, node: str) -> None:
        self._start("slurmd", "-D", "-N", node, log=node)

    def kill_node(self, node: str) -> None:
        """kill -9 to its daemon and to everything that runs there, as a power cut would."""
        tasks = self.tasks(node)
        for process in [*tasks, *(parent for task in tasks if (parent := task.parent()).name() == "slurmstepd")]:
            process.kill()
        daemon = self.daemons.pop(node)
        daemon.kill()
        daemon.wait()

    def tasks(self, node: str) -> list[psutil.Process]:
        return self._processes(SLURMD_NODENAME=node)

    def workers(self) -> list[psutil.Process]:
        """The training processes of all nodes, without their launchers."""
        processes = [process for node in self.nodes for process in self.tasks(node)]
        return [process for process in processes if "recipes/pretrain.py" in process.cmdline()[:3]]

    def _processes(self, **variables: str) -> list[psutil.Process]:
        """Processes that were started with these variables in this cluster, by us or by its daemons."""
        wanted = {"SLURM_CONF": self.environment["SLURM_CONF"], **variables}
        found = []
        for process in psutil.process_iter():
            try:
                if wanted.items() <= process.environ().items():
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def call(self, *words: object) -> str:
        finished = subprocess.run(
            [str(word) for word in words], cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        assert finished.returncode == 0, (words, finished.stderr)
        return finished.stdout

    def idle_nodes(self) -> list[str]:
        words = ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N %t"]
        lines = subprocess.run(words, env=self.environment, capture_output=True, text=True).stdout.splitlines()
        return sorted(node for node, state in map(str.split, lines) if state == "idle")

    def submit(self, *words: object) -> int:
        return int(self.call("sbatch", "--parsable", *words))

    def job(self, number: int) -> dict[str, str]:
        """JobState, Restarts, NodeList and so on, as `scontrol show job` has them."""
        words = self.call("scontrol", "show", "job", number).split()
        return dict(word.split("=", maxsplit=1) for word in words if "=" in word)

    def logs(self, *names: str) -> str:
        return "\n".join((self.folder / f"{name}.log").read_text(errors="replace") for name in names)


def free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def wait_for(condition: Callable[[], bool], what: str | Callable[[], str], *, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"Not after {seconds} s: {what if isinstance(what, str) else what()}")
        time.sleep(0.2)

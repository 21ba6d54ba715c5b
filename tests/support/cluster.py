"""A temporary SLURM with accounting on this machine: real daemons, private ports, one scratch folder.

Two nodes have no GPU. A third node is alone in its partition and has two GPUs that are only names.
All files, also munge's socket and key, are in the scratch folder; nothing in /etc is read or written. Daemons are
stopped by their pid, and the kernel stops them when the tests die. Needs root and Debian's packages.
"""

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

PACKAGES = ("slurm-wlm", "slurmdbd", "munge", "mariadb-server")
_PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "mysql_install_db", "sbatch", "sacctmgr")
NODES = ("n1", "n2", "g1")
PATIENCE_S = 60.0
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

_SLURM_CONF = """
ClusterName=tiny
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={scratch}/munge/socket
CredType=cred/munge
StateSaveLocation={scratch}/state
SlurmctldPidFile={scratch}/slurmctld.pid
SlurmctldLogFile={scratch}/log/slurmctld.log
SlurmdPidFile={scratch}/slurmd.%n.pid
SlurmdSpoolDir={scratch}/spool/%n
SlurmdLogFile={scratch}/log/slurmd.%n.log
PlugStackConfig={scratch}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,sched_min_interval=100000,bf_interval=2
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
SlurmdTimeout=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd}
AccountingStoragePass={scratch}/munge/socket
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=2 RealMemory=2000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=2 RealMemory=2000 State=UNKNOWN
NodeName=g1 NodeHostname={host} NodeAddr=127.0.0.1 Port={g1} CPUs=2 RealMemory=2000 Gres=gpu:tiny:2 State=UNKNOWN
GresTypes=gpu
PartitionName=main Nodes=n1,n2 Default=YES PriorityTier=1 MaxTime=120 State=UP
PartitionName=gentle Nodes=n1,n2 PriorityTier=1 GraceTime=60 MaxTime=120 State=UP
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF MaxTime=120 State=UP
PartitionName=gpu Nodes=g1 MaxTime=120 State=UP
"""
_GRES_CONF = """
NodeName=g1 Name=gpu Type=tiny File=/dev/null
NodeName=g1 Name=gpu Type=tiny File=/dev/zero
"""
_SLURMDBD_CONF = """
AuthType=auth/munge
AuthInfo=socket={scratch}/munge/socket
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={dbd}
SlurmUser=root
LogFile={scratch}/log/slurmdbd.log
PidFile={scratch}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={db}
StorageUser=slurm
StoragePass={password}
StorageLoc=slurm
"""


def why_not() -> str | None:
    """The reason why no cluster can start here, with the fix; None when a cluster can start."""
    missing = [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]
    if missing:
        install = f"apt-get install {' '.join(PACKAGES)}"
        return f"{', '.join(missing)} not installed: run `make test-slurm` as root, or {install}"
    if os.geteuid() != 0:
        return "its daemons need root: run `make test-slurm` as root"
    return None


class Cluster:
    """Idle nodes from `start` to `stop`. A command with `environment` can talk to the nodes."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.environment = os.environ | {"SLURM_CONF": str(scratch / "slurm.conf"), "PATH": _PATH}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start every daemon and wait until the nodes are idle."""
        for name in ("munge", "state", "spool", "log", "db"):
            (self.scratch / name).mkdir(mode=0o755, parents=True)
        ports = dict(zip(("ctld", "dbd", "db", *NODES), _free_ports(3 + len(NODES)), strict=True))
        facts = {"scratch": self.scratch, "host": socket.gethostname(), "password": secrets.token_hex(8)}
        facts |= {name: str(port) for name, port in ports.items()}
        (self.scratch / "plugstack.conf").write_text("")
        (self.scratch / "slurm.conf").write_text(_SLURM_CONF.format(**facts))
        (self.scratch / "gres.conf").write_text(_GRES_CONF)
        (self.scratch / "slurmdbd.conf").write_text(_SLURMDBD_CONF.format(**facts))
        (self.scratch / "slurmdbd.conf").chmod(0o600)
        self._start_munge()
        self._start_database(ports["db"], password=str(facts["password"]))
        self._daemon("slurmdbd", "slurmdbd", "-D")
        _until(lambda: _listens(ports["dbd"]), "slurmdbd did not start")
        self.run("sacctmgr", "-i", "add", "cluster", "tiny")
        self._daemon("slurmctld", "slurmctld", "-D", "-i")
        for node in NODES:
            self.start_node(node)
        _until(lambda: self.node_states() == ["idle", "idle"], "the nodes did not come up")

    def stop(self) -> None:
        """Cancel all jobs, then stop the daemons in the reverse order of their start."""
        if "slurmctld" in self._daemons:
            with contextlib.suppress(subprocess.SubprocessError, AssertionError):
                self.cancel_all()
        for process in self._of_jobs():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(timeout=15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()

    def run(self, *command: object, check: bool = True) -> str:
        """Run one of SLURM's commands; return its output."""
        words = [str(word) for word in command]
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def start_node(self, node: str) -> None:
        """Start the daemon of a node."""
        self._daemon(node, "slurmd", "-D", "-N", node)

    def restart_node(self, node: str) -> None:
        """Start a killed node again, and wait until the controller has told it about the job that it lost.

        That message ends a job that is started again earlier. Therefore SLURM itself waits two minutes.
        """
        self.start_node(node)
        _until(lambda: self._undelivered() == 0, "messages stay undelivered")
        _until(lambda: not set(self.node_states()) & {"down", "down*"}, "the node does not come back")

    def _undelivered(self) -> int:
        """Messages of the controller to nodes: those that wait for another try, and those under way."""
        said = dict(line.split(":", 1) for line in self.run("sdiag").splitlines() if line.count(":") == 1)
        return sum(int(said[name]) for name in ("Agent queue size", "Agent count"))  # not the accounting's own queue

    def kill_node(self, node: str) -> None:
        """kill -9 of a node's daemon and of every process of its jobs, as in a power loss."""
        self._daemons[node].kill()
        self._daemons.pop(node).wait()
        for process in self._of_jobs(node):
            with contextlib.suppress(psutil.Error):
                process.kill()

    def node_states(self) -> list[str]:
        return self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%t", check=False).split()

    def job_state(self, job: str) -> str:
        """SLURM's word for the state of a job that SLURM still remembers, such as RUNNING."""
        return self.job_fields(job).get("JobState", "")

    def job_fields(self, job: str) -> dict[str, str]:
        shown = self.run("scontrol", "show", "job", "-o", job, check=False)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait_for_state(self, job: str, *states: str, timeout_s: float = PATIENCE_S) -> None:
        _until(
            lambda: self.job_state(job) in states,
            f"job {job} is not {' or '.join(states)}",
            timeout_s,
            lambda: self.job_state(job),
        )

    def start_now(self, job: str) -> None:
        """Start a requeued job now; SLURM alone waits two minutes.

        The start is not in the second of the requeue: SLURM revokes the old credential in that second, and mistakes the
        new credential for the old one.
        """
        _until(lambda: self.job_state(job) == "PENDING", f"job {job} is not pending", 30, lambda: self.job_state(job))
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now+3")

    def bring_limit_near(self, job: str) -> None:
        """Set a running job's time limit so that about a minute is left."""
        hours, minutes, seconds = map(int, self.job_fields(job)["RunTime"].split(":"))
        limit = 60 * hours + minutes + (1 if seconds < 30 else 2)
        self.run("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")

    def preempt(self) -> None:
        """Submit a job that needs both nodes, in the partition that preempts the others."""
        words = ("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
        self.run("sbatch", *words)

    def processes(self, **wanted: str) -> list[psutil.Process]:
        """The processes of this cluster's jobs whose environment has these values.

        Jobs of another cluster can have the same numbers; `SLURM_CONF` tells them apart.
        """
        wanted |= {"SLURM_CONF": self.environment["SLURM_CONF"]}
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                if all(environment.get(name) == value for name, value in wanted.items()):
                    found.append(process)
        return found

    def cancel_all(self) -> None:
        """End every job and wait until both nodes are free."""
        jobs = self.run("squeue", "-h", "-o", "%A").split()
        if jobs:
            self.run("scancel", *jobs, check=False)
        _until(lambda: not self.run("squeue", "-h", "-o", "%A"), "jobs do not end")

    def _start_munge(self) -> None:
        folder = self.scratch / "munge"
        (folder / "key").write_bytes(secrets.token_bytes(128))
        (folder / "key").chmod(0o400)
        # --force: munged runs as root, because user `munge` can't enter pytest's folders.
        files = [f"--{kind}-file={folder / kind}" for kind in ("key", "log", "pid", "seed")]
        self._daemon("munged", "munged", "-F", "--force", f"--socket={folder / 'socket'}", *files)
        _until((folder / "socket").exists, "munged did not start")

    def _start_database(self, port: int, *, password: str) -> None:
        folder, its_socket = self.scratch / "db", self.scratch / "db.socket"
        install = ["mysql_install_db", "--no-defaults", "--user=root", f"--datadir={folder}", "--skip-test-db"]
        self.run(*install, "--auth-root-authentication-method=normal")
        self._daemon(
            "mariadbd",
            *("mariadbd", "--no-defaults", "--user=root", f"--datadir={folder}", f"--socket={its_socket}"),
            *("--bind-address=127.0.0.1", f"--port={port}", "--innodb-buffer-pool-size=32M"),
        )
        _until(its_socket.exists, "mariadbd did not start")
        grant = f"CREATE USER slurm@'%' IDENTIFIED BY '{password}'; GRANT ALL ON *.* TO slurm@'%'"
        client = ["mariadb", "--no-defaults", f"--socket={its_socket}", "--user=root", "-e"]
        _until(lambda: bool(self.run(*client, "SELECT 1", check=False)), "mariadbd does not answer")
        self.run(*client, grant)

    def _daemon(self, name: str, *command: str) -> None:
        with (self.scratch / "log" / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command,
                env=self.environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=self.scratch,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def _of_jobs(self, node: str = "*") -> list[psutil.Process]:
        """The processes of this cluster's jobs. SLURM's own come first: they would report how the others ended."""
        keepers, others = [], []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.name().startswith("slurmstepd"):  # found by the log file of its node's slurmd
                    logs = [Path(file.path) for file in process.open_files()]
                    if any(log.parent == self.scratch / "log" and log.match(f"slurmd.{node}.log") for log in logs):
                        keepers.append(process)
                elif self._is_of_job(process.environ(), node):
                    others.append(process)
        return keepers + others

    def _is_of_job(self, environment: dict[str, str], node: str) -> bool:
        return (
            environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]
            and "SLURM_JOB_ID" in environment
            and node in ("*", environment.get("SLURMD_NODENAME"))
        )


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _until(
    condition: Callable[[], bool],
    otherwise: str,
    timeout_s: float = PATIENCE_S,
    found: Callable[[], object] = lambda: "",
) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, f"{otherwise} after {timeout_s:.0f} s {found()}"
        time.sleep(0.1)


@contextlib.contextmanager
def running_cluster(scratch: Path) -> Iterator[Cluster]:
    """A cluster that is stopped at the end, also when its start failed."""
    cluster = Cluster(scratch)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()

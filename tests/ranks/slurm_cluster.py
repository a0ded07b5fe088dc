"""A Slurm cluster on this machine: a head and two nodes, each a network namespace, its daemons Debian's, for a while.

    sudo python tests/ranks/slurm_cluster.py COMMAND …

runs COMMAND on the head, where sbatch returns when its job has ended; then the cluster is gone.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from namespaces import ADDRESS, UnavailableError, namespace_hosts, on_host, write_names

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
START_SECONDS = 60.0
NODES, HEAD = (1, 2), 3

# A job that is queued again waits until credentials of its first try have expired, and then for the scheduler to look:
# minutes, by default.
CONFIG = """\
ClusterName=wastenot
SlurmctldHost={prefix}{head}({head_address})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2
ReturnToService=2
MailProg=/bin/true
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    prefix: str
    folder: Path

    def command(self, host: int, words: str) -> list[str]:
        """`words` of a shell as a command that runs on `host`."""
        words = f"export SLURM_CONF={self.folder}/slurm.conf; {words}"
        return on_host(self.prefix, host, words, names=self.folder / "hosts")


def missing() -> list[str]:
    """Programs that are not installed."""
    folders = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=folders) is None]


@contextlib.contextmanager
def slurm_cluster(folder: Path) -> Iterator[Cluster]:
    """Starts a cluster whose files are in `folder`, and stops it.

    Raises UnavailableError where this machine lacks or refuses what it takes, RuntimeError where the daemons do not
    come up.
    """
    if missing():
        raise UnavailableError(f"no {', '.join(missing())}: apt-get install --no-install-recommends slurm-wlm munge")
    with namespace_hosts(HEAD) as prefix, contextlib.ExitStack() as daemons:
        cluster = Cluster(prefix, folder)
        _write_files(cluster)

        def daemon(host: int, words: str) -> None:
            with (folder / "daemons.log").open("a") as log:
                # They end with this process, however it ends.
                command = cluster.command(host, f"PATH=$PATH:/usr/sbin; exec setpriv --pdeathsig TERM {words}")
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            daemons.callback(_end, process)

        # --force: it wants a folder that other users can enter, which a temporary one is not.
        munge = f"--socket={folder}/munge.socket --key-file={folder}/munge.key --pid-file={folder}/munge.pid"
        daemon(
            HEAD, f"munged --foreground --force {munge} --log-file={folder}/munge.log --seed-file={folder}/munge.seed"
        )
        _await(cluster, (folder / "munge.socket").exists)
        daemon(HEAD, "slurmctld -D")
        for node in NODES:
            daemon(node, "slurmd -D")
        _await(cluster, lambda: _idle(cluster) == len(NODES))
        try:
            yield cluster
        finally:
            subprocess.run(cluster.command(HEAD, "scancel --state=RUNNING,PENDING --user=root"), capture_output=True)


def _write_files(cluster: Cluster) -> None:
    prefix, folder = cluster.prefix, cluster.folder
    for name in ("state", *(f"{prefix}{node}" for node in NODES)):
        (folder / name).mkdir()
    (folder / "munge.key").touch(mode=0o600)
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    write_names(prefix, HEAD, folder / "hosts")
    nodes = [f"NodeName={prefix}{node} NodeAddr={ADDRESS.format(node)} CPUs=2 State=UNKNOWN" for node in NODES]
    text = CONFIG.format(
        prefix=prefix, folder=folder, head=HEAD, head_address=ADDRESS.format(HEAD), nodes="\n".join(nodes)
    )
    (folder / "slurm.conf").write_text(text)


def _idle(cluster: Cluster) -> int:
    done = subprocess.run(
        cluster.command(HEAD, "sinfo --noheader --Node --states=idle"), capture_output=True, text=True
    )
    return len(done.stdout.splitlines())


def _await(cluster: Cluster, there) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not there():
        if time.monotonic() > deadline:
            raise RuntimeError(f"Slurm does not start here: {(cluster.folder / 'daemons.log').read_text()}")
        time.sleep(0.2)


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="slurm-") as temporary:
        try:
            with slurm_cluster(Path(temporary)) as started:
                sys.exit(subprocess.run(started.command(HEAD, f"SBATCH_WAIT=1 {shlex.join(sys.argv[1:])}")).returncode)
        except (UnavailableError, RuntimeError) as error:
            sys.exit(f"error: {error}")

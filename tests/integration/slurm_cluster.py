"""A Slurm of several nodes on this host: munge, slurmctld and a slurmd a node, on free ports, without systemd.

Every node has an address of its own (127.0.0.N), which is how programs tell the nodes apart. Node `n4` can be started
with directories of its own where the others share theirs, and a node can be made to die with everything on it.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
START_SECONDS = 60.0

CONFIGURATION = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket.2,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
TopologyPlugin=topology/tree
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
EnforcePartLimits=ALL
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=1
SlurmctldTimeout=60
SlurmdTimeout={node_seconds}
InactiveLimit=0
KillWait=10
MinJobAge=600
OverTimeLimit=0
SlurmdParameters=config_overrides
PartitionName=train Nodes=n[1-{num_nodes}] Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=120 OverSubscribe=NO
PartitionName=urgent Nodes=n[1-{num_nodes}] MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=physics Nodes=n[1-{num_nodes}] MaxTime=60 State=UP AllowAccounts=physics
"""
NODE = "NodeName=n{n} NodeHostname=localhost NodeAddr=127.0.0.{address} Port={port} CPUs=4 RealMemory=8000\n"
# Neighbours in the fabric are not neighbours by name: rank order must follow the switches.
TOPOLOGY = """\
SwitchName=leaf1 Nodes=n1,n3
SwitchName=leaf2 Nodes=n2,n4
SwitchName=spine Switches=leaf[1-2]
"""


def missing_programs() -> list[str]:
    """What has to be installed before a Slurm can be started here."""
    return [name for name in PROGRAMS if shutil.which(name) is None and not Path("/usr/sbin", name).exists()]


@dataclass
class SlurmCluster:
    """Started by `start`, ended by `stop`, which leaves no process behind."""

    root: Path
    num_nodes: int = 4
    node_seconds: int = 300
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """What a command needs to talk to this Slurm."""
        return {"SLURM_CONF": str(self.root / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin:/usr/bin"}

    def start(self, inside: Mapping[int, tuple[str, ...]]) -> None:
        """Write the configuration and start everything; returns when all nodes are idle.

        Args:
            inside: node -> command that its daemon is started within.
        """
        self.root.chmod(0o755)
        (self.root / "state").mkdir()
        with ExitStack() as held:
            ports = [_free_port(held) for _ in range(self.num_nodes + 1)]
        nodes = "".join(NODE.format(n=n, address=n + 10, port=port) for n, port in enumerate(ports[1:], start=1))
        text = CONFIGURATION.format(
            root=self.root, controller_port=ports[0], num_nodes=self.num_nodes, node_seconds=self.node_seconds
        )
        head, marker, partitions = text.partition("PartitionName")
        (self.root / "slurm.conf").write_text(head + nodes + marker + partitions)
        (self.root / "topology.conf").write_text(TOPOLOGY)
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self._spawn(
            "munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            f"--socket={self.root}/munge.socket.2",
            f"--pid-file={self.root}/munged.pid",
            f"--log-file={self.root}/munged.log",
            f"--seed-file={self.root}/munged.seed",
        )
        self._wait(lambda: (self.root / "munge.socket.2").exists(), "munged listens")
        self._spawn("slurmctld", "-D", "-c", "-f", str(self.root / "slurm.conf"))
        for n in range(1, self.num_nodes + 1):
            self.start_node(n, inside=inside.get(n, ()))
        self._wait(lambda: self.node_states() == {"idle"}, "every node is idle")

    def start_node(self, n: int, *, inside: tuple[str, ...] = ()) -> None:
        """Start the daemon of node `n`, within the command `inside`."""
        (self.root / f"spool-n{n}").mkdir(exist_ok=True)
        command = ("slurmd", "-D", "-N", f"n{n}", "-f", str(self.root / "slurm.conf"))
        self._spawn(*inside, *command, name=f"n{n}")

    def node_states(self) -> set[str]:
        """The states of all nodes."""
        return set(self.command("sinfo", "-h", "-N", "-p", "train", "-o", "%t").split())

    def command(self, *words: str) -> str:
        """Output of a Slurm command, empty where it fails."""
        done = subprocess.run(
            words, env=os.environ | self.environment, capture_output=True, text=True, timeout=30, check=False
        )
        return done.stdout if done.returncode == 0 else ""

    def job(self, job: str) -> dict[str, str]:
        """What Slurm says of a job."""
        words = self.command("scontrol", "show", "job", "-o", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def kill_node(self, n: int) -> None:
        """End the daemon of a node and every process it has started, at once."""
        daemon = self.processes.pop(f"n{n}")
        daemon.kill()
        self._kill_steps({f"n{n}"})
        daemon.wait()

    def stop(self) -> None:
        """End all processes of this Slurm and of its jobs."""
        for process in self.processes.values():
            process.kill()
        self._kill_steps({f"n{n}" for n in range(1, self.num_nodes + 1)})
        for process in self.processes.values():
            process.wait()
        self.processes.clear()

    def _kill_steps(self, nodes: set[str]) -> None:
        """End what jobs of this Slurm run on some nodes. Step daemons leave their parent, but tasks know their node."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                environment = process.environ()
                if environment.get("SLURM_CONF") == str(self.root / "slurm.conf") and (
                    environment.get("SLURMD_NODENAME") in nodes
                ):
                    found += [process, *(each for each in process.parents() if each.name() == "slurmstepd")]
        # Frozen before they are killed: whoever outlived another would clean up after it, which a node that loses its
        # power does not (step daemons end tasks, srun has a child that ends its step elsewhere).
        for act in (psutil.Process.suspend, psutil.Process.kill):
            for process in set(found):
                with suppress(psutil.Error):
                    act(process)

    def _spawn(self, *words: str, name: str | None = None) -> None:
        name = name or words[0]
        with (self.root / f"{name}.out").open("ab") as output:
            self.processes[name] = subprocess.Popen(
                words,
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                logs = "\n".join(f"{log}:\n{log.read_text()[-2000:]}" for log in self.root.glob("*.log"))
                self.stop()
                raise TimeoutError(f"after {START_SECONDS} s still not: {what}\n{logs}")
            time.sleep(0.05)


def _free_port(held: ExitStack) -> int:
    probe = held.enter_context(socket.socket())
    probe.bind(("127.0.0.1", 0))
    return int(probe.getsockname()[1])

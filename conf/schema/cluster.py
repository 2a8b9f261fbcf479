"""Where ranks run, what that is made of, and what is asked of Slurm."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from conf.schema.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Strict


@dataclass(frozen=True, kw_only=True, slots=True)
class HardwareConfig(Strict):
    """What a cluster is made of and costs; facts of the GPU itself are in `parallel/plan/hardware.py`."""

    gpu: str
    gpus_per_node: PositiveInt
    node_link_gb_per_s: PositiveFloat
    """Of a GPU to the others of its node, one direction: NVLink, or PCIe."""
    network_gb_per_s: PositiveFloat
    """Of a GPU to other nodes, one direction: its share of the node's network cards."""
    storage_gb_per_s: PositiveFloat
    """That a node writes to the shared disk."""
    node_watts: NonNegativeFloat
    """Of a node without its GPUs, under load: processors, memory, fans, network cards, its share of the switches."""
    pue: Annotated[float, Field(ge=1, le=3)]
    """Power of the whole building over that of the machines."""
    dollars_per_gpu_hour: NonNegativeFloat
    gpu_days_per_failure: PositiveFloat
    """GPUs times days between two interruptions that nobody planned."""
    restart_minutes: NonNegativeFloat
    """From an interruption to the next step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ContainerConfig(Strict):
    """The image everything of a job runs in, on every node."""

    runtime: Literal["none", "pyxis", "apptainer"]
    image: str | None
    mounts: tuple[str, ...]
    """`HOST:CONTAINER`, besides the run's own directories, which are mounted where they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreflightConfig(Strict):
    """What a node must show before it is given ranks; thresholds of 0 switch a measurement off."""

    intra_node_gb_per_second: NonNegativeFloat
    """Least bus bandwidth of an all-reduce over the ranks of one node."""
    node_pair_gb_per_second: NonNegativeFloat
    """Least bus bandwidth of an all-reduce over the ranks of two nodes."""
    infiniband_ports: NonNegativeInt
    """Active ports a node must have."""
    infiniband_gbit_per_second: NonNegativeFloat
    """Least rate of each of them, e.g. 400 for NDR."""
    local_disk_gib: NonNegativeFloat
    """Least free space on the node's own temporary disk."""
    clock_seconds: PositiveFloat
    """Largest difference of a node's clock to the first node's."""
    timeout_seconds: PositiveFloat
    """A node that has not reported by then has failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmConfig(Strict):
    """What is asked of Slurm, and what surrounds a run on its nodes. Null leaves the cluster's own default."""

    account: str | None
    partition: str | None
    qos: str | None
    reservation: str | None
    time_limit_minutes: PositiveInt | None
    signal_seconds: PositiveInt
    """The run is asked to save and stop this long before its time limit; it is then queued again."""
    spare_nodes: NonNegativeInt
    """Further nodes in the allocation, to replace those that fail."""
    exclusive: bool
    cpus_per_node: PositiveInt | None
    """Null with `exclusive`: all of them."""
    max_requeues: NonNegativeInt
    max_array_jobs: NonNegativeInt
    """Of a sweep, at most this many run at a time; 0: no limit."""
    modules: tuple[str, ...]
    """Environment modules to load."""
    variables: dict[str, str]
    """Environment variables of every process of the run."""
    python: str | None
    """Null: the interpreter that submits, or `python` of the container."""
    before: tuple[str, ...]
    """Shell lines of your own, run on the first node before anything of the run."""
    after: tuple[str, ...]
    """The same, when the job ends for whatever reason it has time to tell."""
    sbatch: tuple[str, ...]
    """Further options of sbatch, e.g. `--constraint=ib`."""
    container: ContainerConfig
    preflight: PreflightConfig
    stage_nodes: dict[str, PositiveInt] = field(default_factory=dict)
    """Stage -> nodes, where they are not `ClusterConfig.num_nodes`: a job of its own, after the one before it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig(Strict):
    """Where ranks run."""

    name: str
    kind: Literal["local", "ray", "slurm"]
    """local: a private Ray on this machine. ray: join the Ray cluster at `address`. slurm: queue a job."""
    address: str | None
    device: Literal["auto", "cpu", "cuda"]
    num_nodes: PositiveInt
    ranks_per_node: PositiveInt | None
    """Null: what this machine has (GPUs, else cores)."""
    node_labels: dict[str, str]
    """Ray node labels every node of the gang must carry, e.g. its InfiniBand domain."""
    slurm: SlurmConfig | None = None
    """Where kind is slurm."""
    hardware: HardwareConfig | None = None
    """Null: not known, as on this machine; there is no plan then."""

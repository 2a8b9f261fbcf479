"""Process groups: torch.distributed's world, and Megatron's groups for the axes of a mesh.

Megatron keeps its groups in module globals (`parallel_state`), so a process is on one mesh at a time. `open_world`
and `shut_down` are for a process's life, `enter_mesh` and `leave_mesh` change the mesh within it.
"""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from parallel.cpu import adapt_megatron
from parallel.device import communication_backend, select_device
from parallel.mesh import Coordinate, Mesh

TIMEOUT_SECONDS = 600.0


def host_store() -> dist.TCPStore:
    """The store ranks meet at, served by this process on a port nobody else has; its `port` is what others need."""
    return dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


def join_store(address: str, port: int, *, timeout_seconds: float = TIMEOUT_SECONDS) -> dist.TCPStore:
    """The store that another rank hosts."""
    return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout_seconds))


def default_store() -> dist.Store:
    """The store the ranks of the default process group met at."""
    # Public only through the group's pickle; every launcher sets it.
    return dist.distributed_c10d._get_default_store()


def open_world(store: dist.Store, *, rank: int, world_size: int, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
    """Make the default process group and take this rank's device.

    Args:
        store: shared by all ranks, and used for no other world.
        rank: this one.
        world_size: number of ranks.
        timeout_seconds: of every collective.
    """
    timeout = timedelta(seconds=timeout_seconds)
    dist.init_process_group(communication_backend(), store=store, rank=rank, world_size=world_size, timeout=timeout)
    select_device(dist.get_rank())


def enter_mesh(mesh: Mesh, *, virtual_pipeline: int = 1, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
    """Make Megatron's groups for the mesh.

    Raises:
        ValueError: the mesh has another number of ranks than the world.
    """
    if mesh.world_size != dist.get_world_size():
        raise ValueError(f"the mesh ({mesh}) has {mesh.world_size} ranks, the world has {dist.get_world_size()}")
    adapt_megatron()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=mesh.tensor,
        pipeline_model_parallel_size=mesh.pipeline,
        virtual_pipeline_model_parallel_size=virtual_pipeline if virtual_pipeline > 1 else None,
        context_parallel_size=mesh.context,
        expert_model_parallel_size=mesh.expert,
        distributed_timeout_minutes=max(1, round(timeout_seconds / 60)),
        create_gloo_process_groups=False,
    )
    here = mesh.coordinate(dist.get_rank())
    assert megatron_coordinate() == here, "Megatron orders ranks otherwise than Mesh"
    expert_place = parallel_state.get_expert_model_parallel_rank(), parallel_state.get_expert_data_parallel_rank()
    assert expert_place == (mesh.expert_rank(here), mesh.expert_replica(here)), "and so for experts"
    # Nothing draws random numbers in a step, but Megatron enters its generator's state under sequence parallelism.
    tensor_parallel.model_parallel_cuda_manual_seed(0)


def leave_mesh() -> None:
    """Destroy all groups but the world: Megatron's, and those DeepSpeed made; engines on them must be closed before."""
    parallel_state.destroy_model_parallel()
    # No public list of a process's groups; backends keep theirs to themselves.
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def shut_down() -> None:
    """Destroy all groups; the process can `open_world` again."""
    leave_mesh()
    dist.destroy_process_group()


def megatron_coordinate() -> Coordinate:
    """This rank's place on the mesh, as Megatron sees it."""
    return Coordinate(
        pipeline=parallel_state.get_pipeline_model_parallel_rank(),
        data=parallel_state.get_data_parallel_rank(),
        context=parallel_state.get_context_parallel_rank(),
        tensor=parallel_state.get_tensor_model_parallel_rank(),
    )

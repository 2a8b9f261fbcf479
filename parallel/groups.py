"""Process groups: torch.distributed's world, and Megatron's groups for the axes of a mesh.

Megatron keeps its groups in module globals (`parallel_state`), so a process is on one mesh at a time. `initialise` and
`shut_down` are for a process's life, `enter_mesh` and `leave_mesh` change the mesh within it.
"""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from parallel.cpu import adapt_megatron
from parallel.device import communication_backend, select_device
from parallel.mesh import Coordinate, Mesh

TIMEOUT_SECONDS = 600.0


def initialise(mesh: Mesh, *, virtual_pipeline: int = 1, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
    """Meet the other ranks at MASTER_ADDR:MASTER_PORT as RANK of WORLD_SIZE, and enter the mesh.

    A default process group that is already there (Ray Train makes one) is kept.

    Args:
        mesh: the axes; as many ranks as WORLD_SIZE.
        virtual_pipeline: layer chunks a pipeline rank holds.
        timeout_seconds: of every collective.
    """
    if not dist.is_initialized():
        open_world("env://", rank=-1, world_size=-1, timeout_seconds=timeout_seconds)
    enter_mesh(mesh, virtual_pipeline=virtual_pipeline, timeout_seconds=timeout_seconds)


def open_world(init_method: str, *, rank: int, world_size: int, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
    """Make the default process group; `init_method` as in torch, e.g. `tcp://ADDRESS:PORT`."""
    dist.init_process_group(
        communication_backend(),
        init_method=init_method,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_seconds),
    )
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
        distributed_timeout_minutes=max(1, round(timeout_seconds / 60)),
        create_gloo_process_groups=False,
    )
    assert megatron_coordinate() == mesh.coordinate(dist.get_rank()), "Megatron orders ranks otherwise than Mesh"
    # Nothing draws random numbers in a step, but Megatron enters its generator's state under sequence parallelism.
    tensor_parallel.model_parallel_cuda_manual_seed(0)


def leave_mesh() -> None:
    """Destroy Megatron's groups; engines built on them must be closed before."""
    groups = [group for group in parallel_state._global_process_group_list or () if group is not None]
    parallel_state.destroy_model_parallel()
    for group in groups:
        # Ranks outside a group hold a placeholder for it.
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)


def shut_down() -> None:
    """Destroy all groups; the process can `initialise` again."""
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

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.mesh import Mesh

AXES = ("pipeline", "data", "context", "tensor")
meshes = st.builds(Mesh, **dict.fromkeys(AXES, st.integers(1, 5)))


@given(meshes)
def test_every_rank_has_one_place_and_every_place_one_rank(mesh):
    places = [mesh.coordinate(rank) for rank in range(mesh.world_size)]
    assert [mesh.rank(place) for place in places] == list(range(mesh.world_size))
    assert len(set(places)) == mesh.world_size


@given(meshes)
def test_tensor_ranks_are_adjacent_and_pipeline_ranks_farthest_apart(mesh):
    def distance(**step: int) -> int:
        return mesh.rank(type(mesh.coordinate(0))(**{axis: step.get(axis, 0) for axis in AXES}))

    assert distance(tensor=1) == 1
    assert distance(context=1) == mesh.tensor
    assert distance(data=1) == mesh.tensor * mesh.context
    assert distance(pipeline=1) == mesh.world_size // mesh.pipeline


@given(meshes, st.data())
def test_expert_groups_are_adjacent_replicas_of_the_dense_weights(mesh, data):
    groups = [size for size in range(1, mesh.num_replicas + 1) if mesh.num_replicas % size == 0]
    mesh = replace(mesh, expert=data.draw(st.sampled_from(groups)))
    everyone = [mesh.coordinate(rank) for rank in range(mesh.world_size)]
    for tensor in range(mesh.tensor):
        for pipeline in range(mesh.pipeline):
            replicas = [place for place in everyone if (place.tensor, place.pipeline) == (tensor, pipeline)]
            assert [mesh.replica(place) for place in replicas] == list(range(mesh.num_replicas))
            places = [(mesh.expert_replica(place), mesh.expert_rank(place)) for place in replicas]
            assert places == [(group, rank) for group in range(mesh.num_expert_replicas) for rank in range(mesh.expert)]


def test_expert_groups_are_whole():
    with pytest.raises(ValueError, match="groups of 4 ranks do not divide data 3 x context 2"):
        Mesh(data=3, context=2, expert=4)
    assert str(Mesh(data=2, expert=2)) == "tensor 1 x context 1 x data 2 x pipeline 1, expert 2"


@pytest.mark.parametrize("rank", [-1, 4])
def test_rank_outside_the_mesh_is_refused(rank):
    with pytest.raises(ValueError, match="outside the mesh of 4 ranks"):
        Mesh(tensor=2, data=2).coordinate(rank)


@pytest.mark.parametrize("axis", [*AXES, "expert"])
def test_axis_without_ranks_is_refused(axis):
    with pytest.raises(ValueError, match=f"mesh axis {axis} has size 0"):
        Mesh(**{axis: 0})

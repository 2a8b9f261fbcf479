from __future__ import annotations

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


@pytest.mark.parametrize("rank", [-1, 4])
def test_rank_outside_the_mesh_is_refused(rank):
    with pytest.raises(ValueError, match="outside the mesh of 4 ranks"):
        Mesh(tensor=2, data=2).coordinate(rank)


@pytest.mark.parametrize("axis", AXES)
def test_axis_without_ranks_is_refused(axis):
    with pytest.raises(ValueError, match=f"mesh axis {axis} has size 0"):
        Mesh(**{axis: 0})

"""The one rank of a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    """A world of one rank on its mesh; gone again also where a test of the module failed."""
    from parallel import groups
    from parallel.mesh import Mesh

    groups.open_world(groups.host_store(), rank=0, world_size=1)
    groups.enter_mesh(Mesh())
    yield
    groups.shut_down()

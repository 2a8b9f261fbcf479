"""The way in to the engines."""

import sys
from dataclasses import replace

import pytest

from conf import load
from conf.errors import UserError
from parallel.engine import make_engine
from parallel.mesh import Mesh


@pytest.mark.parametrize("backend", ["megatron", "deepspeed"])
def test_backend_that_is_missing_is_told_with_host_package_and_remedy(monkeypatch, backend):
    monkeypatch.delitem(sys.modules, f"parallel.{backend}", raising=False)
    monkeypatch.setitem(sys.modules, backend if backend == "deepspeed" else "megatron.core", None)
    config = load.compose(["recipe=foundation"])
    with pytest.raises(UserError, match=rf"engine.backend={backend} cannot be used on [\s\S]*pip install -e \."):
        make_engine(config.model, replace(config.engine, backend=backend), None, Mesh(), micro_batch=1)

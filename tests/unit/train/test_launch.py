"""A Ray that does not come up in time: once is the machine's load, twice is told."""

from __future__ import annotations

import os

import pytest

from conf.errors import UserError
from conf.load import compose
from train.launch import connect

LATE = "The current node timed out during startup."


@pytest.mark.parametrize(("faults", "starts"), [([], 1), ([LATE], 2), ([LATE, LATE], 2), (["no memory"], 1)])
def test_ray_is_started_once_more_where_its_parts_were_late(
    monkeypatch: pytest.MonkeyPatch, faults: list[str], starts: int
) -> None:
    import ray

    begun: list[str] = []

    def init(address: str, **_: object) -> None:
        begun.append(address)
        assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE", "ranks inherit it"
        if len(begun) <= len(faults):
            raise Exception(faults[len(begun) - 1])  # what Ray raises is no more than that

    monkeypatch.setattr(ray, "init", init)
    cluster = compose(["recipe=foundation"]).cluster
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED", "RAY_TRAIN_V2_ENABLED"):
        monkeypatch.setenv(name, "0")  # given back after the test
    monkeypatch.setenv("OMP_WAIT_POLICY", "")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    if len(faults) < starts:
        connect(cluster, 2, use_gpu=False)
    else:
        with pytest.raises(UserError, match=f"cannot use a Ray on this machine: Exception: {faults[-1]}"):
            connect(cluster, 2, use_gpu=False)
    assert begun == ["local"] * starts

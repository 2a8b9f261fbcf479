"""Archived shards on a real (moto) S3 that restores step by step."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Literal

import boto3
import numpy as np
import pytest
import servers

from conf.errors import DataError
from conf.schema import ShuffleConfig, StorageConfig
from data.archive import Archive
from data.shards import Access, Dataset
from data.storage import ArchivedObjectError, Store
from data.stream import Stream, StreamSpec
from data.thaw import needs_of, plan_of, request_all
from data.writer import DatasetFacts, DatasetWriter

LOCATION = "s3://cold/set"
ARCHIVED = ("train/shards/00000001.arrow", "train/shards/00000004.arrow")


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Endpoint of an S3 with a dataset of which two shards are archived; a restore takes three looks."""
    if servers.program("moto_server") is None:
        pytest.skip("no moto here: pip install 'moto[server]'")
    with pytest.MonkeyPatch.context() as patch, servers.moto(tmp_path_factory.mktemp("moto")) as endpoint:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3", endpoint_url=endpoint)
        client.create_bucket(Bucket="cold")
        facts = DatasetFacts(
            tokenizer_sha256="t",
            vocab_size=5000,
            end_of_text_id=0,
            held_out_fraction=0.1,
            block_tokens=256,
            shard_blocks=4,
        )
        writer = DatasetWriter(Store.open(LOCATION, StorageConfig(endpoint=endpoint)), facts)
        random = np.random.default_rng(3)
        for number in range(20):
            writer.add("train", f"doc{number}", "input", random.integers(1, 5000, 511))
        writer.add("held_out", "other", "input", np.arange(1, 20))
        writer.finish(num_duplicates=0, inputs=[])
        for name in ARCHIVED:
            source = {"Bucket": "cold", "Key": f"set/{name}"}
            client.copy_object(Bucket="cold", Key=f"set/{name}", CopySource=source, StorageClass="DEEP_ARCHIVE")
        transition = {"model_name": "s3::keyrestore", "transition": {"progression": "manual", "times": 3}}
        request = urllib.request.Request(
            f"{endpoint}/moto-api/state-manager/set-transition",
            data=json.dumps(transition).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request):
            pass
        yield endpoint


def stream_over(dataset: Dataset) -> Stream:
    spec = StreamSpec(
        mixtures=[(0, {"one": 1.0})],
        seed=1,
        sequence_length=64,
        global_batch=4,
        micro_batch=2,
        shuffle=ShuffleConfig(lanes=2, window_blocks=2),
        num_steps=40,
    )
    return Stream({"one": dataset}, spec)


def test_the_plan_names_archived_shards_first_needed_first_and_reading_waits_for_them(cold: str) -> None:
    storage = StorageConfig(endpoint=cold)
    archive = Archive(LOCATION, storage)
    assert archive.archived("train/shards") == set(ARCHIVED)
    dataset = Dataset.open(LOCATION, Access(storage=storage))
    stream = stream_over(dataset)
    needs = needs_of(stream, {"one": dataset}, {"one": set(ARCHIVED)}, range(40))
    assert {need.path for need in needs} == set(ARCHIVED)
    size = dataset.manifest.shard_blocks
    for need in needs:
        reads = [
            step for step in range(40) if need.path[-10:-6] in {f"{b // size:04d}" for _, b in stream.blocks(step)}
        ]
        assert need.first_step == reads[0]
    plan = plan_of(needs, steps=range(40), step_seconds=3600.0, retrieval="Bulk", days=7)
    assert plan.late_step == needs[0].first_step
    assert plan.wait_hours == pytest.approx(48 - needs[0].first_step, abs=0.01)
    assert plan_of(needs, steps=range(40), step_seconds=1e6, retrieval="Bulk", days=7).late_step in (None, 0)

    with pytest.raises(ArchivedObjectError, match="is archived and must be restored first"):
        stream.rows(needs[0].first_step, 0, 4)
    said: list[str] = []
    waiting = Dataset.open(
        LOCATION,
        Access(storage=storage, on_archived=lambda name: archive.wait(name, poll_seconds=0.02, say=said.append)),
    )
    rows = stream_over(waiting).rows(needs[0].first_step, 0, 4)
    assert rows.shape == (4, 65)
    waiting.tokens("train", 0, waiting.num_tokens("train"))
    assert "is being restored" in said[0] and any("training goes on" in text for text in said)
    assert len(said) == len(set(said))


def test_requesting_twice_asks_once(cold: str) -> None:
    archive = Archive(LOCATION, StorageConfig(endpoint=cold))
    client = boto3.client("s3", endpoint_url=cold)
    source = {"Bucket": "cold", "Key": f"set/{ARCHIVED[0]}"}
    client.copy_object(Bucket="cold", Key="set/train/shards/again.arrow", CopySource=source, StorageClass="GLACIER")
    dataset = Dataset.open(LOCATION, Access(storage=StorageConfig(endpoint=cold)))
    need = needs_of(stream_over(dataset), {"one": dataset}, {"one": set(ARCHIVED)}, range(40))[0]
    fresh = type(need)(source="one", path="train/shards/again.arrow", num_bytes=1, first_step=0)
    assert request_all({"one": archive}, [fresh]) == 1
    assert request_all({"one": archive}, [fresh]) == 0
    archive.request(fresh.path)


def test_without_permission_to_restore_the_shard_and_the_permission_are_named(
    cold: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore.exceptions import ClientError

    archive = Archive(LOCATION, StorageConfig(endpoint=cold))

    def denied(**_: object) -> None:
        raise ClientError({"Error": {"Code": "AccessDenied", "Message": "no"}}, "RestoreObject")

    monkeypatch.setattr(archive._client, "restore_object", denied)
    with pytest.raises(DataError, match=r"00000001\.arrow: is archived and may not be restored.*s3:RestoreObject"):
        archive.request(ARCHIVED[0])


@pytest.mark.parametrize(("encryption", "stored"), [("sse_s3", "AES256"), ("sse_kms", "aws:kms")])
def test_what_is_written_is_encrypted_as_asked(
    cold: str, encryption: Literal["sse_s3", "sse_kms"], stored: str
) -> None:
    Store.open("s3://cold/secret", StorageConfig(endpoint=cold, encryption=encryption)).write("object", b"text")
    client = boto3.client("s3", endpoint_url=cold)
    assert client.head_object(Bucket="cold", Key="secret/object")["ServerSideEncryption"] == stored

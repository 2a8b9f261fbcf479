"""Archived shards on a real (moto) S3 that restores step by step."""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import boto3
import numpy as np
import pytest
import servers
import torch.distributed as dist
from random_tokens import stream_over, write_dataset

from conf.errors import DataError
from conf.schema import StorageConfig
from data.archive import Archive
from data.prefetch import Prefetch
from data.shards import Access, Dataset
from data.storage import ArchivedObjectError, Store
from data.thaw import needs_of, plan_of, request_all
from train.data_gate import DataGate, Reading, StoppedWaitingError
from train.worker import Place

LOCATION = "s3://cold/set"
ARCHIVED = ("train/shards/00000001.arrow", "train/shards/00000004.arrow")


def restores_take(endpoint: str, looks: int) -> None:
    """Let a restore be under way for so many looks at the object."""
    transition = {"model_name": "s3::keyrestore", "transition": {"progression": "manual", "times": looks}}
    request = urllib.request.Request(
        f"{endpoint}/moto-api/state-manager/set-transition",
        data=json.dumps(transition).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request):
        pass


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
        store = Store.open(LOCATION, StorageConfig(endpoint=endpoint))
        write_dataset(store, num_documents=20, document_tokens=512, block_tokens=256, shard_blocks=4)
        for name in (*ARCHIVED, "held_out/shards/00000000.arrow"):
            source = {"Bucket": "cold", "Key": f"set/{name}"}
            client.copy_object(Bucket="cold", Key=f"kept/{name}", CopySource=source)
            client.copy_object(Bucket="cold", Key=f"set/{name}", CopySource=source, StorageClass="DEEP_ARCHIVE")
        restores_take(endpoint, looks=3)
        yield endpoint


def test_the_plan_names_archived_shards_first_needed_first_and_reading_waits_for_them(cold: str) -> None:
    storage = StorageConfig(endpoint=cold)
    archive = Archive(LOCATION, storage)
    assert archive.archived("train/shards") == set(ARCHIVED)
    dataset = Dataset.open(LOCATION, Access(storage=storage))
    # What is archived may be a split's first shard.
    dataset.check_stored()
    stream = stream_over(dataset)
    needs = needs_of(stream, {"one": dataset}, {"one": set(ARCHIVED)}, range(40))
    assert {need.path for need in needs} == set(ARCHIVED)
    size = dataset.manifest.shard_blocks
    for need in needs:
        reads = [
            step for step in range(40) if need.path[-10:-6] in {f"{b // size:04d}" for _, b in stream.blocks(step)}
        ]
        assert (need.first_step, need.last_step) == (reads[0], reads[-1])
    plan = plan_of(needs, steps=range(40), step_seconds=3600.0, retrieval="Bulk", days=7)
    assert plan.late_step == needs[0].first_step
    assert plan.wait_hours == pytest.approx(48 - needs[0].first_step, abs=0.01)
    last_day = (max(need.last_step for need in needs) + 1 + plan.wait_hours) / 24
    assert last_day <= plan.days < last_day + 1
    assert plan.dollars > plan_of(needs, steps=range(40), step_seconds=3600.0, retrieval="Bulk", days=1).dollars
    held_out = needs_of(stream, {"one": dataset}, {"one": archive.archived("held_out/shards")}, range(3, 40))
    assert [(need.path, need.first_step) for need in held_out] == [("held_out/shards/00000000.arrow", 3)]
    assert plan_of(needs, steps=range(40), step_seconds=1e6, retrieval="Bulk", days=7).late_step in (None, 0)

    with pytest.raises(ArchivedObjectError, match="is archived and must be restored first"):
        stream.rows(needs[0].first_step, 0, 4)
    waiting = Dataset.open(LOCATION, Access(storage=storage, archive=Archive(LOCATION, storage, poll_seconds=0.02)))
    rows = stream_over(waiting).rows(needs[0].first_step, 0, 4)
    assert rows.shape == (4, 65)
    assert len(waiting.tokens("train", 0, waiting.num_tokens("train"))) == waiting.num_tokens("train")
    assert waiting.waits_for is None


COLLECTIVE_SECONDS = 2.0


class Ranks:
    """Two data ranks as threads: prefetching and the gate are the loop's own, the step is a barrier with a time-out."""

    def __init__(self, endpoint: str, poll_seconds: float) -> None:
        storage = StorageConfig(endpoint=endpoint)
        self.store, self.said, self.stop = dist.HashStore(), [], threading.Event()
        self.collective = threading.Barrier(2, timeout=COLLECTIVE_SECONDS)
        self.datasets = [
            Dataset.open(
                LOCATION, Access(storage=storage, archive=Archive(LOCATION, storage, poll_seconds=poll_seconds))
            )
            for _ in range(2)
        ]

    def run(self, num_steps: int) -> list[tuple[int, list[np.ndarray]]]:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda rank: self.run_rank(rank, num_steps), range(2)))

    def gate(self, rank: int) -> DataGate:
        return DataGate(
            self.store,
            name="stage",
            place=Place(rank=rank, world_size=2, local_rank=rank, ranks_on_node=2, master_address="", master_port=0),
            waits_for=lambda: self.datasets[rank].waits_for,
            say=self.said.append,
            quiet_seconds=0.1,
        )

    def run_rank(self, rank: int, num_steps: int) -> tuple[int, list[np.ndarray]]:
        dataset, taken = self.datasets[rank], []
        stream = stream_over(dataset)
        gate = self.gate(rank)

        def make(step: int) -> np.ndarray:
            try:
                return stream.rows(step, 2 * rank, 2)
            finally:
                gate.arrive(step)

        with Prefetch(make, range(num_steps), depth=4, interrupt=dataset.give_up) as batches:
            for step in range(num_steps):
                if not gate.opens(step, self.stop.is_set):
                    break
                self.collective.wait()
                taken.append(next(batches))
        return len(taken), taken


# More than ranks that wait for a few seconds take.
MANY_LOOKS = 60


def archive_anew(endpoint: str) -> None:
    """Archive the shards again; a restore ends after `MANY_LOOKS`, or at the next look after fewer are allowed."""
    restores_take(endpoint, MANY_LOOKS)
    client = boto3.client("s3", endpoint_url=endpoint)
    for name in ARCHIVED:
        key = {"Bucket": "cold", "Key": f"set/{name}"}
        content = client.get_object(Bucket="cold", Key=f"kept/{name}")["Body"].read()
        client.delete_object(**key)
        client.put_object(**key, Body=content, StorageClass="DEEP_ARCHIVE")
        # Moto takes an object as restored until it was looked at this often, and only then as being restored.
        for _ in range(MANY_LOOKS):
            client.head_object(**key)


def test_all_ranks_wait_for_a_shard_outside_of_collectives_and_go_on(cold: str) -> None:
    num_steps = 20
    archive_anew(cold)
    ranks = Ranks(cold, poll_seconds=0.25 * COLLECTIVE_SECONDS)
    started = time.monotonic()
    threading.Timer(2.5 * COLLECTIVE_SECONDS, restores_take, [cold, 1]).start()
    counts, rows = zip(*ranks.run(num_steps), strict=True)
    # Longer than a rank may sit in a collective.
    assert time.monotonic() - started > 2 * COLLECTIVE_SECONDS
    assert counts == (num_steps, num_steps)
    expected = stream_over(Dataset.open(LOCATION, Access(storage=StorageConfig(endpoint=cold))))
    for step in range(num_steps):
        assert np.array_equal(np.concatenate([rows[0][step], rows[1][step]]), expected.rows(step, 0, 4))
    assert any(re.search(r"waits for s3://cold/set/train/shards/0000000\d\.arrow", text) for text in ranks.said)
    assert any("the run goes on" in text for text in ranks.said)


def test_a_run_that_waits_for_a_shard_stops_when_asked(cold: str) -> None:
    archive_anew(cold)
    ranks = Ranks(cold, poll_seconds=3600.0)
    threading.Timer(1.0, ranks.stop.set).start()
    started = time.monotonic()
    counts, _ = zip(*ranks.run(20), strict=True)
    assert counts[0] == counts[1] < 20
    assert time.monotonic() - started < 30
    # Later reads wait again, here until somebody else has asked often enough.
    assert all(dataset.waits_for is None for dataset in ranks.datasets)


@pytest.mark.parametrize("stops", [False, True])
def test_what_is_read_besides_training_steps_is_waited_for_as_well(cold: str, stops: bool) -> None:
    archive_anew(cold)
    ranks = Ranks(cold, poll_seconds=3600.0 if stops else 0.2)

    def run_rank(rank: int) -> np.ndarray | None:
        dataset = ranks.datasets[rank]
        reading = Reading(ranks.gate(rank), name="prune", datasets=[dataset], asked_to_stop=ranks.stop.is_set)
        reading.of_all_ranks(lambda: None)
        try:
            # The first rank has nothing to wait for, the second a token of an archived shard.
            tokens = reading.of_all_ranks(lambda: dataset.tokens("train", 4 * 4 * 256 * rank, 65))
        except StoppedWaitingError:
            return None
        ranks.collective.wait()
        return tokens

    started = time.monotonic()
    action = ranks.stop.set if stops else lambda: restores_take(cold, 1)
    threading.Timer(1.0 if stops else 1.5 * COLLECTIVE_SECONDS, action).start()
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(run_rank, range(2)))
    if stops:
        assert rows == [None, None]
    else:
        assert time.monotonic() - started > COLLECTIVE_SECONDS
        assert [len(row) for row in rows] == [65, 65]
        assert any(text.startswith("stage prune waits for s3://cold/set/train/shards/00000004") for text in ranks.said)


def test_requesting_twice_asks_once(cold: str) -> None:
    restores_take(cold, looks=1)
    archive = Archive(LOCATION, StorageConfig(endpoint=cold))
    client = boto3.client("s3", endpoint_url=cold)
    source = {"Bucket": "cold", "Key": "set/train/shards/00000000.arrow"}
    client.copy_object(Bucket="cold", Key="set/train/shards/again.arrow", CopySource=source, StorageClass="GLACIER")
    dataset = Dataset.open(LOCATION, Access(storage=StorageConfig(endpoint=cold)))
    need = needs_of(stream_over(dataset), {"one": dataset}, {"one": set(ARCHIVED)}, range(40))[0]
    fresh = type(need)(source="one", path="train/shards/again.arrow", num_bytes=1, first_step=0, last_step=9)
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

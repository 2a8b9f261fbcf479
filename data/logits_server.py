"""A teacher's likeliest tokens handed on while it speaks: blocks as in a recording, over Arrow Flight, none on disk.

A rank of the teacher holds what it has said of the last few steps, and serves it. Ranks of its students ask for samples
ahead of need, and wait for what is not said yet. Who holds what is arithmetic: samples of a step are dealt to servers
in equal runs, as to data ranks.
"""

from __future__ import annotations

import hmac
import json
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import flight

from conf.errors import DataError
from data.logits import Floats, Ids, Likeliest, LogitsManifest, LogitsReader, block_of, said_in

PATIENCE_SECONDS = 1.0
"""A request for what is not said yet is answered with nothing after so long: both sides may want to end."""
# The proxy of a site's environment is for the world outside; the ranks of a run reach each other.
NO_PROXY = [("grpc.enable_http_proxy", 0)]


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens, and what it wants to hear."""

    host: str
    port: int
    token: str


class LogitsServer(flight.FlightServerBase):  # type: ignore[misc]
    """What one data rank of a teacher says, as long as it is wanted.

    Args:
        host: by which other nodes reach this one.
    """

    def __init__(self, host: str) -> None:
        super().__init__("grpc://0.0.0.0:0")
        self.address = Address(host, self.port, secrets.token_hex(16))
        self._held: dict[tuple[str, int], pa.RecordBatch] = {}
        self._forgotten: dict[str, int] = {}
        self._changed = threading.Condition()

    def hold(self, stage: str, first_sample: int, likeliest: Likeliest, manifest: LogitsManifest) -> None:
        """Have what was said of consecutive samples for whoever asks."""
        blocks = [block_of(ids_SK, values_SK, manifest) for ids_SK, values_SK in zip(*likeliest, strict=True)]
        with self._changed:
            self._held |= {(stage, first_sample + place): block for place, block in enumerate(blocks)}
            self._changed.notify_all()

    def forget(self, stage: str, *, before: int) -> None:
        """Drop samples that no student will ask for any more."""
        with self._changed:
            self._forgotten[stage] = before
            self._held = {key: block for key, block in self._held.items() if key[0] == stage and key[1] >= before}

    @property
    def num_held(self) -> int:
        """Samples in memory."""
        return len(self._held)

    def do_get(self, context: flight.ServerCallContext, ticket: flight.Ticket) -> flight.FlightDataStream:
        """The block of a sample, or no block where it is not said yet."""
        asked = json.loads(ticket.ticket)
        if not hmac.compare_digest(asked["token"], self.address.token):
            raise flight.FlightUnauthenticatedError("this teacher is another run's")
        key = (asked["stage"], asked["sample"])
        with self._changed:
            if key[1] < self._forgotten.get(key[0], 0):
                raise flight.FlightServerError(f"sample {key[1]} was dropped: its step is over")
            self._changed.wait_for(lambda: key in self._held, PATIENCE_SECONDS)
            block = self._held.get(key)
        if block is None:
            return flight.GeneratorStream(pa.schema([]), iter(()))
        return flight.RecordBatchStream(pa.RecordBatchReader.from_batches(block.schema, [block]))


class ServedLogits(LogitsReader):
    """What the servers of a teacher say.

    Args:
        servers: in order of the teacher's data ranks.
        manifest: of the stage's samples.
        stage: that learns.
        samples_per_step: over all data ranks.

    Attributes:
        waited_seconds: for what was not said or sent yet.
    """

    def __init__(
        self, servers: Sequence[Address], manifest: LogitsManifest, *, stage: str, samples_per_step: int
    ) -> None:
        super().__init__(manifest)
        self.waited_seconds = 0.0
        self._servers = servers
        self._stage = stage
        self._samples_per_step = samples_per_step
        self._clients: dict[int, flight.FlightClient] = {}
        self._lock = threading.Lock()
        self._closed = False

    def read(self, sample_ids: npt.NDArray[np.int64]) -> Likeliest:
        """See `LogitsReader.read`."""
        started = time.monotonic()
        try:
            return super().read(sample_ids)
        finally:
            self.waited_seconds += time.monotonic() - started

    def close(self) -> None:
        """Leave the servers."""
        self._closed = True
        super().close()
        for client in self._clients.values():
            client.close()

    def _fetched(self, sample: int) -> tuple[Ids, Floats]:
        number = sample % self._samples_per_step * len(self._servers) // self._samples_per_step
        server = self._servers[number]
        asked = {"token": server.token, "stage": self._stage, "sample": sample}
        try:
            while not self._closed:
                blocks = [
                    chunk.data for chunk in self._client(number).do_get(flight.Ticket(json.dumps(asked).encode()))
                ]
                if blocks:
                    return said_in(blocks[0], self.manifest)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(
                f"the teacher at {server.host}:{server.port} did not say sample {sample}: {error}"
            ) from error
        raise DataError(f"sample {sample} was asked for and is no longer wanted")

    def _client(self, number: int) -> flight.FlightClient:
        with self._lock:
            if number not in self._clients:
                server = self._servers[number]
                self._clients[number] = flight.FlightClient(
                    f"grpc://{server.host}:{server.port}", generic_options=NO_PROXY
                )
            return self._clients[number]

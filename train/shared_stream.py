"""One rank reads for all ranks of its node that see the same rows.

Ranks of a data coordinate hold different parts of the model and see the same rows. So on each node the first of them
asks the storage, decodes and keeps blocks, whatever the tensor, context and pipeline sizes, and hands rows on through
sockets that have no file and let no other user in.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
from typing import TYPE_CHECKING

import numpy as np

from conf.errors import DataError
from data.batch import Batch
from data.cache import Tokens
from data.stream import Stream
from parallel.mesh import Mesh
from train.worker import Place

if TYPE_CHECKING:
    from torch.distributed import Store

POLL_SECONDS = 0.2
HEADER = struct.Struct("<q?q")
"""The step, whether its rows were read, and the bytes that follow: the rows, or why not."""
CREDENTIALS = struct.Struct("3i")
"""Process, user and group at the other end of a socket."""


class SharedStream:
    """The batches of one rank, step after step; for use by one thread, `give_up` apart."""

    def __init__(self, stream: Stream, mesh: Mesh, place: Place, store: Store, name: str) -> None:
        """Agree on who reads; all ranks do so at the same time.

        Args:
            stream: of the batches.
            mesh: of the ranks.
            place: who this rank is.
            store: shared by all ranks.
            name: tells streams of one store apart.
        """
        self._stream = stream
        self._given_up = threading.Event()
        data = mesh.coordinate(place.rank).data
        self._first_row, self._num_rows = stream.share_of(data, mesh.data)
        alike = [rank for rank in place.ranks_here if mesh.coordinate(rank).data == data]
        # On one that reads for others: where they come to, those that came, and how many will.
        self._door: socket.socket | None = None
        self._peers: list[socket.socket] = []
        self._num_peers = 0
        # On one of the others: where its rows come from.
        self._source: socket.socket | None = None
        key = f"shared_stream/{name}/{alike[0]}"
        if place.rank != alike[0]:
            self._source = _socket()
            self._source.connect(bytes.fromhex(store.get(key).decode()))
        elif len(alike) > 1:
            self._num_peers = len(alike) - 1
            self._door = _socket()
            # The kernel finds a name, which is none of a file.
            self._door.bind("")
            self._door.listen(self._num_peers)
            store.set(key, self._door.getsockname().hex())

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step; every rank asks for the same steps in the same order.

        Raises:
            DataError: a shard is missing or damaged, on every rank that sees its rows; or the rank that reads ended.
        """
        try:
            rows = self._read(step) if self._source is None else self._received(self._source, step)
        except ConnectionError as error:
            raise DataError(
                f"A rank of this node that sees the same rows has ended ({error}); its log says why."
            ) from error
        return self._stream.batches_of(rows, step, self._first_row)

    def give_up(self) -> None:
        """Let whoever waits for another rank fail, now and from now on."""
        self._given_up.set()

    def close(self) -> None:
        """Leave the others, when all steps are taken: whoever still expects rows fails.

        Not where this rank fails: the others would tell of that before it does.
        """
        for end in (self._door, self._source, *self._peers):
            if end is not None:
                end.close()

    def _read(self, step: int) -> Tokens:
        """A step's rows from the storage, given to all who see them."""
        try:
            rows = self._stream.rows(step, self._first_row, self._num_rows)
        except DataError as error:
            self._hand_on(step, str(error).encode(), is_read=False)
            raise
        self._hand_on(step, rows.data.cast("B"), is_read=True)
        return rows

    def _hand_on(self, step: int, content: bytes | memoryview, *, is_read: bool) -> None:
        """Give a step's rows, or the reason why there are none, to all who see them."""
        while self._door is not None and len(self._peers) < self._num_peers:
            self._wait(self._door, select.POLLIN)
            peer, _ = self._door.accept()
            if _user_of(peer) == os.getuid():
                self._peers.append(peer)
            else:
                peer.close()
        message = memoryview(HEADER.pack(step, is_read, len(content)) + content)
        for peer in self._peers:
            left = message
            while left:
                self._wait(peer, select.POLLOUT)
                left = left[peer.send(left, socket.MSG_DONTWAIT) :]

    def _received(self, source: socket.socket, step: int) -> Tokens:
        """A step's rows from the rank that reads them."""
        sent_step, is_read, num_bytes = HEADER.unpack(self._next(source, HEADER.size))
        assert sent_step == step, f"rows of step {sent_step} came, of step {step} are wanted"
        content = self._next(source, num_bytes)
        if not is_read:
            raise DataError(bytes(content).decode())
        length = self._stream.spec.sequence_length + 1
        rows: Tokens = np.frombuffer(content, f"u{num_bytes // (self._num_rows * length)}")
        return rows.reshape(self._num_rows, length)

    def _next(self, source: socket.socket, num_bytes: int) -> bytearray:
        content = bytearray(num_bytes)
        left = memoryview(content)
        while left:
            self._wait(source, select.POLLIN)
            count = source.recv_into(left)
            if not count:
                raise ConnectionResetError("rows were to come")
            left = left[count:]
        return content

    def _wait(self, end: socket.socket, event: int) -> None:
        """Wait until a socket can be used, however long that takes: a shard may have to be thawed."""
        # Not select.select, which ends with descriptor 1023.
        ready = select.poll()
        ready.register(end, event)
        while not ready.poll(POLL_SECONDS * 1000):
            if self._given_up.is_set():
                raise DataError("Rows of other ranks were not waited for to the end because the run was stopped.")


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)


def _user_of(peer: socket.socket) -> int:
    """The user at the other end."""
    _, user, _ = CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
    return int(user)

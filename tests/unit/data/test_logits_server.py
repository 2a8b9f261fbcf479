"""What a teacher says, handed from its ranks to its students' while it is wanted."""

import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from logits_samples import MANIFEST, said

from conf.errors import DataError
from data.logits import Likeliest
from data.logits_server import LogitsServer, ServedLogits

STEP = 8  # samples; two servers have half of each


@pytest.fixture
def servers() -> Iterator[list[LogitsServer]]:
    both = [LogitsServer("127.0.0.1") for _ in range(2)]
    yield both
    for server in both:
        server.shutdown()


def student(servers, stage="distill"):
    return ServedLogits([server.address for server in servers], MANIFEST, stage=stage, samples_per_step=STEP)


def speak(servers, step, stage="distill"):
    for number, server in enumerate(servers):
        first = step * STEP + number * STEP // 2
        server.hold(stage, first, Likeliest(*(each[first : first + STEP // 2] for each in said())), MANIFEST)


def test_samples_come_from_whoever_says_them_and_are_waited_for(servers):
    reader, wanted = student(servers), np.array([3, 15, 0, 8])
    reader.expect(range(2 * STEP))
    later = threading.Timer(0.05, lambda: [speak(servers, step) for step in range(2)])
    later.start()
    for mine, its in zip(reader.read(wanted), said(), strict=True):
        assert np.array_equal(mine, its[wanted])
    assert reader.waited_seconds > 0
    later.join()
    reader.close()


def test_a_step_that_is_over_is_dropped_and_so_is_the_stage_before(servers):
    for step in range(2):
        speak(servers, step)
    for server in servers:
        server.forget("distill", before=STEP)
        assert server.num_held == STEP // 2
    reader = student(servers)
    with pytest.raises(DataError, match="sample 3 was dropped"):
        reader.read(np.array([3]))
    assert reader.read(np.array([9])).ids_BSK.shape == (1, MANIFEST.tokens, MANIFEST.top_k)
    speak(servers, 0, "recover")
    servers[0].forget("recover", before=0)
    assert servers[0].num_held == STEP // 2
    reader.close()


def test_a_student_that_ends_waits_for_nothing_and_strangers_get_nothing(servers):
    speak(servers, 0)
    reader = student(servers)
    reader.expect([9])
    reader.close()
    stranger = student(servers)
    stranger._servers = [replace(server.address, token="guessed") for server in servers]
    with pytest.raises(DataError, match="another run"):
        stranger.read(np.array([0]))
    stranger.close()


def test_a_teacher_that_is_gone_is_told_with_its_address(servers):
    reader = student(servers)
    servers[0].shutdown()
    with pytest.raises(DataError, match=rf"teacher at 127.0.0.1:{servers[0].address.port} did not say sample 0"):
        reader.read(np.array([0]))
    reader.close()

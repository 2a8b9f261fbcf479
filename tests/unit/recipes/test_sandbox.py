"""Programs that nobody has read: what they can do, and what they cannot."""

import time

import pytest

from conf.errors import UserError
from recipes import sandbox, sandbox_child

HARMLESS = "import math, typing, collections\nassert math.gcd(12, 18) == 6\n"


def test_a_program_that_comes_to_its_end_passes():
    assert sandbox.run(HARMLESS, seconds=10).verdict == "passed"


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 == 2",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "print('all tests passed'); raise SystemExit",
        "def f(:",
        "import ctypes; ctypes.string_at(0)",
    ],
)
def test_leaving_early_is_failing(program):
    assert sandbox.run(program, seconds=10).verdict == "failed"


def test_it_ends_in_time_with_all_that_it_started():
    began = time.monotonic()
    program = "import os, signal\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\nos.fork()\nos.setsid\nwhile True: pass"
    assert sandbox.run(program, seconds=0.5).verdict == "timed out"
    assert time.monotonic() - began < 0.5 + sandbox.SETUP_SECONDS


def test_it_reaches_no_network_writes_nothing_and_has_no_power(tmp_path):
    tmp_path.chmod(0o777)
    program = f"""
import ctypes, os, socket
def refused(action):
    try:
        action()
    except OSError:
        return True
refused(lambda: 0)
assert refused(lambda: socket.create_connection(("127.0.0.1", 22), timeout=1))
assert refused(lambda: socket.create_connection(("192.0.2.1", 80), timeout=1))
assert [name for _, name in socket.if_nameindex()] == ["lo"]
for place in ({str(tmp_path)!r}, "/var/tmp", "/dev/shm", "/root", "/", os.path.dirname(os.__file__)):
    assert refused(lambda: open(place + "/left-behind", "w")), place
assert refused(lambda: open("/dev/null", "w")), "no devices, and so no disks"
assert os.listdir("/tmp") == [] == os.listdir("/run")
open("here", "w").write("x" * 1000)
assert ctypes.CDLL(None).mount(b"none", b"/", None, 0x20 | 0x1000, None) != 0
assert ctypes.CDLL(None).sethostname(b"x", 1) != 0
assert not os.listdir("/proc")
"""
    outcome = sandbox.run(program, seconds=10)
    assert outcome.verdict == "passed", outcome.said
    assert not list(tmp_path.iterdir())


def test_it_cannot_fill_memory_or_what_keeps_its_words():
    assert sandbox.run("x = bytearray(3 * 2**30)", seconds=10).verdict == "failed"
    outcome = sandbox.run("while True: print('x' * 10000)", seconds=5)
    assert outcome.verdict != "passed" and len(outcome.said) <= sandbox.SAID_BYTES


def test_what_cannot_be_fenced_in_is_not_run(monkeypatch, tmp_path):
    child = tmp_path / "child.py"
    source = open(sandbox_child.__file__, encoding="utf-8").read()
    child.write_text(source.replace("SYS_MOUNT_SETATTR = 442", "SYS_MOUNT_SETATTR = 9999"))
    monkeypatch.setattr(sandbox_child, "__file__", str(child))
    with pytest.raises(UserError, match=r"cannot be fenced in here .*mount read-only"):
        sandbox.run(HARMLESS, seconds=5)

"""Run a program that nobody has read: without a network, with nothing it may write to, and not for long.

The program runs in a child with namespaces of its own (Linux): no network, every mount read-only and without devices,
a small `/tmp` in memory, process ids that end with it, no capabilities, limits on time, memory and files. Where the
kernel refuses any of that, nothing is run. What the user may read, the program can read, and tell nobody.

It is made for code that a model wrote for a task. It is no place for programs that attack the kernel.
"""

from __future__ import annotations

import secrets
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from conf.errors import UserError
from recipes import sandbox_child

SETUP_SECONDS = 10.0
SAID_BYTES = 500

Verdict = Literal["passed", "failed", "timed out"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended, and the end of what it said."""

    verdict: Verdict
    said: str


def run(program: str, *, seconds: float) -> Outcome:
    """Run a Python program, which sees the standard library alone; it passes if it comes to its end.

    Leaving early, by `exit` or a signal, is failing, whatever the exit code says.

    Args:
        program: its text.
        seconds: of wall time that it may take.

    Raises:
        UserError: this machine cannot fence it in, so it was not run.
    """
    token = secrets.token_hex(16)
    # What is said goes to a file, whose size is limited, and not to a pipe, which would have to be emptied.
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(sandbox_child.__file__)), str(seconds), token],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd="/",
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
        )
        try:
            child.communicate(program.encode("utf-8", "surrogatepass"), timeout=seconds + SETUP_SECONDS)
        except subprocess.TimeoutExpired:
            return Outcome("timed out", "")
        finally:
            child.kill()
            child.wait()
        output.seek(0)
        text = output.read().decode(errors="replace").rstrip()
    if child.returncode == sandbox_child.UNAVAILABLE:
        raise UserError(
            f"generated code is not run, because it cannot be fenced in here ({text[-SAID_BYTES:]}). "
            "That needs Linux 5.12 or later, and user namespaces or the rights of an administrator."
        )
    if child.returncode == sandbox_child.TIMED_OUT:
        return Outcome("timed out", text[-SAID_BYTES:])
    passed = child.returncode == 0 and text.endswith(token)
    return Outcome("passed" if passed else "failed", text.removesuffix(token)[-SAID_BYTES:])

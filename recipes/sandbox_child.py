"""The inside of `recipes/sandbox.py`: fences itself in, then runs what it reads. Started with `python -I -S`.

Standard library alone: nothing of the project, or of what is installed beside it, is on the path of the program.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys
import traceback

UNAVAILABLE, TIMED_OUT = 97, 98
MEMORY_BYTES = 2 * 2**30
FILE_BYTES = 2**20
NUM_FILES = 64
FOLDER = "/tmp"
FOLDER_OPTIONS = b"size=16m,mode=777"
# What others talk to each other through.
HIDDEN = ("/var/tmp", "/dev/shm", "/run", "/proc")

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 0x1, 0x2, 0x4, 0x4000, 0x40000
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 0x1, 0x2, 0x4
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
CAPABILITY_VERSION_3 = 0x20080522
# The same number on every architecture, as for all calls added since 2019.
SYS_MOUNT_SETATTR = 442

libc = ctypes.CDLL(None, use_errno=True)


def main() -> int:
    """Fence in, run, and tell how it ended by the exit code."""
    _, seconds, token = sys.argv
    program = sys.stdin.buffer.read()
    sys.argv = ["program"]
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        leave_the_others()
    except OSError as error:
        print(error)
        return UNAVAILABLE
    # Process ids begin anew with the next child: when it ends, the kernel ends all that it started.
    first = os.fork()
    if first == 0:
        os._exit(inside(program, token))
    signal.signal(signal.SIGALRM, lambda *_: os.kill(first, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, float(seconds))
    _, status = os.waitpid(first, 0)
    timed_out = os.WIFSIGNALED(status) and signal.getitimer(signal.ITIMER_REAL)[0] == 0.0
    return TIMED_OUT if timed_out else os.waitstatus_to_exitcode(status) & 0x7F


def leave_the_others() -> None:
    """Namespaces of its own, in which nothing but `FOLDER` can be written to.

    Raises:
        OSError: the kernel refused.
    """
    user, group = os.geteuid(), os.getegid()
    namespaces = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    if libc.unshare(namespaces | CLONE_NEWUSER) == 0:
        for file, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            with open(f"/proc/self/{file}", "w", encoding="ascii") as stream:
                stream.write(text)
    else:
        # Some containers have no user namespaces, and an administrator who needs none.
        check("unshare", libc.unshare(namespaces))
    check("mount private", libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    attributes = struct.pack("QQQQ", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, 0, 0, 0)
    done = libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, len(attributes))
    check("mount read-only", done)
    for place in (FOLDER, *filter(os.path.isdir, HIDDEN)):
        flags, options = (0, FOLDER_OPTIONS) if place == FOLDER else (MS_RDONLY, None)
        made = libc.mount(b"tmpfs", place.encode(), b"tmpfs", MS_NOSUID | MS_NODEV | flags, options)
        check(f"mount {place}", made)


def inside(program: bytes, token: str) -> int:
    """Give away what power is left, then run."""
    try:
        give_power_away()
        os.chdir(FOLDER)
        if not os.access(os.__file__, os.R_OK):
            raise OSError(f"{os.__file__} cannot be read without rights")
    except OSError as error:
        print(error, flush=True)
        return UNAVAILABLE
    try:
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc(limit=-3)
        return 1
    sys.stdout.flush()
    os.write(1, token.encode())
    return 0


def give_power_away() -> None:
    """No capabilities, no way to get any, and limits."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    limits = {
        resource.RLIMIT_AS: MEMORY_BYTES,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: NUM_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    check("no_new_privs", libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    header, none = struct.pack("Ii", CAPABILITY_VERSION_3, 0), bytes(24)
    check("capset", libc.capset(header, none))


def check(what: str, result: int) -> None:
    """Raise what the last call left behind."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    sys.exit(main())

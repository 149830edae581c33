"""A contestant's processes, watched from outside: memory of all of them together, and bytes on the loopback interface.

The processes get a loopback interface of their own, where the system lets an ordinary user have one (a network
namespace), so that its counter counts their bytes only.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

MEGABYTE = 1e6
POLL_SECONDS = 0.05
MEMORY_POLL_SECONDS = 0.5
MEMORY_SHARE = 0.01
"""Of one core's time, that looking at memory may take once the first round has ended: the kernel walks all pages."""

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000  # of unshare(2)
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1  # of netdevice(7)


@dataclass
class Watch:
    """What was seen of a contestant.

    started: unix time at which its first process was started.  seconds: until all had ended.  status: its exit status.
    peak_mb: the largest sum over all processes of their proportional set size, in which a page that n processes share
        counts 1/n for each.
    rss_mb: the largest resident memory of a process, by the name that it has given itself, or else by its script.
    loopback: (unix time, bytes sent so far), whenever that had grown; empty without an interface of their own.
    written: the modification time of the watched file after each change, that is, when each round ended.
    """

    started: float
    seconds: float = 0.0
    status: int | None = None
    peak_mb: float = 0.0
    rss_mb: dict[str, float] = field(default_factory=dict)
    loopback: list[tuple[float, int]] = field(default_factory=list)
    written: list[float] = field(default_factory=list)

    def bytes_until(self, moment: float) -> int:
        """That the interface had sent at a unix time."""
        return max((count for at, count in self.loopback if at <= moment), default=0)


def watch(
    command: list[str],
    environment: dict[str, str],
    output: IO[str],
    errors: IO[str],
    has_own_loopback: bool,
    watched_file: Path,
    timeout_seconds: float,
) -> Watch:
    """Run a command until it has ended, or for so long, and leave none of its descendants behind.

    watched_file: to which the end of a round adds a line.
    """
    seen = Watch(time.time())
    process = subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdout=output,
        stderr=errors,
        preexec_fn=_enter_own_network if has_own_loopback else None,
    )
    family = {process.pid: psutil.Process(process.pid)}
    next_memory = 0.0
    try:
        while process.poll() is None and time.time() - seen.started < timeout_seconds:
            if has_own_loopback:
                _see_loopback(process.pid, seen)
            _see_file(watched_file, seen)
            if time.monotonic() >= next_memory:
                spent = time.thread_time()
                _see_memory(process.pid, family, seen)
                spent = time.thread_time() - spent
                pause = max(MEMORY_POLL_SECONDS, spent / MEMORY_SHARE if seen.written else 0.0)
                next_memory = time.monotonic() + pause
            time.sleep(POLL_SECONDS)
        _see_file(watched_file, seen)
        seen.status = process.poll()
    finally:
        _find_children(process.pid, family)
        for member in family.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()  # psutil makes sure that it is still the same process
        process.wait()
    seen.seconds = time.time() - seen.started
    return seen


def own_loopback_refused() -> str | None:
    """Why processes cannot have a loopback interface of their own here, or None where they can."""
    try:
        subprocess.run(["true"], preexec_fn=_enter_own_network, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"the system refuses a network namespace ({error})"
    return None


def _enter_own_network() -> None:
    """Move this process, just forked, to a network of its own that has only a loopback interface, which is up."""
    user, group = os.getuid(), os.getgid()
    library = ctypes.CDLL(None, use_errno=True)
    if library.unshare(_CLONE_NEWNET):  # only root may, and others in a user namespace where they keep their ids
        if library.unshare(_CLONE_NEWUSER | _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("16sH14x", b"lo", 0)
        (flags,) = struct.unpack("16xH14x", fcntl.ioctl(probe, _SIOCGIFFLAGS, request))
        fcntl.ioctl(probe, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | _IFF_UP))


def _see_loopback(pid: int, seen: Watch) -> None:
    try:
        lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()
    except OSError:  # it has just ended
        return
    sent = next((int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("lo:")), 0)
    if not seen.loopback or sent > seen.loopback[-1][1]:
        seen.loopback.append((time.time(), sent))


def _see_file(path: Path, seen: Watch) -> None:
    with contextlib.suppress(FileNotFoundError):
        status = path.stat()
        if status.st_size and (not seen.written or status.st_mtime > seen.written[-1]):
            seen.written.append(status.st_mtime)


def _find_children(pid: int, family: dict[int, psutil.Process]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in family[pid].children(recursive=True):
            family.setdefault(child.pid, child)


def _see_memory(pid: int, family: dict[int, psutil.Process], seen: Watch) -> None:
    total = 0.0
    _find_children(pid, family)
    for member in family.values():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            memory = member.memory_full_info()
            total += memory.pss
            script = member.name()
            if script.startswith("python"):
                script = next((Path(word).name for word in member.cmdline() if word.endswith(".py")), script)
            seen.rss_mb[script] = max(seen.rss_mb.get(script, 0.0), memory.rss / MEGABYTE)
    seen.peak_mb = max(seen.peak_mb, total / MEGABYTE)

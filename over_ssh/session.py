"""A connection to a host by the system's ssh: what is asked there and answered, and how it ends."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from over_ssh.hosts_file import Host
from over_ssh.on_host import program
from perfedavg.terminal.console import command_line

CONNECT_SECONDS = 10
OPEN_SECONDS = 60.0
"""Until a Python answers at the other end. A home that hangs lets it wait for ever, and so does a key to be touched."""
CLOSE_SECONDS = 2.0
MAX_CONNECTING = 8
"""Connections that are made at a time. An sshd, as it is installed, refuses some where ten wait to be let in, and all
may go by the same one, a jump host's."""
WRITE_SECONDS = 2.0
"""For a write in another thread to end, before the connection counts as stuck."""
SIGNS_OF_LIFE = 3
"""That ssh asks for, without an answer, before it gives the connection up."""
OLDEST_PYTHON = (3, 10)
_READ_PROGRAM = (
    f'import os,sys;sys.version_info<{OLDEST_PYTHON}and sys.exit("Python "+sys.version.split()[0]+" there is too old");'
    'exec(b"".join(iter(lambda:os.read(0,1)or os._exit(1),bytes(1))))'
)
"""Runs what standard input brings up to a zero byte."""
_FIND_PYTHON = (
    'set -- "$@" "${XDG_CACHE_HOME:-$HOME/.cache}/personalized-fedavg/.venv/bin/python" python3; o=; '
    'for p do case $p in "~/"*) p=$HOME/${p#??};; esac; '
    f'v=$("$p" -c "import sys;print(sys.version_info>={OLDEST_PYTHON})" </dev/null 2>/dev/null); '
    '[ "$v" = True ] && exec "$p" -c "$0"; [ "$v" = False ] && o=${o:-$p}; done; [ "$o" ] && exec "$o" -c "$0"; '
    'echo "no Python 3 that runs among $*" >&2; exit 127'
)
"""The first that is recent enough; without any, the first that is too old, which _READ_PROGRAM says.

Both without what a login shell other than sh takes for more than a character: quotes, backslashes, `!`.
"""


class HostError(Exception):
    """A host cannot do what it is to do, or is lost. said: why and the way out, without the name of the host."""

    def __init__(self, host: Host, reason: str, mend: str = "") -> None:
        """mend: the way out, as a clause, or empty."""
        self.said = f"{reason}{'; ' * bool(mend)}{mend}"
        super().__init__(f"{host.name}: {self.said}")


class Session:
    """A connection to a host, with on_host/program.py at its other end. Leaving the block ends what runs there."""

    def __init__(self, host: Host, pythons: Sequence[str], silence_seconds: float) -> None:
        """Begin to connect; `open` waits for it.

        pythons: paths there, absolute or from `~`, of which the first that is recent enough runs on_host/program.py;
            without any, the one in `program.CACHE` or python3 does.
        silence_seconds: after which each end takes the other for lost.
        Raises HostError where ssh cannot be started.
        """
        self.host = host
        self.facts: dict[str, Any] = {}
        self._silence_seconds = silence_seconds
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, closed in close
        self._greeting_bytes = 0
        self._writing = threading.Lock()
        command = command_of(host, remote_command(pythons), silence_seconds)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                start_new_session=True,  # Ctrl-C is for this process, which then ends the others
            )
        except OSError as error:
            self._errors.close()
            mend = "raise the limit with ulimit -n" if error.errno == errno.EMFILE else "install OpenSSH's client"
            raise HostError(host, f"{command[0]} cannot be started here ({error.strerror})", mend) from error

    def open(self) -> None:
        """Have the program run at the other end; `facts` is what it says first. Raises HostError."""
        is_late = threading.Event()

        def give_up() -> None:
            is_late.set()
            self.kill()

        timer = threading.Timer(OPEN_SECONDS, give_up)
        timer.daemon = True
        timer.start()
        try:
            self._send(Path(program.__file__).read_bytes() + b"\0")
            self.facts = self.ask("begin", silence_seconds=self._silence_seconds)
        except HostError as error:
            if is_late.is_set():
                mend = f"see that `ssh {self.host.name} python3 -V` answers soon, and without a question"
                raise HostError(self.host, f"no answer within {OPEN_SECONDS:.0f} s", mend) from error
            raise
        finally:
            timer.cancel()
        self._greeting_bytes = os.fstat(self._errors.fileno()).st_size  # such as sshd's Banner, no reason for an end

    def __enter__(self) -> Session:
        try:
            self.open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def ask(self, do: str, attached: bytes = b"", /, **fields: Any) -> dict[str, Any]:
        """What a function of on_host/program.py answers.  attached: what it reads behind its arguments.

        Raises HostError where it fails, or the connection does.
        """
        self._send(json.dumps({"do": do, **fields}).encode() + b"\n" + attached)
        return self.receive()

    def send(self, fields: dict[str, Any]) -> None:
        """A line that is not answered by one. Raises HostError."""
        self._send(json.dumps(fields).encode() + b"\n")

    def receive(self) -> dict[str, Any]:
        """The next line. Raises HostError."""
        for fields in self.lines():
            if "error" in fields:
                raise HostError(self.host, fields["error"])
            return fields
        raise self.lost()

    def lines(self) -> Iterator[dict[str, Any]]:
        """What comes, to the end of the connection. Raises HostError for what is none of it."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                fields = json.loads(line)
            except ValueError:
                fields = None
            if not isinstance(fields, dict):
                text = line.decode(errors="replace").strip()[:100]
                raise HostError(
                    self.host, f"{text!r} came in place of an answer", "let the login shell there print nothing"
                )
            yield fields

    def beat(self) -> None:
        """A sign of life, unless another thread is writing at this moment, or nothing can be written."""
        assert self._process.stdin is not None
        if not self._writing.acquire(blocking=False):
            return
        try:
            if not self._process.stdin.closed:
                ready = select.poll()  # not select.select, which takes no descriptor above 1023
                ready.register(self._process.stdin, select.POLLOUT)
                if ready.poll(0):
                    os.write(self._process.stdin.fileno(), b"\n")
        except OSError:
            pass  # what reads sees the end
        finally:
            self._writing.release()

    def kill(self) -> None:
        """End the connection at once, and so what it brought there."""
        self._process.kill()

    def end_input(self) -> None:
        """Ask what runs there to end."""
        assert self._process.stdin is not None
        if not self._writing.acquire(timeout=WRITE_SECONDS):
            self._process.kill()  # and so the write of another thread fails, too
            return
        try:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        finally:
            self._writing.release()

    def close(self, seconds: float = CONNECT_SECONDS) -> None:
        """End what runs there; where it does not end within so many seconds, the connection is given up."""
        self.end_input()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()

    def _send(self, content: bytes) -> None:
        assert self._process.stdin is not None
        try:
            with self._writing:
                self._process.stdin.write(content)
                self._process.stdin.flush()
        except (OSError, ValueError) as error:  # ValueError where another thread has closed it
            raise self.lost() from error

    def lost(self) -> HostError:
        """Why the connection has ended, as ssh says in its last line."""
        self._process.wait()
        self._errors.seek(self._greeting_bytes)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        status = self._process.returncode
        reason = lines[-1].strip().rstrip(".") if lines else f"the connection ended (status {status})"
        return HostError(self.host, reason, _mend(self.host, lines))


def close_all(sessions: Sequence[Session]) -> None:
    """End what runs at their other ends; those that are not even connected yet are given up."""
    for session in sessions:
        session.end_input()
    deadline = time.monotonic() + CLOSE_SECONDS
    for session in sessions:
        session.close(max(0.0, deadline - time.monotonic()))


def _mend(host: Host, lines: list[str]) -> str:
    said = "\n".join(lines)
    if "no Python 3 that runs" in said or said.endswith("there is too old"):
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return f"name one of version {oldest} or later by python=PATH behind the host"
    if host.is_this_machine:
        return ""
    if "verification failed" in said:
        return f"accept its key once by `ssh {host.name}`"
    if "ermission denied" in said:
        return f"let `ssh {host.name}` work without a question, by a key in ssh-agent or one without a passphrase"
    if "resolve" in said or "not known" in said:
        return "mend its name in the file of --hosts, or give it a HostName in ~/.ssh/config"
    return f"see that `ssh {host.name}` works"


def command_of(host: Host, command: str, silence_seconds: float) -> list[str]:
    """The words that run a command on a host."""
    if host.is_this_machine:
        return ["sh", "-c", command]
    interval = max(1, round(silence_seconds / SIGNS_OF_LIFE))
    options = {
        "BatchMode": "yes",
        "ConnectTimeout": CONNECT_SECONDS,
        "ServerAliveInterval": interval,
        "ServerAliveCountMax": SIGNS_OF_LIFE,
        "ControlMaster": "no",  # or what becomes the master of others stays when the run is over
    }
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    return ["ssh", "-T", *words, host.name, command]


def remote_command(pythons: Sequence[str]) -> str:
    """What the host's login shell is given: it finds a Python, which reads what it is to run."""
    return command_line(["exec", "sh", "-c", _FIND_PYTHON, _READ_PROGRAM, *pythons])

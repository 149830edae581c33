"""The hosts of a run that goes on: each is told to start its workers, followed, and tried again when it is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable

from over_ssh.logs import WorkerLogs
from over_ssh.preparing import PreparedHost, Wanted, open_session, prepare
from over_ssh.session import HostError, Session
from over_ssh.tasks import Task
from perfedavg.machine.processes import GRACE_SECONDS
from perfedavg.terminal.console import say

FIRST_RETRY_SECONDS = 1.0
LAST_RETRY_SECONDS = 30.0
"""Between two attempts to reach a lost host, at first and at last; doubled each time."""


class HostLink:
    """A host of a run, watched by a thread of its own.

    status: with which its workers have ended by themselves, when they have; 0 when the run was over.
    given_up: name of a worker that has failed there and is not started again, or None.
    is_following: whether workers run there, as far as is known.
    """

    def __init__(
        self, task: Task, wanted: Wanted, prepared: PreparedHost, logs: WorkerLogs, on_end: Callable[[], None]
    ) -> None:
        """on_end: called when there is a status, or a worker that was given up."""
        self.task = task
        self.status: int | None = None
        self.given_up: str | None = None
        self.is_following = False
        self._wanted = wanted
        self._logs = logs
        self._on_end = on_end
        self._stopping = threading.Event()
        self._session: Session | None = prepared.session
        self._prepared: PreparedHost | None = prepared
        self._pause = FIRST_RETRY_SECONDS
        self._said = ""
        self._thread = threading.Thread(target=self._run, name=task.host.name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def beat(self) -> None:
        session = self._session
        if session is not None:
            session.beat()

    def begin_to_stop(self) -> None:
        """Ask the workers to end, if they have not, and try the host no more."""
        self._stopping.set()
        session = self._session
        if session is not None and self.is_following:
            session.end_input()
        elif session is not None:
            session.kill()  # it may be trying to connect, and has started nothing

    def is_stopped_within(self, seconds: float) -> bool:
        """Whether the host is heard to have ended everything."""
        if self._thread.is_alive():
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def last_line(self, worker: str) -> str:
        """What a worker there has printed last, or nothing."""
        return self._logs.last_line(self._log_name(worker))

    def _run(self) -> None:
        host = self.task.host
        while not self._stopping.is_set():
            try:
                self._follow(self._take_prepared())
            except HostError as error:
                if self.status is None and not self._stopping.is_set() and str(error) != self._said:
                    self._said = str(error)
                    say(f"{error}; trying {host.name} again, while the others go on")
            finally:
                self.is_following = False
                session, self._session = self._session, None
                if session is not None:
                    session.close()
            if self.status is not None:
                self._on_end()
                return
            self._stopping.wait(self._pause)
            self._pause = min(2 * self._pause, LAST_RETRY_SECONDS)

    def _begin_retries(self) -> None:
        """Let the host's next loss be its first: it is said, and the host is tried again at once."""
        self._pause, self._said = FIRST_RETRY_SECONDS, ""

    def _take_prepared(self) -> PreparedHost:
        prepared, self._prepared = self._prepared, None
        if prepared is None:
            session = open_session(self.task.host, self.task.silence_seconds, self._take_session)
            prepared = prepare(session, self._wanted)
            say(f"{self.task.host.name}: reached again; starting {_count(self.task)}")
        return prepared

    def _take_session(self, session: Session) -> None:
        self._session = session
        if self._stopping.is_set():
            session.kill()

    def _follow(self, prepared: PreparedHost) -> None:
        """Start the workers there, and note what comes of them until they end. Raises HostError where it is lost."""
        session, task = prepared.session, self.task
        self.is_following = True
        where = {"python": prepared.python, "code": prepared.code, "folder": prepared.folder}
        session.ask("start", environment=task.environment, **where)
        session.send({"workers": task.workers, "keys": task.keys, "silence_seconds": task.silence_seconds})
        for fields in session.lines():
            if "output" in fields:
                self._begin_retries()  # not before: workers that cannot even start would be tried again every second
                self._logs.add(self._log_name(fields["worker"]), fields["output"])
            elif "said" in fields:
                self._say(fields["said"])
            elif "given_up" in fields:
                self.given_up = fields["given_up"]
                self._on_end()
            elif "ended" in fields:
                self.status = fields["ended"]
        if self.status is None:
            raise session.lost()

    def _say(self, line: str) -> None:
        """A line on the end of a worker, with the worker's last; nothing where the end of the server is its cause."""
        name = next((name for name in self.task.workers if line.startswith(f"{name} ended")), None)
        if self._stopping.wait(0 if name is None else GRACE_SECONDS):
            return
        last = "" if name is None else self.last_line(name)
        say(f"{self.task.host.name}: {line}{': ' * bool(last)}{last}")

    def _log_name(self, worker: str) -> str:
        return f"{self.task.host.file_name}-{self.task.ranks[worker]}"


def _count(task: Task) -> str:
    return f"{len(task.workers)} worker{'s' if len(task.workers) > 1 else ''}"

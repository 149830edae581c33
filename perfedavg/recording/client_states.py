"""What clients keep between rounds, as files of the run's folder, of which a few at a time are in memory.

Each is a safetensors file, `<client>-<phase>-<round>.safetensors`: what the client keeps from that round on. A
checkpoint refers to files and does not contain them, so a file stays as long as a checkpoint refers to it.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from safetensors import SafetensorError

from perfedavg.engine.client_states import ClientState, copy_of, state_bytes
from perfedavg.recording.files import checked_file, read_checked, remove_partial_files, replace_file, sync_folder
from perfedavg.settings import Phase

MAX_UNWRITTEN_BYTES = 64 * 2**20
"""States that wait to be written, and one more. Whoever brings the next one waits too."""
MAX_AHEAD_BYTES = 64 * 2**20
"""States that have been read and not been asked for yet, and one more."""
SIDE_BY_SIDE = 4
"""Files that are written, or checked when a run is resumed, at the same time: a disk syncs several as fast as one."""

_KIND = "client_state"
_NAME = re.compile(r"(?P<client>\d+)-(?P<field>fedavg|fine_tune)-(?P<round>\d+)\.safetensors")


@dataclass(frozen=True, order=True)
class Version:
    """What a client keeps from a round on."""

    client_id: int
    phase: Phase
    round_number: int

    @property
    def file_name(self) -> str:
        return f"{self.client_id}-{self.phase.field}-{self.round_number:06d}.safetensors"

    @classmethod
    def of_file(cls, path: Path) -> Version | None:
        """The inverse of `file_name`; None for another file."""
        match = _NAME.fullmatch(path.name)
        return match and cls(int(match["client"]), Phase.of_field(match["field"]), int(match["round"]))


@dataclass(frozen=True)
class References:
    """The versions that a checkpoint refers to. rounds: of the phase, by client id."""

    phase: Phase
    rounds: Mapping[int, int]

    def __contains__(self, version: Version) -> bool:
        return version.phase is self.phase and self.rounds.get(version.client_id) == version.round_number

    @property
    def versions(self) -> dict[int, Version]:
        return {client_id: Version(client_id, self.phase, number) for client_id, number in self.rounds.items()}


class StateFiles:
    """A `contracts.ClientStateStore` in a folder that this process alone writes to, made when something is put.

    What is put is written by threads of its own while others train, and outlives a power cut from `versions` on. Where
    the disk is full, what can wait waits in memory, and is written when there is room.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._phase, self._round_number = Phase.FEDAVG, 0
        self._current: dict[int, Version] = {}
        self._put: dict[int, Version] = {}
        self._superseded: set[Version] = set()
        self._to_remove: set[Version] = set()
        self._kept: Sequence[References] = ()
        self._unwritten: dict[Version, ClientState] = {}  # in the order of writing
        self._wanted: deque[Version] = deque()
        self._ahead: dict[Version, tuple[Future[ClientState], int]] = {}  # with the file's size
        self._failure: Exception | None = None  # of the last attempt to write
        self._attempt = 0
        self._lost: ValueError | None = None
        self._changed = threading.Condition()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="states writer")  # also removes, in the order asked for
        self._side_by_side = ThreadPoolExecutor(SIDE_BY_SIDE, thread_name_prefix="state")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="states reader")

    def get(self, client_id: int) -> ClientState:
        with self._changed:
            version = self._current.get(client_id)
            if version is None:
                return {}
            if version in self._unwritten:
                return copy_of(self._unwritten[version])
            with contextlib.suppress(ValueError):
                self._wanted.remove(version)
            reading, _ = self._ahead.pop(version, (None, 0))
            self._read_on()
        try:
            return self._read(version) if reading is None else reading.result()
        except ValueError as error:
            self._lost = error
            raise

    def read_ahead(self, client_ids: Sequence[int]) -> None:
        with self._changed:
            self._wanted = deque(self._current[client_id] for client_id in client_ids if client_id in self._current)
            for version in self._ahead.keys() - set(self._wanted):
                self._ahead.pop(version)[0].cancel()
            self._read_on()

    def begin_round(self, phase: Phase, round_number: int) -> None:
        with self._changed:
            self._forget_put()
            self._phase, self._round_number = phase, round_number

    def put(self, client_id: int, state: ClientState) -> None:
        version = Version(client_id, self._phase, self._round_number)
        with self._changed:
            self._put[client_id] = version
            self._to_remove.discard(version)  # that of a round that is repeated
            self._unwritten[version] = state
            self._start_writing()
            self._changed.wait_for(lambda: self._has_room or self._failure is not None)
            if not self._has_room:
                assert self._failure is not None
                reason = getattr(self._failure, "strerror", None) or self._failure
                raise OSError(f"what clients keep cannot be written to {self._folder} ({reason}); make room there")

    def commit(self, client_ids: Iterable[int]) -> None:
        with self._changed:
            taken = {client_id: self._put.pop(client_id) for client_id in client_ids}
            self._supersede(self._current.pop(client_id) for client_id in taken if client_id in self._current)
            self._current |= taken
            self._forget_put()

    def reset(self) -> None:
        with self._changed:
            self._forget_put()
            self._supersede(self._current.values())
            self._current = {}

    def versions(self) -> dict[int, int]:
        def are_written() -> bool:
            return not any(self._current.get(version.client_id) == version for version in self._unwritten)

        with self._changed:
            if self._lost is not None:
                raise self._lost
            if not are_written():
                self._start_writing()
                self._changed.wait_for(lambda: are_written() or self._failure is not None)
            if not are_written():
                assert self._failure is not None
                raise self._failure
            rounds = {client_id: version.round_number for client_id, version in self._current.items()}
        if rounds:
            sync_folder(self._folder)
        return rounds

    def check(self, references: References) -> None:
        """Raises ValueError where a file that a checkpoint refers to is missing or damaged."""
        with ThreadPoolExecutor(SIDE_BY_SIDE) as threads:
            for _ in threads.map(self._check, references.versions.values()):
                pass

    def go_on(self, references: References | None, kept: Sequence[References]) -> None:
        """Let clients keep what a checkpoint says, or nothing, and remove what no checkpoint refers to.

        kept: what all checkpoints refer to, as `keep` takes it.
        """
        if self._folder.is_dir():
            remove_partial_files(self._folder)
        self.read_ahead(())
        found = {version for path in self._folder.glob("*.safetensors") if (version := Version.of_file(path))}
        with self._changed:
            self._current = {} if references is None else references.versions
            self._superseded = found - set(self._current.values())
        self.keep(kept)

    def keep(self, kept: Sequence[References]) -> None:
        """Remove the versions that clients keep no more, unless one of these refers to them."""
        with self._changed:
            self._kept = kept
            superseded, self._superseded = self._superseded, set()
            self._supersede(superseded)

    def finish(self) -> None:
        """The run is over: only what clients keep at its end stays. Waits until the rest is gone."""
        self.keep(())
        for threads in (self._writer, self._side_by_side, self._reader):
            threads.shutdown()

    @property
    def _has_room(self) -> bool:
        return sum(map(state_bytes, self._unwritten.values())) < MAX_UNWRITTEN_BYTES

    def _start_writing(self) -> None:
        """Also what could not be written before."""
        self._failure = None
        self._attempt += 1
        self._writer.submit(self._write_all)

    def _write_all(self) -> None:
        while True:
            with self._changed:
                batch = list(islice(self._unwritten.items(), SIDE_BY_SIDE))
                if not batch or self._failure is not None:
                    return
                attempt = self._attempt
            failures = self._side_by_side.map(self._write, *zip(*batch, strict=True))
            for (version, state), failure in zip(batch, failures, strict=True):
                with self._changed:
                    if attempt == self._attempt:  # what failed before is tried again
                        self._failure = self._failure or failure
                    if failure is None and self._unwritten.get(version) is state:
                        del self._unwritten[version]
                    self._changed.notify_all()

    def _write(self, version: Version, state: ClientState) -> Exception | None:
        """Returns what went wrong, which those who wait must hear of whatever it is."""
        try:
            if not self._folder.is_dir():
                self._folder.mkdir(exist_ok=True)
                sync_folder(self._folder.parent)
            content = checked_file(_KIND, version.file_name, state)
            replace_file(self._folder / version.file_name, content, syncs_folder=False)
        except Exception as error:
            return error
        return None

    def _forget_put(self) -> None:
        for version in self._put.values():
            self._remove(version)
        self._put = {}

    def _supersede(self, versions: Iterable[Version]) -> None:
        for version in versions:
            if any(version in references for references in self._kept):
                self._superseded.add(version)
            else:
                self._remove(version)

    def _remove(self, version: Version) -> None:
        self._unwritten.pop(version, None)
        self._to_remove.add(version)
        self._writer.submit(self._unlink, version)

    def _unlink(self, version: Version) -> None:
        """Unless the version was put again: then it may have been written since."""
        with self._changed:
            if version not in self._to_remove:
                return
            self._to_remove.remove(version)
        (self._folder / version.file_name).unlink(missing_ok=True)

    def _read_on(self) -> None:
        """Read ahead what is wanted next, as far as there is room."""
        while self._wanted and sum(size for _, size in self._ahead.values()) < MAX_AHEAD_BYTES:
            version = self._wanted.popleft()
            path = self._folder / version.file_name
            if version not in self._unwritten and version not in self._ahead and path.is_file():
                self._ahead[version] = self._reader.submit(self._read, version), path.stat().st_size

    def _check(self, version: Version) -> None:
        self._read(version)

    def _read(self, version: Version) -> ClientState:
        """Raises ValueError, one line, where the file cannot be read."""
        path = self._folder / version.file_name
        try:
            name, state = read_checked(path, _KIND)
            if name != version.file_name:
                raise ValueError(f"it holds {name}")
            return state
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"{path}: what client {version.client_id} keeps cannot be read ({reason})") from error


def read_final_state(folder: Path, client_id: int) -> ClientState:
    """What a client of a run that has ended keeps; empty where it keeps nothing. Raises ValueError, one line."""
    found = [version for path in folder.glob(f"{client_id}-*") if (version := Version.of_file(path))]
    return StateFiles(folder)._read(max(found)) if found else {}

"""The control connection between a worker and the server: lines of JSON, of which an empty one is a sign of life.

It is a TCP connection to the server's port, beside the one that carries tensors, so that a sign of life gets through
while a client trains and while 13 MB are on their way.
"""

from __future__ import annotations

import json
import threading
import time
from typing import Any

from multi_process.transport.wire import Wire

PROTOCOL_VERSION = 9
"""Raised with every change of a message or of the way workers join."""

SEND_SECONDS = 10.0
"""For a line to leave this machine. Lines are short enough that it takes longer only where the peer is gone."""
LAST_LINE_SECONDS = 1.0
"""For the line with which the other side is told why the connection ends."""
MAX_HANDSHAKE_BYTES = 64 * 1024
"""In a line of the handshake, in which anybody may say anything."""
MAX_LINE_BYTES = 16 * 2**20
"""In a line after it. The longest ones hold the scores of a group of clients, 250 bytes each."""


class ProtocolError(ValueError):
    """What is at the other end does not speak this protocol."""


class ControlConnection:
    """Lines of JSON over a wire. Sending and receiving may go on in different threads."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._received = bytearray()
        self._sending = threading.Lock()
        self.last_heard = time.monotonic()
        """When the last bytes came, on the clock of `time.monotonic`."""

    @property
    def local_host(self) -> str:
        """The address at this end, the one that the route to the peer starts from."""
        return self._wire.local_host

    def begin(self, timeout_seconds: float) -> None:
        """Prove the keys to each other, where there are any; the first thing to be done.

        Raises UnknownKeyError where they are not those of the run, ConnectionError where the other side is gone, silent
        or speaks something else.
        """
        try:
            self._wire.begin(time.monotonic() + timeout_seconds)
        except TimeoutError:
            raise ConnectionError(f"no sign of life for {timeout_seconds:g} s") from None

    def send(self, **fields: Any) -> None:
        """Send an object; a dataclass in it is one too. Raises ConnectionError where the peer is gone."""
        self._send(json.dumps(fields, default=vars).encode() + b"\n")

    def beat(self) -> None:
        """A sign of life. Raises ConnectionError where the peer is gone."""
        self._send(b"\n")

    def send_last(self, **fields: Any) -> None:
        """As `send`, where nothing comes after it and nobody may be held up by a peer that does not listen."""
        self._send(json.dumps(fields).encode() + b"\n", LAST_LINE_SECONDS)

    def receive(self, silence_seconds: float) -> dict[str, Any]:
        """The next object. Signs of life are passed over, and start the time anew.

        Raises ConnectionError where the peer ended the connection or was silent for so long, ProtocolError where what
        it says is not a JSON object in a line.
        """
        while not (line := self._receive_line(silence_seconds, MAX_LINE_BYTES).strip()):
            pass
        return _parse_line(line)

    def receive_handshake(self, timeout_seconds: float) -> dict[str, Any]:
        """The next line, an object: as `receive`, but nobody gains time by signs of life."""
        return _parse_line(self._receive_line(timeout_seconds, MAX_HANDSHAKE_BYTES))

    def release(self) -> Wire:
        """The wire, for something else than lines. Raises ProtocolError where more has come than was read."""
        if self._received:
            raise ProtocolError("it sent something before it was asked to")
        return self._wire

    def end(self) -> None:
        """End the connection, for both sides and for whatever thread receives on it. May be called again."""
        self._wire.end()

    def close(self) -> None:
        """End the connection and give its descriptor back: the last thing to be done. May be called again."""
        self._wire.close()

    def _send(self, line: bytes, timeout_seconds: float = SEND_SECONDS) -> None:
        deadline = time.monotonic() + timeout_seconds
        if not self._sending.acquire(timeout=timeout_seconds):
            raise ConnectionError("the connection does not take what is sent")
        try:
            self._wire.send(memoryview(line), deadline)
        except TimeoutError:
            raise ConnectionError("the connection does not take what is sent") from None
        finally:
            self._sending.release()

    def _receive_line(self, timeout_seconds: float, max_bytes: int) -> bytes:
        deadline = time.monotonic() + timeout_seconds
        while (end := self._received.find(b"\n")) < 0:
            if len(self._received) > max_bytes:
                raise ProtocolError(f"it sent more than {max_bytes} bytes without the end of a line")
            try:
                received = self._wire.receive(MAX_HANDSHAKE_BYTES, deadline)
            except TimeoutError:
                raise ConnectionError(f"no sign of life for {timeout_seconds:g} s") from None
            self.last_heard = time.monotonic()
            self._received += received
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return line


def _parse_line(line: bytes) -> dict[str, Any]:
    """The object in a line. Raises ProtocolError where there is none."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or thousands of brackets
        raise ProtocolError("what it sent is not a line of JSON") from error
    if not isinstance(fields, dict):
        raise ProtocolError("what it sent is not a JSON object")
    return fields

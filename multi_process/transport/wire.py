"""A TCP connection, in plain text or encrypted by TLS: bytes in both directions, each in a thread of its own."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

_KEY_ALERTS = ("UNKNOWN_CA", "CERTIFICATE", "DECRYPT_ERROR")
"""In OpenSSL's names of what the other side says when it does not know this side's key."""


class UnknownKeyError(ConnectionError):
    """One of the two sides does not know the other's key."""


class Wire:
    """One thread may send while another one receives. None of them waits where OpenSSL lets only one in at a time.

    connected: a TCP connection, which is taken over.
    tls: from `keys.tls_context`; None for plain text.
    is_server: the side that accepted the connection, as TLS needs to know.
    Raises OSError where the other side has left already.
    """

    def __init__(self, connected: socket.socket, tls: ssl.SSLContext | None = None, is_server: bool = False) -> None:
        self._socket = connected
        try:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connected.setblocking(False)
            if tls is not None:
                self._socket = tls.wrap_socket(connected, server_side=is_server, do_handshake_on_connect=False)
        except OSError:
            connected.close()
            raise
        self._descriptor = self._socket.fileno()
        one_at_a_time = contextlib.nullcontext() if tls is None else threading.Lock()
        self._one_at_a_time: contextlib.AbstractContextManager[object] = one_at_a_time

    @property
    def local_host(self) -> str:
        """The address at this end, the one that the route to the other side starts from."""
        return str(self._socket.getsockname()[0])

    def begin(self, deadline: float) -> None:
        """Prove the keys to each other, where there are any.

        Raises UnknownKeyError where they are not those of the run, TimeoutError, or ConnectionError where the other
        side is gone or speaks something else.
        """
        if isinstance(self._socket, ssl.SSLSocket):
            self._finish(self._socket.do_handshake, select.POLLIN, deadline)

    def send(self, content: memoryview, deadline: float) -> None:
        """Send all of it. Raises TimeoutError, or ConnectionError where the other side is gone."""
        while content:
            sent = self._finish(lambda rest=content: self._socket.send(rest), select.POLLOUT, deadline)  # type: ignore[misc]
            content = content[sent:]

    def receive(self, most_bytes: int, deadline: float) -> bytes:
        """What comes next, at least a byte. Raises TimeoutError, or ConnectionError where the other side is gone."""
        received = self._finish(lambda: self._socket.recv(most_bytes), select.POLLIN, deadline)
        if not received:
            raise ConnectionError("the connection was closed")
        return received

    def receive_into(self, buffer: memoryview, deadline: float) -> None:
        """Fill a buffer with what comes next. Raises TimeoutError, or ConnectionError where the other side is gone."""
        while buffer:
            num_bytes = self._finish(lambda rest=buffer: self._socket.recv_into(rest), select.POLLIN, deadline)  # type: ignore[misc]
            if not num_bytes:
                raise ConnectionError("the connection was closed")
            buffer = buffer[num_bytes:]

    def end(self) -> None:
        """End the connection, for both sides and for whatever thread sends or receives. May be called again."""
        with contextlib.suppress(OSError):
            # Not SSLSocket's own, after which a thread that sends would go on in plain text.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection and give its descriptor back: the last thing to be done. May be called again."""
        self.end()
        self._socket.close()

    def _finish(self, attempt: Callable[[], Result], events: int, deadline: float) -> Result:
        """Try, and wait for the socket, until it is done. events: of the socket to wait for, unless TLS says which."""
        while True:
            waits_for = events
            try:
                with self._one_at_a_time:
                    return attempt()
            except (BlockingIOError, InterruptedError):
                pass
            except ssl.SSLWantReadError:
                waits_for = select.POLLIN
            except ssl.SSLWantWriteError:
                waits_for = select.POLLOUT
            except OSError as error:
                raise _connection_error(error) from error
            remaining_seconds = deadline - time.monotonic()
            ready = select.poll()  # not select.select, which takes no descriptor above 1023
            ready.register(self._descriptor, waits_for)
            if remaining_seconds <= 0 or not ready.poll(1000 * remaining_seconds):
                raise TimeoutError


def _connection_error(error: OSError) -> ConnectionError:
    if isinstance(error, ssl.SSLCertVerificationError):
        return UnknownKeyError("its key is not the one of this run")
    if isinstance(error, ssl.SSLError) and error.reason:
        if "ALERT" in error.reason and any(word in error.reason for word in _KEY_ALERTS):
            return UnknownKeyError("it does not know this side's key")
        return ConnectionError(f"what it sent is not TLS of this run ({error.reason.replace('_', ' ').lower()})")
    return ConnectionError(error.strerror or "the connection was closed")

"""The store over which torch forms a process group, kept equal at both ends of a control connection."""

from __future__ import annotations

import base64
import sys
import threading
from datetime import timedelta
from typing import Any

from torch.distributed import Store

from multi_process.transport.control import ControlConnection, ProtocolError

WAIT_SECONDS = 30.0
"""For a value that the other side has to set."""
MAX_KEYS = 16
"""That the other side may set while a group is formed. gloo needs one, nccl a few."""
MAX_VALUE_BYTES = 4096
GLOO_PREFIX, FAILURE_PREFIX = "gloo/", "failure/"
"""Of the keys under which a side tells gloo its address, and the other side why it cannot connect."""
LENGTH_BYTES = 8


class ControlStore(Store):
    """A TCPStore of torch's takes orders from whoever reaches its port; this one only from the peer."""

    def __init__(self, control: ControlConnection) -> None:
        super().__init__()
        self._control = control
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._others_failure = ""
        self._is_closed = False

    def set_by_peer(self, key: Any, value: Any) -> None:
        """Raises ProtocolError where the peer sets what no group needs."""
        with self._changed:
            if self._is_closed:
                raise ProtocolError("it sets a key for a process group that is formed")
            if not (isinstance(key, str) and isinstance(value, str)):
                raise ProtocolError("it sets a key that is no text, or a value that is none")
            if len(self._values) >= MAX_KEYS or max(len(key), len(value)) > MAX_VALUE_BYTES:
                raise ProtocolError(
                    f"it sets more than {MAX_KEYS} keys of up to {MAX_VALUE_BYTES} bytes for a process group"
                )
            content = base64.b64decode(value)
            if key.startswith(GLOO_PREFIX) and not _is_gloos_address(content):
                raise ProtocolError("it sets an address for gloo that is none")
            if key.startswith(FAILURE_PREFIX):
                self._others_failure = content.decode(errors="replace")
            self._values[key] = content
            self._changed.notify_all()

    def value_of(self, key: str) -> bytes:
        """The value of a key, empty where there is none."""
        return self._values.get(key, b"")

    def close(self) -> None:
        """Nothing more is to be set: the groups are formed, or the peer is gone."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    # What follows are torch's own names, called from its native code.

    def set(self, key: str, value: str | bytes) -> None:
        content = value.encode() if isinstance(value, str) else bytes(value)
        with self._changed:
            self._values[key] = content
        self._control.send(key=key, value=base64.b64encode(content).decode())

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        del timeout  # gloo's is for a connection; the peer may take longer to get there
        with self._changed:
            self._changed.wait_for(
                lambda: self.check(keys) or self._is_closed or bool(self._others_failure), WAIT_SECONDS
            )
            if not self.check(keys):
                gone = "the peer is gone" if self._is_closed else "the peer does not answer"
                raise ConnectionError(self._others_failure or gone)


def _is_gloos_address(content: bytes) -> bool:
    """Whether the lengths fit that stand in what a side tells gloo of itself, because gloo trusts them.

    It is the name of its host and its address, the length of each in eight bytes before it, and eight bytes for each of
    the two sides.
    """
    at = 0
    for _ in range(2):
        at += LENGTH_BYTES + int.from_bytes(content[at : at + LENGTH_BYTES], sys.byteorder)
    return len(content) == at + 2 * LENGTH_BYTES

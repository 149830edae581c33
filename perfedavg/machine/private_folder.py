"""A folder for secrets, which is gone when its process is. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

_REMOVE_AT_END_OF_INPUT = 'read _; rm -rf -- "$0"'


@contextlib.contextmanager
def private_folder(prefix: str) -> Iterator[Path]:
    """A folder for this user alone, until the end of the block or of this process, also where that is killed."""
    folder = tempfile.mkdtemp(prefix=prefix)
    words = ("sh", "-c", _REMOVE_AT_END_OF_INPUT, folder)
    remover = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        yield Path(folder)
    finally:
        remover.communicate()

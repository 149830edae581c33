"""What runs on a host before anything of this project does. It is sent there, and needs Python alone.

It reads requests, each a line of JSON on standard input, and answers each with a line. The last request starts the
workers in its place, in the same process. It ends as soon as nobody asks any more: at the end of its input, or when
neither a request nor an empty line, which is a sign of life, has come for a while.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import select
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from typing import Any

Json = Any
"""What a line of JSON may hold."""
CACHE = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "personalized-fedavg")
"""Where copies of code go, and where a Python may be that knows the packages."""
FIRST_SILENCE_SECONDS = 60.0
LOOK_SECONDS = 0.05
TERMINATE_SECONDS = 1.0
"""For a process to end by itself after SIGTERM, before the other machine gives the connection up."""
IS_NOT_THERE = "is not there"
_VERSIONS = """
import importlib.metadata, json, platform, sys
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
"""
_RUN_WORKERS = "import sys; sys.path[0] = sys.argv[1]; from over_ssh.on_host.workers import main; main()"

_silence_seconds = FIRST_SILENCE_SECONDS


def begin(silence_seconds: float) -> Json:
    """silence_seconds: without a sign of life, after which this process ends."""
    global _silence_seconds
    _silence_seconds = silence_seconds
    return {
        "host": platform.node(),
        "python": platform.python_version(),
        "seen_from": os.environ.get("SSH_CONNECTION", "").split(" ")[0],
        "time": time.time(),
    }


def find_tree(root: str, files: list[str], digest: str) -> Json:
    """Where files with these contents are: under `root`, or as a copy that was made earlier."""
    for place in (root, _copy_of(digest)):
        if tree_digest(place, files) == digest:
            return {"at": place}
    return {"at": None}


def unpack_tree(files: list[str], digest: str, size: int) -> Json:
    """Copy the files: a tar archive of so many bytes is what comes next on standard input.

    at: where they are then; without, `reason` says why they are nowhere, and `mend` the way out.
    """
    content = io.BytesIO()
    while content.tell() < size:
        content.write(_read(size - content.tell()))
    content.seek(0)
    place = _copy_of(digest)
    try:
        os.makedirs(CACHE, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            unfinished = os.path.join(folder, "tree")
            with tarfile.open(fileobj=content) as archive:
                safely: Json = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
                archive.extractall(unfinished, **safely)
            try:
                os.rename(unfinished, place)
            except OSError:  # there is one, perhaps since now, of another host with the same home
                if tree_digest(place, files) != digest:
                    shutil.rmtree(place, ignore_errors=True)
                    os.rename(unfinished, place)
    except OSError as error:
        mend = "let that folder be writable, or bring this version to the same path there"
        return {"at": None, "reason": f"{CACHE}: {error.strerror}", "mend": mend}
    if tree_digest(place, files) != digest:
        return {"at": None, "reason": f"what arrived in {place} is not what was sent", "mend": "try again"}
    return {"at": place}


def find_python(candidates: list[str], packages: list[str], with_cache: bool) -> Json:
    """Of each candidate, in their order, the versions of packages that it has, or what is wrong with it.

    with_cache: whether the one in CACHE is the last candidate.  `python` of the answer: the one that runs this.
    """
    asked = [*candidates, *[os.path.join(CACHE, ".venv", "bin", "python")] * with_cache]
    paths = [os.path.expanduser(candidate) for candidate in asked]
    found = [{"path": path, **_look_at_python(path, packages)} for path in paths]
    return {"found": found, "cache": CACHE, "python": sys.executable}


def _look_at_python(path: str, packages: list[str]) -> Json:
    if not os.path.exists(path):
        return {"fault": IS_NOT_THERE}
    if os.path.isdir(path):
        return {"fault": "is a folder"}
    if not os.access(path, os.X_OK):
        return {"fault": "is not executable"}
    words = [path, "-c", _VERSIONS, *packages]
    try:
        answer = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        return {"versions": dict(json.loads(answer.stdout))}
    except (OSError, ValueError, TypeError):
        return {"fault": "is no Python 3 that runs"}


def connect(address: list[Any], nonce: str, seconds: float) -> Json:
    """Whether the address answers with what it is asked, and by which of its own addresses this host reached it."""
    try:
        with socket.create_connection(tuple(address), timeout=seconds) as connection:
            connection.sendall(nonce.encode())
            answer = connection.recv(len(nonce), socket.MSG_WAITALL).decode(errors="replace")
            own = connection.getsockname()[0]
    except OSError as error:
        return {"own": None, "reason": error.strerror or "no answer"}
    if answer != nonce[::-1]:
        return {"own": None, "reason": "something else answers there"}
    return {"own": own}


def listen(address: str, nonce: str, seconds: float) -> Json:
    """Open a port at an address of this host, say which, and then whether the other machine reached it."""
    with socket.create_server((address, 0)) as listener:
        _answer({"port": listener.getsockname()[1]})
        listener.settimeout(seconds)
        try:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(seconds)
                return {"is_reached": connection.recv(len(nonce), socket.MSG_WAITALL).decode(errors="replace") == nonce}
        except OSError:
            return {"is_reached": False}


def run(python: str, code: str, module: str, argv: list[str], folder: str) -> Json:
    """Run a module of the project: its exit status, what it prints, and its last line of errors."""
    words = [
        python,
        "-W",
        "ignore",
        "-c",
        f"import sys; sys.path[0] = sys.argv.pop(1); from {module} import main; main()",
        code,
        *argv,
    ]
    place = folder if os.path.isdir(folder) else code
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(words, cwd=place, stdin=subprocess.DEVNULL, stdout=output, stderr=errors)
        _wait_for(process)
        printed, said = (_content(file).decode(errors="replace") for file in (output, errors))
    lines = said.strip().splitlines()
    return {"status": process.returncode, "output": printed, "last": lines[-1] if lines else ""}


def _wait_for(process: Json) -> None:
    """Wait for the end of a process. Where nobody asks any more, that one is ended, and then this one."""
    heard = time.monotonic()
    while process.poll() is None:
        if select.select([0], [], [], LOOK_SECONDS)[0]:  # a sign of life, because an answer is waited for
            is_asked, heard = bool(os.read(0, 4096)), time.monotonic()
        else:
            is_asked = time.monotonic() < heard + _silence_seconds
        if not is_asked:
            process.terminate()
            try:
                process.wait(TERMINATE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
            os._exit(1)


def _content(file: Json) -> bytes:
    file.seek(0)
    return bytes(file.read())


def start(python: str, code: str, folder: str, environment: dict[str, str]) -> Json:
    """Become the process that runs the workers (workers.py), which reads on where this one stopped."""
    os.chdir(folder if os.path.isdir(folder) else code)
    _answer({})
    os.execve(python, [python, "-W", "ignore", "-c", _RUN_WORKERS, code], {**os.environ, **environment})


def tree_digest(root: str, files: list[str]) -> str | None:
    """Of the names and contents of files, by their paths below a folder; None where one cannot be read."""
    digest = hashlib.sha256()
    for name in sorted(files):
        try:
            with open(os.path.join(root, name), "rb") as file:
                digest.update(f"{name}\0{hashlib.sha256(file.read()).hexdigest()}\n".encode())
        except OSError:
            return None
    return digest.hexdigest()


def _copy_of(digest: str) -> str:
    return os.path.join(CACHE, digest[:16])


REQUESTS = {
    function.__name__: function
    for function in (begin, find_tree, unpack_tree, find_python, connect, listen, run, start)
}


def main() -> None:
    while True:
        request = _read_request()
        try:
            answer = REQUESTS[request.pop("do")](**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        _answer(answer)


def _read_request() -> Json:
    line = b""
    while True:
        byte = _read(1)
        if byte != b"\n":
            line += byte
        elif line:
            return json.loads(line)


def _read(most: int) -> bytes:
    """Without a buffer, so that nothing is lost to the process that this one becomes."""
    if not select.select([0], [], [], _silence_seconds)[0]:
        os._exit(1)
    return os.read(0, most) or os._exit(1)


def _answer(fields: Json) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

"""The file that names the hosts of a run, one a line, and what each is to contribute."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

THIS_MACHINE = "localhost"
"""A host of this name is reached without ssh."""
MAX_SLOTS = 1024


@dataclass(frozen=True)
class Host:
    """A line of the file.

    name: as ssh takes it, `[user@]name`; THIS_MACHINE for the machine that runs the server.
    slots: worker processes there, 1 or more.
    device: of its workers, as --device takes it; several with commas, which the workers take in turn.
    data_root: folder of the data sets there; None for the path that it has here.
    python: interpreter there, absolute or from `~`; None to look for one (see `preparing.pythons`).
    ethernet: interface for tensors there; None for --ethernet's.
    """

    name: str
    slots: int = 1
    device: str | None = None
    data_root: str | None = None
    python: str | None = None
    ethernet: str | None = None

    @property
    def is_this_machine(self) -> bool:
        return self.name == THIS_MACHINE

    @property
    def file_name(self) -> str:
        """The name, as a part of a file's."""
        return re.sub(r"[^\w.-]", "_", self.name)

    def device_of(self, slot: int) -> str | None:
        """Of the worker in a slot, 0 or more."""
        devices = [] if self.device is None else self.device.split(",")
        return devices[slot % len(devices)] if devices else None


def read_hosts(path: Path) -> list[Host]:
    """The hosts that a file names, in its order. Raises ValueError with the file and the line."""
    hosts: list[Host] = []
    line_numbers: dict[str, int] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # with or without Windows' mark at the beginning
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--hosts {path} cannot be read ({getattr(error, 'strerror', 'not text')}); name a file with a host a line"
        ) from error
    for number, line in enumerate(lines, start=1):
        try:
            words = shlex.split(re.sub(r"(^|\s)#.*", "", line))
            if not words:
                continue
            host = _parse(words)
        except ValueError as error:
            raise ValueError(f"--hosts {path}, line {number}: {error}") from error
        if host.file_name in line_numbers:
            raise ValueError(
                f"--hosts {path}, line {number}: {host.name} is in line {line_numbers[host.file_name]} already; name "
                "it once, with slots=N for N workers"
            )
        line_numbers[host.file_name] = number
        hosts.append(host)
    if not hosts:
        raise ValueError(f"--hosts {path} names no host; write the name of one a line, as ssh takes it")
    return hosts


def _parse(words: list[str]) -> Host:
    name, *options = words
    if not re.fullmatch(r"[^\s=:/-][^\s=:/]*", name):
        raise ValueError(
            f"{name!r} is no name of a host; write [user@]name, and what else it takes (a port, a jump host) into "
            "~/.ssh/config"
        )
    values: dict[str, Any] = {}
    for option in options:
        key, is_given, text = option.partition("=")
        if key not in _OPTIONS or not is_given:
            raise ValueError(
                f"{option!r} is unknown; behind the name of a host stand {', '.join(f'{key}=...' for key in _OPTIONS)}"
            )
        if key in values:
            raise ValueError(f"{key} is given twice; leave one out")
        values[key] = _OPTIONS[key](text)
    return Host(name, **values)


def _slots(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MAX_SLOTS:
        raise ValueError(f"slots={text} is no number of workers; use 1 to {MAX_SLOTS}")
    return int(text)


def _device(text: str) -> str:
    if not re.fullmatch(r"(auto|cpu|cuda(:\d+)?)(,(auto|cpu|cuda(:\d+)?))*", text):
        raise ValueError(f"device={text} is none; use auto, cpu, cuda or cuda:i, several with commas")
    return text


def _path(text: str) -> str:
    if not text.startswith(("/", "~/")):
        raise ValueError(f"{text!r} is no path from the root or from ~/; write one, as it is on that host")
    return text


def _word(text: str) -> str:
    if not text:
        raise ValueError("a value is missing behind =; write it, or leave the option out")
    return text


_OPTIONS: dict[str, Callable[[str], Any]] = {
    "slots": _slots,
    "device": _device,
    "data_root": _path,
    "python": _path,
    "ethernet": _word,
}
assert list(_OPTIONS) == [field.name for field in fields(Host)][1:]

"""Entry point: makes the keys with which a server and its workers encrypt what they say, and know each other."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path

from launch import paths
from launch.flags import parse
from launch.settings import Checked
from perfedavg.fields import setting
from perfedavg.terminal.console import command_line
from perfedavg.terminal.entry_point import run_entry_point


@dataclass(frozen=True, kw_only=True)
class MakeKeys(Checked):
    """Make the keys of a server and its workers, for --keys of server.py and client_worker.py."""

    heading = "keys"
    folder: Path = setting(MISSING, "where to put them", parse=paths.path, metavar="FOLDER", positional=True)


def main() -> None:
    folder = parse(MakeKeys).folder

    from multi_process.transport.keys import OF_WORKERS, make_keys

    make_keys(folder)
    print(f"server: --keys {command_line([folder])}")
    print(f"each worker's machine needs, in a folder for its --keys: {', '.join(OF_WORKERS)}")


if __name__ == "__main__":
    run_entry_point(main)

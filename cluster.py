"""Entry point: a server on this machine and workers on others, started over ssh; and the check of what they need."""

from __future__ import annotations

import utils
from perfedavg.terminal.entry_point import end_process, prepare_process, report


def main() -> int:
    try:
        args = utils.get_args("cluster")
        from over_ssh.running import run

        return run(args)
    except (ValueError, OSError) as error:
        return report(error)


if __name__ == "__main__":
    prepare_process()
    end_process(main())

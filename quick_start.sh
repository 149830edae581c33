#!/bin/sh
# Starts a server and two workers on this machine and shows the result. Flags: sh quick_start.sh --help
set -eu
root=$(cd "$(dirname "$0")" && pwd)
. "$root/setup_venv.sh"
setup_venv "$root" requirements.txt
exec "$python" "$root/quick_start.py" "$@"

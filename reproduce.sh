#!/bin/sh
# Runs the rows of a table, seed by seed, and writes the table and its plots. Flags: sh reproduce.sh --help
set -eu
# What is closed of input, output and errors leads nowhere, so that it is not given to the next file.
[ -e /proc/$$/fd/0 ] || exec 0</dev/null
[ -e /proc/$$/fd/1 ] || exec 1>/dev/null
[ -e /proc/$$/fd/2 ] || exec 2>/dev/null
root=$(cd "$(dirname "$0")" && pwd)
. "$root/setup_venv.sh"
setup_venv "$root" requirements.txt
exec "$python" "$root/reproduce.py" "$@"

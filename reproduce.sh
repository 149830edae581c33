#!/bin/sh
# Runs the rows of the papers' tables on one data set, seed by seed, and writes the tables. Flags: sh reproduce.sh --help
set -eu
root=$(cd "$(dirname "$0")" && pwd)
. "$root/setup_venv.sh"
setup_venv "$root" requirements.txt
exec "$python" "$root/reproduce.py" "$@"

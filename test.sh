#!/bin/sh
# Sets up .venv on first use, then checks style and types and runs the tests.
# sh test.sh [--slow] [pytest's own flags and paths]
# Tests run side by side, one process a core; those of a module that share a run, in one of them.
set -eu
root=$(cd "$(dirname "$0")" && pwd)
. "$root/setup_venv.sh"
setup_venv "$root" requirements-dev.txt
cd "$root"
PATH=$root/.venv/bin:$PATH
export PYTHONDONTWRITEBYTECODE= # or each of many processes would compile the tests and the project anew
ruff check .
ruff format --check .
mypy
shellcheck -x ./*.sh multi_process/*.sh .ci/run
exec "$python" -m pytest -n auto --dist loadgroup --no-loadscope-reorder "$@"

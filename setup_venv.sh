# Sourced by quick_start.sh and test.sh: sets $python to the interpreter of .venv, with requirements installed.
# Usage: . "$root/setup_venv.sh"; setup_venv "$root" requirements.txt
# Installs on first use, and again only when a requirements file has changed.
# shellcheck shell=sh

setup_venv() {
    root=$1
    requirements=$2
    python=$root/.venv/bin/python
    stamp=$root/.venv/installed-$requirements
    wanted=$(cat "$root"/requirements*.txt | cksum)
    if [ -x "$python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return 0
    fi
    base=
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            base=$candidate
            break
        fi
    done
    if [ -z "$base" ]; then
        found=$("${PYTHON:-python3}" --version 2>&1 || true)
        echo "error: Python 3.10 to 3.13 is needed, found: ${found:-none}; install one, or name it in PYTHON" >&2
        return 2
    fi
    if ! "$base" -c 'import venv, ensurepip' 2>/dev/null; then
        echo "error: $base has no venv module; install it (Debian and Ubuntu: apt install python3-venv)" >&2
        return 2
    fi
    echo "setting up $root/.venv (first use, or requirements changed): takes minutes, and 1.6 GB or more" >&2
    if ! [ -x "$python" ] && ! "$base" -m venv "$root/.venv" >&2; then
        echo "error: $base -m venv failed; the reason is above" >&2
        return 2
    fi
    if ! "$python" -m pip install --quiet --disable-pip-version-check -r "$root/$requirements" >&2; then
        echo "error: installing $requirements failed; the reason is above" >&2
        return 2
    fi
    printf '%s\n' "$wanted" >"$stamp"
}

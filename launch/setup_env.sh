#!/usr/bin/env bash
# Make .venv and install this checkout with the versions of constraints.txt. Does nothing when that is
# already done for the same versions.
#
#   bash launch/setup_env.sh [EXTRA,EXTRA...]      extras of pyproject.toml; default: plot
#
# Environment: VENV (default .venv in the checkout), PYTHON (default: the first of python3.11, 3.12, 3.13, 3.10, python3
# that is 3.10-3.13), TORCH_INDEX_URL (index to take torch from, for instance PyTorch's CPU wheels).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras="${1:-plot}"
venv="${VENV:-$PWD/.venv}"

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3.10 python3}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: no Python 3.10-3.13 found; install one, or set PYTHON to its path" >&2
    exit 2
}

stamp="$venv/.megatron_telechat-$(cat constraints.txt pyproject.toml | sha256sum | cut -c1-16)-${extras//,/+}"
if [ -e "$stamp" ]; then
    exit 0
fi
if [ ! -x "$venv/bin/python" ]; then
    python="$(find_python)"
    echo "setup: creating $venv with $("$python" --version)"
    "$python" -m venv "$venv" || { echo "setup: venv failed; on Debian: apt-get install python3-venv" >&2; exit 2; }
fi
# Twice quiet: errors only. The build back-end warns about every editable installation otherwise.
pip=("$venv/bin/python" -m pip --disable-pip-version-check -qq)
echo "setup: installing torch and the packages of constraints.txt into $venv (a few minutes the first time)"
"${pip[@]}" install --upgrade pip
"${pip[@]}" install -c constraints.txt ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch
"${pip[@]}" install -c constraints.txt -e ".[$extras]"
touch "$stamp"

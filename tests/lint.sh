#!/usr/bin/env bash
# Lint, format and types, with the versions of constraints.txt; settings are in pyproject.toml.
#
#   bash tests/lint.sh             check; says everything that is wrong, then exits with 1
#   bash tests/lint.sh --fix       let ruff fix and format first
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup_env.sh test  # types of all optional packages, too
venv="${VENV:-$PWD/.venv}"
if [ "${1:-}" = "--fix" ]; then
    "$venv/bin/ruff" check --fix --quiet . || true
    "$venv/bin/ruff" format --quiet .
fi
failed=0
check() {
    echo "lint: $*"
    "$venv/bin/$@" || failed=1
}
check ruff check .
check ruff format --check .
check basedpyright --pythonpath "$venv/bin/python"
exit "$failed"

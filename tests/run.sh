#!/usr/bin/env bash
# The test suite, on a bare machine: makes its own environment, then runs pytest.
#
#   bash tests/run.sh              everything but the tests marked slow
#   bash tests/run.sh --fast       in under a minute: the tests that start no process
#   bash tests/run.sh -m slow      the slow ones
#   bash tests/run.sh tests/config -k layout
#   bash tests/run.sh -n 0         the suite one test after another; it takes two files at a time otherwise
#   bash tests/run.sh --core other [...]     on the other megatron-core, or on one of a number: --core 0.19.2; without
#                                            [...] what tests/other_core.txt names
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup_env.sh test
venv="${VENV:-$PWD/.venv}"
if [ "${1:-}" = --core ]; then
    venv="$(bash tests/core_env.sh "$venv" "${2:?--core needs a version of megatron-core}")"
    shift 2
    [ $# -gt 0 ] || mapfile -t named < <(grep -v '^#' tests/other_core.txt)
fi
# Whole files side by side, where no tests are named: one file alone leaves a third of two cores idle. A file has one
# worker, since its tests share what they start. The files come in the order of tests/conftest.py.
workers=(-n 2 --dist loadfile --no-loadscope-reorder)
for word in "$@"; do
    case "$word" in --fast | -m* | -k* | [!-0-9]*) workers=() ;; esac
done
set -- ${workers[@]+"${workers[@]}"} "$@" ${named[@]+"${named[@]}"}
# One thread a rank: four ranks with a thread pool each would fight for the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" MKL_NUM_THREADS="${MKL_NUM_THREADS:-1}" PYTHONUNBUFFERED=1
exec "$venv/bin/python" -m pytest "$@"

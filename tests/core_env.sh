#!/usr/bin/env bash
# An environment with another megatron-core, everything else taken from a finished one; prints its path.
#
#   bash tests/core_env.sh .venv 0.19.2          makes .venv-core-0.19.2, once
#   bash tests/core_env.sh .venv other           0.19.2 where .venv has 0.16.1, and 0.16.1 where it has 0.19
#
# pip refuses 0.17 and newer below Python 3.12, but the source package works there; building it takes a C++ compiler.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
base="$(cd "$1" && pwd)" version="$2"
if [ "$version" = other ]; then
    here="$("$base/bin/python" -c 'import importlib.metadata; print(importlib.metadata.version("megatron-core"))')"
    [[ "$here" == 0.19.* ]] && version=0.16.1 || version=0.19.2
fi
env="$PWD/.venv-core-$version"
if [ ! -e "$env/.ready" ]; then
    site='import sysconfig; print(sysconfig.get_path("purelib"))'
    "$base/bin/python" -m venv --clear --without-pip "$env"
    there="$("$env/bin/python" -c "$site")"
    # Read after the environment's own packages, so that the other megatron-core comes first. Not a bare path: the .pth
    # files of the finished environment count too.
    printf '%s\n' "$PWD" "import site; site.addsitedir('$("$base/bin/python" -c "$site")')" > "$there/base.pth"
    echo "setup: installing megatron-core $version into $env (a minute where it has to be built)" >&2
    "$base/bin/python" -m pip --disable-pip-version-check -qq install --no-deps --ignore-requires-python \
        --target "$there" "megatron-core==$version" >&2
    touch "$env/.ready"
fi
echo "$env"

"""The shell files of the sandbox: how it is entered, what a script finds changed, the stubs of launchers."""

from __future__ import annotations

ENTER = r"""# enter FOLDER SECONDS SCRIPT PRESENT_FOLDER [FOLDERS TO READ] -- [ARGUMENTS]
set -e
folder=$1 seconds=$2 script=$3 present=$4; shift 4
root=$folder/root
mount -t tmpfs -o size=64m,mode=755 none "$root"
for one in usr bin sbin lib lib32 lib64; do
  if [ -L "/$one" ]; then ln -s "$(readlink "/$one")" "$root/$one"
  elif [ -d "/$one" ]; then
    mkdir "$root/$one"; mount --bind "/$one" "$root/$one"; mount -o remount,bind,ro,nosuid "$root/$one"
  fi
done
mkdir "$root/dev" "$root/tmp" "$root/proc" "$root/stub" "$root/out" "$root/etc"
for one in null zero urandom; do : > "$root/dev/$one"; mount --bind "/dev/$one" "$root/dev/$one"; done
ln -s /proc/self/fd "$root/dev/fd"; ln -s /proc/self/fd/1 "$root/dev/stdout"; ln -s /proc/self/fd/2 "$root/dev/stderr"
mount -t proc none "$root/proc" 2>/dev/null || true
mount --bind "$folder/stub" "$root/stub"; mount -o remount,bind,ro,nosuid "$root/stub"
mount -t tmpfs -o size=16m,nr_inodes=4096,mode=755 none "$root/out"
while [ "$1" != -- ]; do
  mkdir -p "$root$1"
  mount --bind "$1" "$root$1"; mount -o remount,bind,ro,nosuid "$root$1"
  shift
done
shift
mkdir -p "$root$(dirname "$script")" "$root$present" 2>/dev/null || true
[ -e "$root$script" ] || : > "$root$script"
mount --bind "$folder/script" "$root$script"; mount -o remount,bind,ro,nosuid "$root$script"
: > "$folder/out/.started"
ulimit -t 20; ulimit -v 4000000; ulimit -f 8000; ulimit -c 0
code=0
mapfile -d '' variables < "$folder/variables"
timeout -s KILL "$seconds" chroot "$root" /usr/bin/setpriv --no-new-privs --bounding-set=-all --inh-caps=-all \
  /usr/bin/env -i "${variables[@]}" /bin/bash -c \
  'cd "$1" || cd /; shift; exec /bin/bash "$@"' run "$present" "$script" "$@" || code=$?
[ $code != 137 ] || : > "$root/out/.timed-out"
cp -r "$root/out/." "$folder/out/"
"""
"""Makes the file system of the sandbox and runs the script in it; what fails before `.started` means: no sandbox.

The records are on a small file system of their own, and are copied out at the end: a script cannot fill a disk."""

PRELUDE = r"""
command_not_found_handle() { /stub/.stub "$@"; return 0; }
cd() { builtin cd "$@" 2>/dev/null || builtin return 0; }
pushd() { builtin pushd "$@" 2>/dev/null || builtin return 0; }
popd() { builtin popd "$@" 2>/dev/null || builtin return 0; }
source() {
  if [ -r "$1" ]; then builtin source "$@"; builtin set +eu; else builtin echo "$1" >> /out/.missing; fi
  builtin return 0
}
.() { source "$@"; }
exit() {
  case "${1:-0}" in 0) builtin exit 0 ;; *) builtin echo "$1" >> /out/.stops ;; esac
}
"""
"""Read by every bash of the sandbox: what is not here does not end a script."""

STUB = r"""#!/bin/bash -p
name=${0##*/}
if [ "$name" = .stub ]; then name=$1; shift; fi
base=${name##*/}
mark=$(printf '\x1f')
record() {
  at=$(mktemp "/out/$(date +%s%N).XXXXXX")
  { printf '%s\0' "$@" ; } > "$at"
}
chain() {
  found=(); IFS=$mark read -r -d '' -a found <<< "$TELECHAT_CHAIN"
  found=("${found[@]:0:${#found[@]}-1}")  # the last one is the line end of <<<
}
case $base in
  nvidia-smi|npu-smi|rocm-smi|amd-smi|ixsmi|mthreads-gmi)
    : > /out/.devices
    for ((at = 0; at < TELECHAT_DEVICES; at++)); do echo "GPU $at"; done
    exit 0 ;;
  scontrol)
    for ((at = 0; at < ${SLURM_NNODES:-1}; at++)); do echo "node$at"; done
    exit 0 ;;
  sh|zsh) exec /bin/bash "$@" ;;
  sudo) while [[ $1 == -* ]]; do shift; done; exec "$@" ;;
  sleep|git|pip|pip3|conda|wget|curl|ssh|pdsh|pkill|killall|apt|apt-get|huggingface-cli|ifconfig|ip) exit 0 ;;
  python*)
    if [ "$1" = -c ]; then
      case "$2" in *device_count*) : > /out/.devices; echo "$TELECHAT_DEVICES" ;; esac
      exit 0
    fi
    [ "$1" = - ] && exit 0 ;;
  sbatch)
    [ -n "$TELECHAT_JOB" ] && exit 0  # a job that submits its successor, often itself
    options=(); text=
    while [ $# -gt 0 ]; do
      case $1 in
        --wrap) text=$2; shift 2; continue ;;
        --wrap=*) text=${1#--wrap=}; shift; continue ;;
      esac
      if [[ $1 != -* && -r $1 && -f $1 ]]; then text=$(cat "$1"); break; fi
      options+=("$1"); shift
    done
    [ -n "$text" ] || text=$(cat)
    mapfile -d '' variables < <(env -0)
    record job "$text" "${#options[@]}" "${options[@]}" "${variables[@]}"
    exit 0 ;;
esac
case $base in torchrun|python*|deepspeed|accelerate) ;; *)
  for ((at = 1; at <= $#; at++)); do
    case ${!at##*/} in
      bash|sh|zsh)
        for one in "$base" "${@:1:at-1}"; do TELECHAT_CHAIN+=$one$mark; done
        export TELECHAT_CHAIN
        if [[ ${@:at+1:1} == -*c ]] && ! /bin/bash -p -n -c "${@:at+2:1}" 2>/dev/null; then
          read -r -d '' -a inner <<< "${@:at+2:1}"  # the shell of the cluster would not read it either
          chain; record command "$CUDA_VISIBLE_DEVICES" "$ASCEND_RT_VISIBLE_DEVICES" "${found[@]}" "${inner[@]}"
          exit 0
        fi
        exec /bin/bash "${@:at+1}" ;;
    esac
  done ;;
esac
words=(); [ -n "$TELECHAT_CHAIN" ] && { chain; words=("${found[@]}"); }
record command "$CUDA_VISIBLE_DEVICES" "$ASCEND_RT_VISIBLE_DEVICES" "${words[@]}" "$name" "$@"
exit 0
"""
"""One stub under all names: writes its words to /out, one file a command; a shell behind a launcher runs."""

STUBS = tuple(
    """torchrun python python3 python3.8 python3.9 python3.10 python3.11 python3.12 python3.13 deepspeed accelerate srun
    mpirun mpiexec mpiexec.hydra orterun prterun sbatch scontrol nvidia-smi npu-smi rocm-smi amd-smi ixsmi mthreads-gmi
    sh zsh sudo sleep git pip pip3 conda wget curl ssh pdsh pkill killall apt apt-get huggingface-cli ifconfig ip nsys
    ncu docker podman singularity apptainer""".split()
)

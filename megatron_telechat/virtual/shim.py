"""Builds and loads the few lines of C++ that let autograd run on fake tensors of a device that is not there."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from megatron_telechat.errors import ResourceError

_SOURCE = Path(__file__).with_name("shim.cpp")
_COMPILERS = ("c++", "g++", "clang++")
_INSTALL = "install a C++20 compiler (apt install g++, or dnf install gcc-c++)"
_BUILD_LIMIT_S = 300


def load_shim() -> None:
    """Load the library, built at the first use; to be called before torch is imported.

    Raises:
        ResourceError: no compiler, or it fails.
    """
    assert "torch" not in sys.modules, "the hooks are asked for while torch is imported"
    torch = _torch_folder()
    library = _built(torch)
    # A torch that was built for CUDA registers its own guard and hooks first; ours take their place.
    for name in ("libc10.so", "libtorch_cpu.so", "libtorch_cuda.so"):
        if (torch / "lib" / name).exists():
            ctypes.CDLL(str(torch / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _torch_folder() -> Path:
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise ResourceError("torch is not installed", "--execute", "pip install torch, a CPU build is enough")
    return Path(found.origin).parent


def _built(torch: Path) -> Path:
    """The library for this torch, compiled where it is not there yet."""
    version = (torch / "version.py").read_text(encoding="utf-8")
    key = hashlib.sha256(f"{version}{torch}{_SOURCE.read_text(encoding='utf-8')}".encode()).hexdigest()[:16]
    folder = _cache_folder()
    library = folder / f"virtual-device-{key}.so"
    if library.exists():
        return library
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or _COMPILERS[0], *_COMPILERS))), None)
    if compiler is None:
        raise ResourceError("no C++ compiler was found, which a virtual rank needs once", "--execute", _INSTALL)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = Path(temporary) / library.name
        command = [
            compiler, "-std=c++20", "-O1", "-shared", "-fPIC",
            f"-D_GLIBCXX_USE_CXX11_ABI={_new_strings(torch)}",
            f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}",
            f"-I{sysconfig.get_path('include')}", str(_SOURCE), "-o", str(made),
            f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu",
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_LIMIT_S)
        except subprocess.TimeoutExpired as error:
            raise ResourceError(f"{compiler} took more than {_BUILD_LIMIT_S} s", "--execute", _INSTALL) from error
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            raise ResourceError(
                f"{compiler} could not build {_SOURCE.name}: {lines[0] if lines else f'exit {done.returncode}'}",
                "--execute",
                _INSTALL,
            )
        os.replace(made, library)  # several ranks may build at once: each whole, the last one stays
    return library


def _new_strings(torch: Path) -> int:
    """Whether this torch was built with the C++11 form of std::string; without torch, from the names in its library."""
    return int(b"__cxx11" in (torch / "lib" / "libc10.so").read_bytes())


def _cache_folder() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for folder in (home / "megatron_telechat", Path(tempfile.gettempdir()) / f"megatron_telechat-{os.getuid()}"):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            continue
        # A library that others can replace is code that others can run.
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    raise ResourceError(
        "no folder for the compiled part of a virtual rank can be written", "--execute", "set XDG_CACHE_HOME"
    )

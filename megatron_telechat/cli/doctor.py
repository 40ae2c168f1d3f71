"""What this machine has, what each thing enables, and the line that fixes what is missing.

Standard library only, and nothing heavy is imported: packages are looked up by their metadata, devices
by what the driver shows, so the answer comes in about a second even where a package is broken.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_telechat.backend.core_versions import TRANSFORMER_ENGINE, condition_here, line_of, satisfies
from megatron_telechat.cli.text import gib, table
from megatron_telechat.cli.tool import ToolParser, run_tool

OK, MISSING, WRONG, ABSENT = "ok", "MISSING", "WRONG", "-"


@dataclass(frozen=True)
class Finding:
    """One row: `status` is ok, MISSING or WRONG (required), or - (optional and absent)."""

    name: str
    status: str
    found: str
    enables: str
    fix: str = ""


@dataclass(frozen=True)
class _Package:
    distribution: str
    needs: str
    """Version condition: ``>=2.10``, ``==0.16.1``, ``>=0.19.2,<0.20`` or empty."""
    enables: str
    extra: str = ""
    """Extra of the package that brings an optional package; empty for a required one."""


PACKAGES = (
    _Package("torch", ">=2.10", "everything that computes"),
    _Package("megatron-core", condition_here(), "parallel layers, schedules, optimizer"),
    _Package("numpy", ">=1.26", "indexed datasets"),
    _Package("pyyaml", ">=6.0", "configuration files"),
    _Package("safetensors", ">=0.4.3", "checkpoints, Hugging Face weights"),
    _Package("psutil", ">=5.9", "memory figures; megatron-core's checkpointing hangs without it"),
    _Package("isal", ">=1.6", "checksums of checkpoints"),
    _Package("orjson", ">=3.9", "reading jsonl"),
    _Package("tokenizers", ">=0.20", "HuggingFaceTokenizer"),
    _Package("sentencepiece", ">=0.2", "SentencePieceTokenizer (TeleChat2's own)"),
    _Package("tiktoken", ">=0.7", "TikTokenizer; a faster tools/preprocess_data.py", "tiktoken"),
    _Package("gigatoken", ">=0.10", "the fastest tools/preprocess_data.py", "data"),
    _Package("zstandard", ">=0.22", "jsonl.zst as input", "data"),
    _Package("pyarrow", ">=16.0", "parquet as input", "data"),
    _Package("matplotlib", ">=3.7", "tools/plot_run.py", "plot"),
    _Package("tensorboard", ">=2.14", "--tensorboard", "tensorboard"),
    _Package("wandb", ">=0.16", "--wandb-project", "wandb"),
)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _good_enough(package: _Package, version: str) -> bool:
    """Of megatron-core both release lines are, whichever pip would choose on this Python."""
    if package.distribution == "megatron-core":
        return line_of(version) is not None
    return satisfies(version, package.needs)


def _package(package: _Package) -> Finding:
    version = _version(package.distribution)
    install = (
        f'pip install -e ".[{package.extra}]"'
        if package.extra
        else f'pip install "{package.distribution}{package.needs}"'
    )
    if version is None:
        return Finding(
            package.distribution, ABSENT if package.extra else MISSING, "not installed", package.enables, install
        )
    if not _good_enough(package, version):
        return Finding(package.distribution, WRONG, f"{version}, needs {package.needs}", package.enables, install)
    return Finding(package.distribution, OK, version, package.enables)


def _python() -> Finding:
    version = platform.python_version()
    good = (3, 10) <= sys.version_info[:2] <= (3, 13)
    return Finding(
        "Python", OK if good else WRONG, version if good else f"{version}, needs 3.10-3.13", "everything",
        "" if good else "PYTHON=python3.11 bash launch/setup_env.sh",
    )  # fmt: skip


def _nvidia_devices() -> list[str]:
    """Names and memory that the NVIDIA driver reports; empty without one."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()] if answer.returncode == 0 else []


def _ascend_devices() -> int:
    return (
        len([name for name in os.listdir("/dev") if re.fullmatch(r"davinci\d+", name)]) if os.path.isdir("/dev") else 0
    )


def _host_memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


def _torch_cuda() -> str | None:
    """CUDA version that the installed torch was built for; None for a CPU build or without torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    version_file = Path(spec.origin).with_name("version.py")
    if not version_file.exists():
        return None
    match = re.search(r"^cuda\b[^=]*=\s*'([\d.]+)'", version_file.read_text(encoding="utf-8"), re.MULTILINE)
    return match.group(1) if match else None


def _devices(gpus: Sequence[str]) -> list[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    host = Finding("host", OK, f"{cores} cores, {gib(_host_memory_bytes())} GiB", "--device cpu: every layout, slowly")
    has_torch, cuda = _version("torch") is not None, _torch_cuda()
    gloo = Finding("gloo", OK if has_torch else MISSING, "in torch" if has_torch else "needs torch", "ranks on the CPU")
    cpu_build = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128"
    if gpus and cuda:
        device = Finding("CUDA", OK, f"{len(gpus)} x {gpus[0]}, torch for CUDA {cuda}", "--device cuda")
    elif gpus:
        device = Finding(
            "CUDA", ABSENT, f"{len(gpus)} x {gpus[0]}, but torch is a CPU build", "--device cuda", cpu_build
        )
    else:
        device = Finding("CUDA", ABSENT, "no NVIDIA driver answers", "--device cuda")
    nccl = Finding("NCCL", OK if cuda else ABSENT, "in torch" if cuda else "torch has none", "ranks on NVIDIA GPUs",
                   cpu_build if gpus and not cuda else "")  # fmt: skip
    return [host, gloo, device, nccl, *_cuda_queues(gpus), _ascend()]


def _cuda_queues(gpus: Sequence[str]) -> list[Finding]:
    """A setting that Megatron-LM's scripts carry, and that keeps exchanges of the experts and of the attention over
    ranks from running beside kernels."""
    if not gpus or os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") != "1":
        return []
    return [Finding("CUDA queues", ABSENT, "CUDA_DEVICE_MAX_CONNECTIONS=1",
                    "exchange beside kernels: --moe-input-chunks, --context-parallel-size",
                    "unset CUDA_DEVICE_MAX_CONNECTIONS (the training sets it where it helps)")]  # fmt: skip


def _ascend() -> Finding:
    devices, plugin = _ascend_devices(), _version("torch-npu") or _version("torch_npu")
    toolkit = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    what = "--device npu, ranks over HCCL"
    if not devices and not plugin:
        return Finding("NPU, HCCL", ABSENT, "no Ascend device", what)
    if not plugin:
        return Finding("NPU, HCCL", ABSENT, f"{devices} NPUs, no torch_npu", what,
                       "pip install torch-npu (the release that matches your torch and CANN)")  # fmt: skip
    if not toolkit:
        return Finding("NPU, HCCL", ABSENT, f"torch_npu {plugin}, CANN not set up", what,
                       "source /usr/local/Ascend/ascend-toolkit/set_env.sh")  # fmt: skip
    return Finding("NPU, HCCL", OK if devices else ABSENT, f"{devices} NPUs, torch_npu {plugin}", what)


def _transformer_engine(has_gpu: bool) -> Finding:
    enables = "fused layers on NVIDIA GPUs; torch's own serve without it"
    version = _version("transformer-engine") or _version("transformer_engine")
    if version is None:
        # Never offered to a machine without a GPU: there it would break megatron-core, see below.
        return Finding(
            "transformer-engine", ABSENT, "not installed", enables, 'pip install -e ".[te]"' if has_gpu else ""
        )
    if importlib.util.find_spec("transformer_engine_torch") is None:
        # The meta wheel alone raises RuntimeError, not ImportError, and takes megatron.core down with it.
        return Finding("transformer-engine", WRONG, f"{version} without its torch part: importing megatron-core "
                                                    f"fails", enables,
                       "pip uninstall -y transformer-engine")  # fmt: skip
    if not satisfies(version, TRANSFORMER_ENGINE):
        # It may work: its interface changes between releases, and nobody has read this one.
        return Finding(
            "transformer-engine", ABSENT, f"{version}, read were {TRANSFORMER_ENGINE}", enables,
            f'pip install "transformer-engine[pytorch]{TRANSFORMER_ENGINE}"',
        )  # fmt: skip
    return Finding("transformer-engine", OK, version, enables)


def _apex(has_gpu: bool) -> Finding:
    enables = "fused AdamW on NVIDIA GPUs; torch's own serves without it"
    source = "build it from https://github.com/NVIDIA/apex" if has_gpu else ""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Finding("NVIDIA apex", ABSENT, "not installed", enables, source)
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "optimizers").is_dir() for folder in folders):
        return Finding("NVIDIA apex", ABSENT, "the apex of PyPI, another project", enables, "pip uninstall -y apex")
    if importlib.util.find_spec("amp_C") is None:
        return Finding("NVIDIA apex", ABSENT, "built without its CUDA extensions", enables, source)
    return Finding("NVIDIA apex", OK, _version("apex") or "yes", enables)


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    enough = free > 5 * 2**30
    return Finding("free disk", OK if enough else ABSENT, f"{gib(free)} GiB at {folder}", "checkpoints (14 bytes a "
                                                                                          "parameter)",
                   "" if enough else "--run-dir on a larger disk")  # fmt: skip


def findings(folder: Path) -> list[Finding]:
    """Every row of the table, required things first."""
    packages = [_package(package) for package in PACKAGES]
    gpus = _nvidia_devices()
    fused = [_transformer_engine(bool(gpus)), _apex(bool(gpus))]
    return [_python(), *packages[:2], *_devices(gpus), *packages[2:], *fused, _disk(folder)]


def render(rows: Sequence[Finding]) -> str:
    """The table, and under it the lines that fix what is missing."""
    header = ["", "status", "found", "enables"]
    lines = table([header, *([row.name, row.status, row.found, row.enables] for row in rows)], left=(0, 1, 2, 3))
    required = [row for row in rows if row.status in (MISSING, WRONG)]
    optional = [row for row in rows if row.status == ABSENT and row.fix]
    if required:
        lines += ["", "to fix:", *(f"  {row.name}: {row.fix}" for row in required if row.fix)]
        lines.append("  or all at once: bash launch/setup_env.sh")
    if optional:
        lines += ["", "optional:", *(f"  {row.name}: {row.fix}" for row in optional)]
    lines += ["", "ready to train" if not required else f"not ready: {', '.join(row.name for row in required)}"]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 0 if everything required is there, else 2."""
    return run_tool(_diagnose, argv)


def _diagnose(argv: list[str]) -> int:
    parser = ToolParser(
        prog="doctor.py", description="What this machine has, what it enables, and how to fix what is missing."
    )
    parser.add_argument("--run-dir", default=".", help="folder whose disk is checked (default: here)")
    folder = Path(parser.parse_args(argv).run_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    rows = findings(folder)
    print(render(rows))
    return 2 if any(row.status in (MISSING, WRONG) for row in rows) else 0

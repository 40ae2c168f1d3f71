"""Packaging of megatron_telechat. Versions that are known to work together stand in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
README = HERE / "README.md"


def version() -> str:
    for line in (HERE / "megatron_telechat" / "__init__.py").read_text().splitlines():
        if line.startswith("__version__"):
            return line.split('"')[1]
    raise RuntimeError("megatron_telechat/__init__.py has no __version__")


PLOT = ["matplotlib>=3.7"]
WANDB = ["wandb>=0.16"]
TENSORBOARD = ["tensorboard>=2.14"]
TIKTOKEN = ["tiktoken>=0.7"]
DATA = ["gigatoken>=0.10", "zstandard>=0.22", "pyarrow>=16.0", *TIKTOKEN]
TEST = ["pytest>=7.4", "transformers>=5.0", *PLOT, *DATA]

setup(
    name="megatron_telechat",
    version=version(),
    description="Megatron-style 3D + expert-parallel pretraining for the TeleChat2 models",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["megatron_telechat", "megatron_telechat.*"]),
    package_data={"megatron_telechat": ["config/presets/*.yaml", "costs/devices/*.yaml", "data/sample/*.jsonl"]},
    install_requires=[
        "torch>=2.10",
        "megatron-core==0.16.1",
        "numpy>=1.26",
        "highspy>=1.7",
        "pyyaml>=6.0",
        "safetensors>=0.4.3",
        "psutil>=5.9",
        "orjson>=3.9",
        "tokenizers>=0.20",
        "sentencepiece>=0.2",
    ],
    extras_require={
        "te": ["transformer-engine[pytorch]>=2.4"],
        "wandb": WANDB,
        "tensorboard": TENSORBOARD,
        "plot": PLOT,
        "tiktoken": TIKTOKEN,
        "data": DATA,
        "test": TEST,
        "all": [*WANDB, *TENSORBOARD, *PLOT, *DATA, *TEST],
    },
    classifiers=[
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
    ],
)

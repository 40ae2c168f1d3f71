"""What is refused of the optimizer's state on the host and in 16 bits, and why."""

from __future__ import annotations

import pytest

from megatron_telechat.config import load_run_config
from megatron_telechat.errors import ConfigError

ARGV = "--preset telechat2-tiny --mock-data --train-iters 100 --world-size 1 --dry-run"


def load(flags: str):
    return load_run_config([*ARGV.split(), *flags.split()], {})


@pytest.mark.parametrize(
    "flags,says",
    [
        ("--optimizer-offload-fraction 0.5", "optimizer_offload_fraction=0.5 without optimizer_cpu_offload"),
        ("--overlap-cpu-optimizer-d2h-h2d", "without optimizer_cpu_offload"),
        ("--optimizer-cpu-offload --optimizer-offload-fraction 1.5", "optimizer_offload_fraction=1.5 is out of range"),
        ("--optimizer-cpu-offload --host-memory-gib 0", "host_memory_gib=0"),
        ("--exp-avg-sq-dtype bf16 --adam-beta2 0.999", "would grow and never fall"),
        ("--exp-avg-dtype bf16 --adam-beta1 0.997", "exp_avg_dtype=bf16 with adam_beta1=0.997"),
        ("--exp-avg-sq-dtype fp16", "below the range of this type"),
        ("--exp-avg-dtype fp8", "below the range of this type"),
        ("--main-params-dtype fp16", "fp32"),
    ],
)
def test_refused(flags, says):
    with pytest.raises(ConfigError) as caught:
        load(flags)
    assert says in caught.value.render()


def test_what_megatron_has_besides_is_answered():
    loaded = load(
        "--optimizer-cpu-offload --use-precision-aware-optimizer --use-torch-optimizer-for-cpu-offload --pin-cpu-grads "
        "--exp-avg-sq-dtype bf16 --adam-beta2 0.996"
    )
    assert loaded.run.parallel.optimizer_cpu_offload and loaded.run.optimizer.exp_avg_sq_dtype == "bf16"
    assert sum("--use-torch-optimizer" in note or "--pin-cpu-grads" in note for note in loaded.notes) == 2

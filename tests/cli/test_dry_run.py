"""The dry-run report: every preset at any number of ranks, in a screenful and without torch."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import time

import pytest

from megatron_telechat.cli.dry_run import report
from megatron_telechat.config import load_run_config
from megatron_telechat.config.presets import preset_names
from megatron_telechat.costs import count_parameters
from megatron_telechat.errors import ConfigError, DataError
from tests.data import material

PUBLISHED = {
    "telechat2-3b": (3_070_528_512, 3_070_528_512),
    "telechat2-7b": (7_617_351_680, 7_617_351_680),
    "telechat2-35b": (35_435_059_200, 35_435_059_200),
    "telechat2-115b": (113_282_916_352, 113_282_916_352),
    "telechat2-39b-a12b": (39_330_099_200, 12_149_534_720),
    "mixtral-8x7b": (46_702_792_704, 12_879_925_248),
    "mixtral-8x22b": (140_620_634_112, 39_152_031_744),
}


def dry(*argv: str, preset: str = "telechat2-tiny-moe") -> str:
    return report(load_run_config(["--preset", preset, "--dry-run", *argv], {}))


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_on_few_and_many_ranks(preset):
    fewest = load_run_config(["--preset", preset, "--dry-run"], {}).run.parallel.world_size
    for world_size in dict.fromkeys((fewest, 8 * fewest, 512, 1024)):
        if world_size % fewest:
            continue
        started = time.process_time()  # of this process: a busy machine must not fail it
        text = dry("--world-size", str(world_size), preset=preset)
        assert time.process_time() - started < 2
        lines = text.splitlines()
        assert len(lines) < 150
        assert max(map(len, lines)) < 250
        for section in ("pipeline layout", "ranks", "groups", "memory of a rank", "steps", "files", "data", "warnings"):
            assert any(line.startswith(section) for line in lines), section


@pytest.mark.parametrize("preset", PUBLISHED)
def test_preset_counts_are_the_published_ones(preset):
    count = count_parameters(load_run_config(["--preset", preset, "--dry-run"], {}).run.model)
    assert (count.total, count.active) == PUBLISHED[preset]
    head = dry(preset=preset).splitlines()[0]
    active = f", {count.active:,} active a token" if count.active != count.total else ""
    assert f"{count.total:,} parameters{active}, vocabulary " in head


def test_layout_recompute_ranks_and_experts_are_drawn():
    text = dry("--world-size", "1024", preset="telechat2-39b-a12b")
    assert "stage 0   E RRRtttttttttttt  0-14" in text
    assert "stage 1     ttttttttttttttt  15-29 L" in text
    assert "R: recomputed in full" in text
    assert "EP 8 x ETP 1 x EDP 64: 2 experts a rank" in text
    assert "2 tensor groups of TP 4" in text
    assert "61 more nodes" in text
    assert "a checkpoint of 512.8 GiB" in text  # 14 bytes a parameter


def test_few_ranks_have_a_row_each():
    text = dry(
        "--world-size",
        "4",
        "--tensor-model-parallel-size",
        "2",
        "--pipeline-model-parallel-size",
        "2",
        "--num-virtual-stages-per-pipeline-rank",
        "2",
    )
    assert "  3        0   1   0   0   1    0   1    0" in text
    assert "stage 1     t  1  |    t  3 L" in text
    assert "tensor_model_parallel_size = 2  (flag)" in text


def test_warns_of_groups_across_nodes_and_of_stages_too_large():
    text = dry(
        "--world-size",
        "64",
        "--tensor-model-parallel-size",
        "1",
        "--pipeline-model-parallel-size",
        "1",
        "--expert-model-parallel-size",
        "16",
        "--recompute-layout",
        "none*30",
        "--no-fold-tensor-into-experts",
        preset="telechat2-39b-a12b",
    )
    assert "4 of 4 expert groups (16 ranks: EP16 x ETP1) cross nodes of 8 ranks" in text
    assert "--expert-model-parallel-size 8 stays within a node" in text
    small = dry(
        "--world-size",
        "8",
        "--tensor-model-parallel-size",
        "1",
        "--pipeline-model-parallel-size",
        "1",
        "--pipeline-model-parallel-layout",
        "Et*30L",
        preset="telechat2-7b",
    )
    assert "stage 0 needs about" in small


def column(text: str, title: str) -> list[float]:
    """A column of the memory table, by its title."""
    lines = text.splitlines()
    head = next(line for line in lines if "activations" in line and title in line)
    rows = lines[lines.index(head) + 1 :]
    stop = next(number for number, line in enumerate(rows) if not line.strip() or not line.split()[0].isdigit())
    end = head.index(title) + len(title)
    return [float(row[:end].split()[-1]) for row in rows[:stop]]


def test_memory_of_uneven_routing_stands_beside_the_even_one():
    text = dry("--world-size", "1024", "--moe-memory-imbalance", "1.5", preset="telechat2-39b-a12b")
    even, uneven = column(text, "total"), column(text, "at 1.5x")
    assert len(even) == 2 and all(more > less for more, less in zip(uneven, even, strict=True))
    assert "1.5 times the mean of rows" in text
    assert "at 1x" not in dry("--world-size", "1024", "--moe-memory-imbalance", "1", preset="telechat2-39b-a12b")
    worst = dry("--world-size", "4", "--expert-model-parallel-size", "2", "--moe-memory-imbalance", "9")
    assert "at 2x" in worst, "two ranks: one cannot get more than all"
    assert " at 2x" not in dry("--world-size", "1"), "one rank has all experts, always"


def test_warns_where_only_even_routing_fits():
    argv = (
        "--world-size",
        "8",
        "--tensor-model-parallel-size",
        "1",
        "--pipeline-model-parallel-size",
        "1",
        "--device",
        "cuda",
        "--num-layers",
        "6",
        "--pipeline-model-parallel-layout",
        "Et*6L",
        "--recompute-layout",
        "none*6",
        "--micro-batch-size",
        "2",
        "--expert-model-parallel-size",
        "8",
        "--use-distributed-optimizer",
        "--loss-chunk-rows",
        "0",
    )
    text = dry(*argv, "--moe-memory-imbalance", "8", preset="telechat2-39b-a12b")
    assert "which even routing fits" in text
    assert "which even routing fits" not in dry(*argv, "--moe-memory-imbalance", "1.1", preset="telechat2-39b-a12b")


def test_expert_groups_and_what_crosses_are_drawn_with_and_without_folding():
    folded = dry("--world-size", "16", "--tensor-model-parallel-size", "2", "--ranks-per-node", "4")
    assert (
        "8 groups of 2: ranks 0-1 (node 0), 2-3 (node 0), 4-5 (node 1), .., 14-15 (node 3); none crosses nodes of 4"
        in folded
    )
    assert "the tensor domain is folded in" in folded and "EP 2 x ETP 1" in folded
    cut = dry(
        "--world-size",
        "16",
        "--tensor-model-parallel-size",
        "2",
        "--ranks-per-node",
        "4",
        "--no-fold-tensor-into-experts",
        "--expert-model-parallel-size",
        "4",
        "--expert-tensor-parallel-size",
        "2",
    )
    assert "2 groups of 8: ranks 0-7 (nodes 0, 1), 8-15 (nodes 2, 3); all cross nodes of 4" in cut
    assert "each cut 2 ways" in cut and "--expert-model-parallel-size 2 stays within a node" in cut


def write_dataset(prefix, documents=2, tokens=10, magic=b"MMIDIDX\x00\x00"):
    header = struct.pack("<9sQBQQ", magic, 1, 8, documents, documents + 1)
    prefix.with_suffix(".idx").write_bytes(header + bytes(12 * documents + 8 * (documents + 1)))
    prefix.with_suffix(".bin").write_bytes(bytes(2 * tokens))


def test_headers_of_the_data_are_read(tmp_path):
    write_dataset(tmp_path / "en", documents=3, tokens=1000)
    assert "1k" in dry("--data-path", str(tmp_path / "en"))
    write_dataset(tmp_path / "zh", tokens=24_000)
    text = dry("--data-path", "0.7", str(tmp_path / "en"), "0.3", str(tmp_path / "zh"), "--global-batch-size", "8")
    assert "25k tokens for 409.6k of the run: 16.38 epochs" in text
    data_json = tmp_path / "data.json"
    data_json.write_text(json.dumps({str(tmp_path / "en"): 2}))
    assert "1k" in dry("--data-json", str(data_json))
    data_json.write_text(json.dumps({str(tmp_path / "fr"): 2, str(tmp_path / "de"): 1}))
    text = dry("--data-json", str(data_json))
    assert text.count("is missing: not here; the run will refuse to start without it") == 2
    (tmp_path / "fr.idx").write_bytes(b"no index")
    with pytest.raises(DataError, match="2 problems"):
        dry("--data-json", str(data_json))


AWAY = [
    ("--data-path /cluster/en_document", "/cluster/en_document.bin and /cluster/en_document.idx are missing"),
    ("--data-json /cluster/data.json", "data_json /cluster/data.json is not a file"),
    ("--mock-data --load /cluster/checkpoints", "load /cluster/checkpoints is not a folder"),
    ("--mock-data --pretrained-checkpoint /cluster/w", "pretrained_checkpoint /cluster/w is not a folder"),
    ("--mock-data --tokenizer-model /cluster/tok.json", "tokenizer_model /cluster/tok.json does not exist"),
]


@pytest.mark.parametrize("flags, what", AWAY)
def test_files_that_only_the_cluster_has_are_warned_of(flags, what):
    """The rest is reported; the run itself refuses to start."""
    text = dry(*flags.split(), "--world-size", "8", "--train-iters", "100")
    assert f"! {what}: not here; the run will refuse to start without it" in text
    assert "memory of a rank of each stage" in text and "not here" in text and text.endswith("nothing was started")
    with pytest.raises(ConfigError, match=re.escape(what)):
        load_run_config(["--preset", "telechat2-tiny-moe", "--train-iters", "100", *flags.split()], {"WORLD_SIZE": "8"})


def test_what_is_here_and_wrong_stops_the_dry_run_too(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ConfigError, match="is not a folder"):
        dry("--mock-data", "--pretrained-checkpoint", str(tmp_path / "file"))


def test_data_that_is_read_once_and_ends_before_the_run_is_refused(tmp_path):
    for name, tokens in (("en", 24_000), ("zh", 23_000)):
        write_dataset(tmp_path / name, tokens=tokens)
    once = [
        "--data-path",
        str(tmp_path / "en"),
        str(tmp_path / "zh"),
        "--global-batch-size",
        "8",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    with pytest.raises(DataError, match="the train data ends before the run.*are there at most"):
        dry(*once, "--train-iters", "100000")
    assert "ends before the run" not in dry(
        *once, "--train-iters", "1", "--lr-warmup-iters", "0", "--seq-length", "512"
    )


@pytest.mark.parametrize("harm", ["magic", "short", "odd", "version"])
def test_damaged_data_is_refused(tmp_path, harm):
    write_dataset(tmp_path / "en", magic=b"NOTADATA\x00" if harm == "magic" else b"MMIDIDX\x00\x00")
    index, binary = tmp_path / "en.idx", tmp_path / "en.bin"
    if harm == "short":
        index.write_bytes(index.read_bytes()[:-4])
    elif harm == "odd":
        binary.write_bytes(bytes(7))
    elif harm == "version":
        index.write_bytes(index.read_bytes()[:9] + struct.pack("<Q", 7) + index.read_bytes()[17:])
    with pytest.raises(DataError) as caught:
        dry("--data-path", str(tmp_path / "en"))
    assert "en." in str(caught.value) and caught.value.exit_code == 3


@pytest.mark.heavy
def test_torch_is_not_imported():
    code = (
        "import sys\nfrom megatron_telechat.config import load_run_config\nfrom megatron_telechat.cli.dry_run import "
        "report\nreport(load_run_config(['--preset', 'telechat2-115b', '--dry-run', '--world-size', '1024'], "
        "{}))\nsys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_predicts_the_step_on_every_known_device_that_fits():
    text = dry("--world-size", "512", "--device", "npu", "--train-iters", "1000", preset="telechat2-115b")
    line, faster = [line.strip() for line in text.splitlines() if "predicted on" in line]
    assert line.startswith("predicted on ascend-910b-64g: ") and faster.startswith("predicted on ascend-910b2: ")
    assert re.search(r" s a step \(± 18%\), 1[56]\d tokens/s a device, MFU (39|40)%, bubble", line), line
    assert "the run" in line
    # those whose shares were held against published runs: a100-80g, h100-80g, h200-141g, and these two
    assert dry("--world-size", "512", preset="telechat2-115b").count("predicted on") == 5
    assert "predicted on" not in dry("--device", "cpu")


def test_a_run_of_hours_without_a_save_interval_is_warned_of():
    long = ("--world-size", "512", "--device", "npu", "--train-iters", "1000")
    text = dry(*long, preset="telechat2-115b")
    assert "(as predicted for ascend-910b2) and has no save interval" in text and "--save-interval" in text
    assert "no save interval" not in dry(*long, "--save-interval", "100", preset="telechat2-115b")


def test_buffers_of_the_communicators_stand_beside_what_is_allocated(monkeypatch):
    monkeypatch.setenv("HCCL_BUFFSIZE", "100")
    argv = ("--world-size", "1024")
    text, plain = (dry(*argv, "--device", device, preset="telechat2-39b-a12b") for device in ("npu", "cuda"))
    buffers = column(text, "buffers")
    assert len(buffers) == 2 and min(buffers) > 1
    parts = [column(text, title) for title in ("weights", "gradients", "optimizer", "activations", "buffers")]
    assert all(abs(sum(row) - total) < 0.3 for *row, total in zip(*parts, column(text, "total"), strict=True))
    assert (
        "buffers: 2 of HCCL_BUFFSIZE for each of 8 communicators (all ranks, " in text and "experts' exchange" in text
    )
    assert "HCCL_BUFFSIZE" not in plain and "buffers" not in plain.split("memory of a rank")[1].split("steps")[0]


def test_epochs_of_text_are_steps_and_frozen_tensors_are_counted(tmp_path):
    prefix = material.write_dataset(tmp_path / "a", 40)
    data = ("--data-path", prefix, "--split", "1", "--seq-length", "32", "--global-batch-size", "4")
    text = dry(*data, "--train-epochs", "3", "--lr-warmup-iters", "0", "--run-dir", str(tmp_path / "run"))
    tokens = (tmp_path / "a.bin").stat().st_size // 2
    assert f"  {-(-((3 * tokens - 1) // 32) // 4):,} steps, " in text
    frozen = dry("--freeze", "embedding.*", "decoder.layers.0-1.*")
    assert re.search(r"frozen  [\d.]+M of [\d.]+M parameters, \d+ tensors", frozen)
    with pytest.raises(ConfigError, match="names no tensor of the model"):
        dry("--freeze", "encoder.*")

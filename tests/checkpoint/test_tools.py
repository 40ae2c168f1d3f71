"""The tools on weights: check_logits says what is right and what is not, generate continues, convert goes both ways."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_telechat.cli.convert_checkpoint import main as convert
from tests.harness import ROOT, run_cases
from tests.huggingface.folders import assert_same_folder

GOLDEN = ROOT / "tests" / "golden"

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    worker = Path(__file__).with_name("worker_tools.py")
    return run_cases(worker, 1, timeout=240, env={"CHECKPOINT_TEST_FOLDER": str(folder)})


@pytest.mark.parametrize("name", ["golden_gqa", "golden_mha", "fp32_tables_gqa", "fp32_tables_mha"])
def test_golden_logits_pass(report, name):
    code, out, err = report.check(name)[0]
    assert code == 0 and out.splitlines()[-1].startswith("PASS") and "largest error" in out, out + err


@pytest.mark.parametrize(
    "name", ["fp32_tables_strict_gqa", "fp32_tables_strict_mha", "swapped_weights", "nan_reference"]
)
def test_logits_above_the_tolerance_fail(report, name):
    code, out, err = report.check(name)[0]
    assert code == 4 and "ABOVE" in out and out.splitlines()[-1].startswith("FAIL"), out + err


def test_mixtral_agrees_with_transformers(report):
    code, out, err = report.check("mixtral_of_transformers")[0]
    assert code == 0, out + err


def test_telechat_moe_agrees_with_a_plain_forward(report):
    code, out, err = report.check("telechat_moe")[0]
    assert code == 0, out + err


def test_odd_reference_files_are_typed_errors(report):
    for name, (code, out, err) in report.check("odd_golden_files")[0].items():
        assert code == 4 and err.startswith("checkpoint error") and "fix:" in err and out == "", (name, code, out, err)


def test_odd_arguments_are_refused(report):
    for name, (code, _, err) in report.check("odd_arguments")[0].items():
        assert code == 2 and err.startswith("config error"), (name, code, err)


def test_generate_is_greedy_samples_and_stops(report):
    found = report.check("generation")[0]
    code, out, err = found["greedy"]
    assert (code, out) == (0, found["by_hand"] + "\n"), err
    assert found["stopped"][1] == found["by_hand"][: found["first_end"]] + "\n"
    assert found["damaged"][0] == 3 and "generation_config.json" in found["damaged"][2]
    first, again, other = (line[1] for line in found["sampled"])
    assert first == again != other and first != out
    assert found["top_k_1"][1] == found["top_p_small"][1] == out
    assert found["no_tokenizer"][0] == 3 and "holds no tokenizer" in found["no_tokenizer"][2]
    assert found["empty_prompt"][0] == 3


def test_convert_goes_both_ways(tmp_path, capsys):
    source = GOLDEN / "telechat2_tiny_gqa"
    assert convert(["import", "--hf", str(source), "--output", str(tmp_path / "c")]) == 0
    assert (
        convert(
            ["export", "--checkpoint", str(tmp_path / "c"), "--output", str(tmp_path / "hf"), "--max_shard_size=100KB"]
        )
        == 0
    )
    assert "exported 33 tensors" in capsys.readouterr().out
    assert_same_folder(source, tmp_path / "hf")
    assert convert(["export", "--checkpoint", str(tmp_path / "c"), "--output", str(tmp_path / "hf")]) == 4
    assert convert(["export", "--checkpoint", str(tmp_path / "none"), "--output", str(tmp_path / "x")]) == 4
    assert convert(["import", "--hf", str(tmp_path / "none"), "--output", str(tmp_path / "x")]) == 4
    assert convert(["import", "--hf", str(source)]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("tool", ["convert_checkpoint", "check_logits", "generate"])
def test_the_doors_answer_help(tool):
    done = subprocess.run(
        [sys.executable, f"tools/{tool}.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and f"tools/{tool}.py" in done.stdout


def test_import_writes_over_nothing_unless_it_is_told_to_and_never_over_a_training(tmp_path, capsys):
    from megatron_telechat.checkpoint import CheckpointReader, CheckpointWriter
    from megatron_telechat.checkpoint.lineage import Branch

    output = tmp_path / "c"
    command = ["import", "--output", str(output), "--hf"]
    assert convert([*command, str(GOLDEN / "telechat2_tiny_gqa")]) == 0
    manifest = (output / "iter_0000000" / "manifest.json").read_bytes()
    capsys.readouterr()
    assert convert([*command, str(GOLDEN / "telechat2_tiny_mha")]) == 4
    assert "--overwrite to replace it" in capsys.readouterr().err
    assert (output / "iter_0000000" / "manifest.json").read_bytes() == manifest
    assert convert([*command, str(tmp_path / "none"), "--overwrite"]) == 4
    assert (output / "iter_0000000" / "manifest.json").read_bytes() == manifest, (
        "a new one that fails takes nothing away"
    )
    assert convert([*command, str(GOLDEN / "telechat2_tiny_mha"), "--overwrite"]) == 0
    assert CheckpointReader(output / "iter_0000000", verify=True).manifest.to_bytes() != manifest
    assert sorted(path.name for path in output.iterdir()) == ["iter_0000000", "latest"]
    for step, name in ((0, "first"), (5, "later")):
        with CheckpointWriter(tmp_path / name, step=step, config="", branch=Branch()) as writer:
            writer.add("model/a", (4,), (0,), __import__("torch").zeros(4))
        assert (
            convert(
                ["import", "--overwrite", "--hf", str(GOLDEN / "telechat2_tiny_gqa"), "--output", str(tmp_path / name)]
            )
            == 4
        )
        assert "checkpoints of a training" in capsys.readouterr().err


def test_tools_keep_what_took_work_to_make(tmp_path, capsys):
    from megatron_telechat.cli import build_corpus, merge_data, train_tokenizer
    from tests.data.material import TEXTS, write_dataset, write_jsonl

    text = write_jsonl(tmp_path / "t.jsonl", TEXTS * 4)
    data = write_dataset(tmp_path / "a", 3)
    for tool, arguments, made in (
        (
            train_tokenizer,
            ["--input", str(text), "--vocab-size", "300", "--output", str(tmp_path / "tokenizer.json")],
            "tokenizer.json",
        ),
        (build_corpus, ["--max-mb", "0.05", "--output", str(tmp_path / "corpus")], "corpus/en.jsonl"),
        (merge_data, ["--input", data, "--output-prefix", str(tmp_path / "m")], "m.idx"),
    ):
        assert tool.main(arguments) == 0
        file = tmp_path / made
        before = file.stat().st_mtime_ns
        capsys.readouterr()
        assert tool.main(arguments) == 2 and file.stat().st_mtime_ns == before
        assert f"{file}" in (said := capsys.readouterr().err) and "there already" in said and "--overwrite" in said
        assert tool.main([*arguments, "--overwrite"]) == 0 and file.stat().st_mtime_ns != before

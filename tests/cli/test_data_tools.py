"""tools/build_index.py and tools/show_sample.py, as a person calls them."""

from __future__ import annotations

import re

import pytest

from megatron_telechat.cli import build_index, show_sample
from megatron_telechat.errors import EXIT_CONFIG, EXIT_DATA, EXIT_OK
from tests.data.chat_material import letters_tokenizer, single, write_lines
from tests.data.material import write_dataset


@pytest.fixture
def flags(tmp_path) -> list[str]:
    tokenizer = letters_tokenizer(tmp_path / "tokenizer")
    file = write_lines(tmp_path / "d.jsonl", [single("ab", "c"), single("几?", "d")])
    text = f"""--preset telechat2-tiny --vocab-size 320 --seq-length 18 --global-batch-size 4 --train-iters 50
        --lr-warmup-iters 0 --split 1 --sft --data-path {file} --tokenizer-model {tokenizer}
        --run-dir {tmp_path / "run"}"""
    return text.split()


def test_an_index_built_before_is_the_one_the_run_takes(flags, tmp_path, capsys):
    assert build_index.main(flags) == EXIT_OK
    said = capsys.readouterr().out
    assert "built in" in said and "2 dialogs" in said and "200 samples = 200.00 epochs" in said
    cache = tmp_path / "run" / "cache"
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    assert build_index.main([*flags, "--world-size", "2"]) == EXIT_OK
    assert "there already" in capsys.readouterr().out
    assert show_sample.main(flags) == EXIT_OK
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def test_an_index_of_indexed_text(tmp_path, capsys):
    prefixes = [write_dataset(tmp_path / name, 80, seed) for seed, name in enumerate("ab")]
    text = f"""--preset telechat2-tiny --vocab-size 512 --seq-length 32 --global-batch-size 4 --train-iters 50
        --lr-warmup-iters 0 --data-path 3 {prefixes[0]} 1 {prefixes[1]} --split 1 --run-dir {tmp_path / "run"}"""
    assert build_index.main(text.split()) == EXIT_OK
    said = capsys.readouterr().out
    assert "150 samples" in said and "50 samples" in said and "built in" in said


def test_the_index_of_every_stage_is_built_before_the_run(tmp_path, capsys):
    prefix = write_dataset(tmp_path / "a", 80, 1)
    (tmp_path / "stages.yaml").write_text("stages: [{from_tokens: 0}, {from_samples: 100, seq_length: 64}]")
    text = f"""--preset telechat2-tiny --vocab-size 512 --seq-length 32 --global-batch-size 4 --train-iters 40
        --data-path {prefix} --split 1 --run-dir {tmp_path / "run"} --config {tmp_path / "stages.yaml"}"""
    assert build_index.main(text.split()) == EXIT_OK
    said = capsys.readouterr().out
    first, second = said.split("stage 2 (from 100 samples)")
    assert "for 25 steps: 100 samples" in first and "for 40 steps: 160 samples, 100 of them read by step 25" in second
    assert "tokens that another length left" in second
    folders = sorted(path.name for path in (tmp_path / "run" / "cache").iterdir())
    assert len(folders) == 2
    assert build_index.main(text.split()) == EXIT_OK
    assert capsys.readouterr().out.count("there already") == 2
    assert sorted(path.name for path in (tmp_path / "run" / "cache").iterdir()) == folders
    assert show_sample.main(["--sample", "3", *text.split(), "--tokenizer-type", "NullTokenizer"]) == EXIT_OK
    assert "sample 3 of train: 32 tokens" in capsys.readouterr().out


def test_a_sample_as_a_table(flags, capsys):
    assert show_sample.main(["--sample", "1", *flags, "--reset-attention-mask", "--reset-position-ids"]) == EXIT_OK
    said = capsys.readouterr().out
    assert "sample 1 of train: 18 tokens" in said and "each attends to itself only" in said
    rows = re.findall(r"^ *(\d+) +(\d+|-) +(\d+) +(yes|\.) +'(.*)'$", said, re.M)
    assert [int(row[0]) for row in rows] == list(range(len(rows)))
    for place, _, _, learned, text in rows:
        inside = text in ("<_user>", "<_bot>", "<_end>", "c", "d")
        first = text == "<_user>" and rows[int(place)][1] == "0"
        assert (learned == "yes") == (inside and not first)
    assert said.count("d.jsonl:") == 2 and "── padding" in said and "\033" not in said


def test_a_sample_as_text_in_colour_and_without(flags, capsys):
    assert show_sample.main(["--view", "text", "--sample", "0", *flags]) == EXIT_OK
    plain = capsys.readouterr().out
    assert "几?" in plain and "[[<_bot>" in plain and "\033" not in plain
    assert show_sample.main(["--view", "text", "--color", "always", *flags]) == EXIT_OK
    colour = capsys.readouterr().out
    assert re.search(r"\033\[97;48;5;(28|34)m<_bot>\033\[0m", colour) and not re.search(r"\[97;48;5;(28|34)m\?", colour)
    assert show_sample.main(["--color", "always", "--view", "table", *flags]) == EXIT_OK
    assert "\033[97" in capsys.readouterr().out


@pytest.mark.parametrize(
    "tool,argv,code,message",
    [
        (show_sample, ["--sample", "200"], EXIT_CONFIG, "the run reads 200 samples"),
        (show_sample, ["--of", "valid"], EXIT_CONFIG, "no valid data"),
        (show_sample, ["--sample", "-1"], EXIT_CONFIG, "below 0"),
        (show_sample, ["--tokenizer-model", "none"], EXIT_CONFIG, "for which a tokenizer is needed"),
        (build_index, ["--train-iters", "0"], EXIT_CONFIG, "train_iters is 0"),
        (build_index, ["--seq-length", "1"], EXIT_DATA, "no dialog that can be used"),
    ],
)
def test_mistakes_end_in_one_message(flags, tool, argv, code, message, capsys):
    assert tool.main([*flags, *argv]) == code
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_a_dry_run_counts_the_dialogs(flags, capsys):
    from megatron_telechat.cli import pretrain

    assert pretrain.main([*flags, "--dry-run", "--world-size", "2"]) == EXIT_OK
    said = capsys.readouterr().out
    assert "dialogs" in said and "template telechat2, loss mask telechat" in said


def test_a_mock_stream_has_nothing_to_build_or_to_show(capsys):
    flags = ["--preset", "telechat2-tiny", "--mock-data", "--train-iters", "50"]
    for tool in (build_index, show_sample):
        assert tool.main(flags) == EXIT_CONFIG
        assert "mock_data has no files" in capsys.readouterr().err


def test_help(capsys):
    assert build_index.main(["--help"]) == EXIT_OK
    assert "as rank 0 would at the start" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        show_sample.main(["--help"])
    assert ended.value.code == 0


def test_an_index_of_epochs_gives_the_dry_run_its_steps(flags, tmp_path, capsys):
    from megatron_telechat.cli.dry_run import report
    from megatron_telechat.config import load_run_config

    file = write_lines(tmp_path / "more.jsonl", [single("ab", "c" * (n % 9)) for n in range(40)])
    flags = [*flags, "--train-iters", "0", "--train-epochs", "2", "--data-path", file]

    def described() -> str:
        return report(load_run_config([*flags, "--dry-run"], {}))

    assert "2 epochs: their steps are known once the data is indexed" in described()
    assert build_index.main(flags) == EXIT_OK
    said = capsys.readouterr().out
    steps = int(re.findall(r"for (\d+) steps", said)[0])
    assert steps > 10 and f"{4 * steps} samples" in said
    assert f"  {steps} steps, " in described()
    assert build_index.main(flags) == EXIT_OK and "there already" in capsys.readouterr().out
    flags += ["--lr-warmup-iters", str(steps)]
    assert build_index.main(flags) == EXIT_CONFIG
    assert f"leaves nothing of lr_decay_iters={steps} (= train_iters)" in capsys.readouterr().err

"""Which tokens a sample holds and in what order: Megatron's order, whole epochs, honest ends."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_telechat.config.schema import ModelConfig
from megatron_telechat.data import build_datasets, data_fingerprint, fingerprint_differences
from megatron_telechat.data.blending import _blend_order, samples_of_each
from megatron_telechat.data.indexed.dataset import IndexedDataset
from megatron_telechat.data.samples import TokenDataset
from megatron_telechat.errors import ConfigError, DataError, ResourceError
from tests.data.material import VOCAB, Rank, huggingface_tokenizer, make_run, with_training, write_dataset


def megatrons(run, prefixes, weights, sizes):
    """The datasets megatron-core's own builder makes."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    from megatron_telechat.data.indexed.megatron_order import _IndexTokenizer

    config = GPTDatasetConfig(
        random_seed=run.training.seed,
        sequence_length=run.training.seq_length,
        blend=(list(prefixes), weights),
        split=run.data.split,
        tokenizer=_IndexTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()


@pytest.fixture
def two(tmp_path):
    return write_dataset(tmp_path / "en", 300, 1), write_dataset(tmp_path / "zh", 90, 2)


@pytest.mark.heavy
@pytest.mark.parametrize("weights", [None, [0.7, 0.3], [1.0, 5.0]])
@pytest.mark.parametrize("seed", [1234, 7])
def test_order_of_a_blend_is_megatrons(tmp_path, two, weights, seed):
    path = two if weights is None else tuple(str(x) for pair in zip(weights, two, strict=True) for x in pair)
    run = make_run(tmp_path, data_path=path, eval_interval=10, split="90,10", seed=seed, data_order="megatron")
    ours = build_datasets(run, Rank())
    theirs = megatrons(run, two, weights, [320, 16, 0] if weights else [320, 16, None])
    for mine, other in ((ours.train, theirs[0]), (ours.valid, theirs[1])):
        for i in range(len(mine)):
            sample = mine[i]
            assert torch.equal(sample["tokens"], other[i]["tokens"]) and torch.equal(
                sample["labels"], other[i]["labels"]
            )


def test_order_of_one_dataset_over_several_epochs_is_megatrons(tmp_path, two):
    run = make_run(tmp_path, data_path=two[1:], iters=60, split="90,10", data_order="megatron")
    ours = build_datasets(run, Rank())
    theirs = megatrons(run, two[1:], None, [480, 16, 0])[0]
    assert len(ours.train) == 480 <= len(theirs)
    assert all(torch.equal(ours.train[i]["tokens"], theirs[i]["tokens"]) for i in range(480))


def test_order_where_the_surplus_of_a_blend_begins_another_epoch_is_megatrons(tmp_path):
    twins = write_dataset(tmp_path / "a", 200, 1), write_dataset(tmp_path / "b", 200, 1)
    other = np.fromfile(f"{twins[1]}.bin", np.uint16)
    np.where(other > 2, VOCAB + 2 - other, other).astype(np.uint16).tofile(
        f"{twins[1]}.bin"
    )  # as long, but not the same data
    an_epoch = (IndexedDataset(twins[0]).num_tokens - 1) // 32
    path = ("1", twins[0], "1", twins[1])
    run = make_run(tmp_path, data_path=path, split="1", gbs=2, mbs=1, iters=an_epoch, data_order="megatron")
    ours, theirs = build_datasets(run, Rank()).train, megatrons(run, twins, [1.0, 1.0], [2 * an_epoch, 0, 0])[0]
    assert len(ours) == 2 * an_epoch
    assert all(torch.equal(ours[i]["tokens"], theirs[i]["tokens"]) for i in range(len(ours)))


def test_shapes_and_types(tmp_path, two):
    sample = build_datasets(make_run(tmp_path, data_path=two[:1]), Rank()).train[3]
    assert {k: (tuple(v.shape), v.dtype) for k, v in sample.items()} == {
        "tokens": ((32,), torch.int64),
        "labels": ((32,), torch.int64),
        "loss_mask": ((32,), torch.float32),
        "position_ids": ((32,), torch.int64),
    }
    assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
    assert sample["position_ids"].tolist() == list(range(32)) and sample["loss_mask"].min() == 1


def test_one_epoch_reads_every_token_once(tmp_path):
    prefix = write_dataset(tmp_path / "d", 60)
    tokens = IndexedDataset(prefix).num_tokens
    samples = (tokens - 1) // 32
    run = make_run(tmp_path, data_path=(prefix,), split="1", gbs=1, mbs=1, iters=samples)
    train = build_datasets(run, Rank()).train
    read = torch.cat([train[i]["tokens"] for i in range(samples)])
    there = np.bincount(IndexedDataset(prefix).tokens, minlength=VOCAB)
    once = np.bincount(read.numpy(), minlength=VOCAB)
    assert (once <= there).all() and there.sum() - once.sum() <= 32


def test_weights_decide_the_shares(tmp_path, two):
    run = make_run(tmp_path, data_path=("3", two[0], "1", two[1]), iters=50)
    assert build_datasets(run, Rank()).train.source.drawn() == [300, 100]


def test_data_json_counts_copies(tmp_path, two):
    (tmp_path / "data.json").write_text(json.dumps({two[0]: 1, two[1]: 3}))
    run = make_run(tmp_path, data_json=str(tmp_path / "data.json"), iters=50, split="1")
    drawn = build_datasets(run, Rank()).train.source.drawn()
    sizes = [IndexedDataset(prefix).num_tokens for prefix in two]
    share = sizes[0] / (sizes[0] + 3 * sizes[1])
    assert sum(drawn) == 400 and abs(drawn[0] - 400 * share) <= 1


@pytest.mark.parametrize("size", [1, 7, 100, 999])
def test_a_blend_never_asks_for_more_than_was_built(tmp_path, size):
    rng = np.random.default_rng(size)
    for _ in range(40):
        weights = rng.random(rng.integers(1, 12)) + 1e-3
        source, sample = _blend_order(weights.tolist(), size)
        built = samples_of_each(weights.tolist(), size)
        for number, limit in enumerate(built):
            assert (sample[source == number] < limit).all()


def test_epochs_are_printed(tmp_path, two):
    summary = build_datasets(make_run(tmp_path, data_path=("0.5", two[0], "0.5", two[1])), Rank()).summary
    assert len(summary) == 2 and "300 documents" in summary[0] and "160 samples = " in summary[1]


def test_exhausted_data_says_what_is_there_and_what_is_needed(tmp_path, two):
    with pytest.raises(
        DataError,
        match=r"ends before the run: [\d,]+ samples \([\d,]+ tokens\) are there, 8,000 samples \(256,000 tokens\)",
    ):
        build_datasets(make_run(tmp_path, data_path=two, iters=1000), Rank())


def test_an_empty_share_is_refused_and_not_looped_over(tmp_path):
    prefix = write_dataset(tmp_path / "d", 5)
    with pytest.raises(DataError, match="valid split.*holds 0 sequences"):
        build_datasets(make_run(tmp_path, data_path=(prefix,), eval_interval=5), Rank())
    assert build_datasets(make_run(tmp_path, data_path=(prefix,)), Rank()).valid is None


def test_a_dataset_without_tokens_is_refused(tmp_path):
    prefix = write_dataset(tmp_path / "d", 0)
    with pytest.raises(DataError, match="0 tokens"):
        build_datasets(make_run(tmp_path, data_path=(prefix,)), Rank())


def test_own_validation_data(tmp_path, two):
    run = make_run(tmp_path, train_data_path=two[:1], valid_data_path=two[1:], eval_interval=10)
    datasets = build_datasets(run, Rank())
    assert len(datasets.valid) == 16 and datasets.test is None
    with pytest.raises(ConfigError, match="no data for valid"):
        build_datasets(make_run(tmp_path, train_data_path=two[:1], eval_interval=10), Rank())


def test_all_missing_and_damaged_files_are_told_together(tmp_path, two):
    path = Path(two[1] + ".bin")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="2 problems") as caught:
        build_datasets(make_run(tmp_path, data_path=("1", str(tmp_path / "nowhere"), "1", two[1])), Rank())
    assert "nowhere.idx does not exist" in caught.value.render() and "zh.bin" in caught.value.render()


def test_tokens_outside_the_vocabulary_name_file_and_document(tmp_path, two):
    run = make_run(tmp_path, data_path=two[:1])
    small = replace(run, model=ModelConfig(vocab_size=400))
    with pytest.raises(DataError, match=r"token id \d+ is outside the model's vocabulary of 400.*en.bin, document \d+"):
        build_datasets(small, Rank())


def test_the_loader_checks_what_the_start_did_not_sample(tmp_path, two):
    data = build_datasets(make_run(tmp_path, data_path=two[:1]), Rank()).train
    narrow = TokenDataset(data.source, len(data), 200)
    sample = next(i for i in range(len(data)) if int(data[i]["tokens"].max()) >= 200)
    with pytest.raises(DataError, match="en.bin, document") as caught:
        narrow[sample]
    token = int(caught.value.problems[0].what.split()[2])
    document = int(caught.value.problems[0].where.rsplit(" ", 1)[1])
    assert token in IndexedDataset(two[0])[document]


def _slow_positions(tokens, eod):
    positions, at = [], 0
    for token in tokens:
        positions.append(at)
        at = 0 if token == eod else at + 1
    return positions


def test_end_of_document_options(tmp_path, two):
    folder = huggingface_tokenizer(tmp_path / "tok").parent
    options = {"eod_mask_loss": True, "reset_position_ids": True, "tokenizer_model": str(folder)}
    train = build_datasets(make_run(tmp_path, data_path=two[:1], seq_length=256, **options), Rank()).train
    for i in range(8):
        sample = train[i]
        tokens = sample["tokens"].tolist()
        assert 2 in tokens
        assert sample["position_ids"].tolist() == _slow_positions(tokens, 2)
        assert sample["loss_mask"].tolist() == [0.0 if token == 2 else 1.0 for token in tokens]
    with pytest.raises(ConfigError, match="eod_mask_loss"):
        build_datasets(make_run(tmp_path, data_path=two[:1], eod_mask_loss=True), Rank())


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, two):
    folder = huggingface_tokenizer(tmp_path / "tok").parent
    run = replace(make_run(tmp_path, data_path=two[:1], tokenizer_model=str(folder)), model=ModelConfig(vocab_size=100))
    with pytest.raises(ConfigError, match="320 ids, the model 100 rows"):
        build_datasets(run, Rank())


def test_mock_data_is_fixed_and_can_be_learned(tmp_path):
    run = make_run(tmp_path, mock_data=True, seq_length=512, eval_interval=5)
    one, two = build_datasets(run, Rank()), build_datasets(run, Rank(rank=3))
    assert len(one.train) == 320 and len(one.valid) == 16
    assert torch.equal(one.train[5]["tokens"], two.train[5]["tokens"])
    assert not torch.equal(one.train[5]["tokens"], one.valid[5]["tokens"])
    assert not torch.equal(
        one.train[5]["tokens"], build_datasets(with_training(run, seed=2), Rank()).train[5]["tokens"]
    )
    step = (one.train[0]["labels"] - one.train[0]["tokens"]) % VOCAB
    assert 0.6 < float((step == 17).float().mean()) < 0.9
    tokens = torch.cat([one.train[i]["tokens"] for i in range(20)])
    assert int(tokens.min()) >= 0 and int(tokens.max()) < VOCAB


def test_the_index_is_built_once_and_again_when_the_files_change(tmp_path, two):
    run = make_run(tmp_path, data_path=two[:1])
    before = build_datasets(run, Rank()).train[0]["tokens"]
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    build_datasets(run, Rank())
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == files
    write_dataset(tmp_path / "en", 200, 9)
    after = build_datasets(run, Rank()).train[0]["tokens"]
    assert not torch.equal(before, after) and len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.heavy
def test_an_interrupted_build_leaves_nothing_that_is_believed(tmp_path, two, monkeypatch):
    from megatron_telechat.data import pieces

    run = make_run(tmp_path, data_path=("1", two[0], "2", two[1]), eval_interval=5)
    done = []

    def interrupted(source, target):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(target.name)
        rename(source, target)

    rename = pieces.os.rename
    with monkeypatch.context() as patch:
        patch.setattr(pieces.os, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_datasets(run, Rank())
    (folder,) = (tmp_path / "cache").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == sorted(done)
    # What a killed build leaves is not taken for a piece.
    (folder / "train-1-epochs-0-99.partial-1-abc").mkdir()
    found = build_datasets(run, Rank()).train
    shutil.rmtree(tmp_path / "cache")
    again = build_datasets(run, Rank()).train
    assert all(torch.equal(found[i]["tokens"], again[i]["tokens"]) for i in range(len(found)))


def test_a_cache_that_cannot_be_written_is_a_resource_error(tmp_path, two):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(ResourceError, match="sample index"):
        build_datasets(make_run(tmp_path, data_path=two[:1]), Rank())


def test_fingerprint_follows_the_content_and_names_what_differs(tmp_path, two):
    run = make_run(tmp_path, data_path=("0.5", two[0], "0.5", two[1]))
    saved = json.loads(json.dumps(data_fingerprint(run)))
    assert fingerprint_differences(saved, json.loads(json.dumps(data_fingerprint(run)))) == []
    for suffix in (".bin", ".idx"):
        shutil.copy(two[0] + suffix, tmp_path / f"moved{suffix}")
    moved = make_run(tmp_path, data_path=("0.5", str(tmp_path / "moved"), "0.5", two[1]))
    assert fingerprint_differences(saved, data_fingerprint(moved)) == []
    write_dataset(tmp_path / "zh", 91, 5)
    lines = fingerprint_differences(saved, data_fingerprint(run))
    assert any(
        "blends.train.sources[1].documents: the checkpoint was trained with 90, the run has 91" in line
        for line in lines
    )
    assert fingerprint_differences(saved, data_fingerprint(with_training(run, seed=5)))

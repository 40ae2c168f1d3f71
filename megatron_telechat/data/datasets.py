"""From the data section of a run to its train, validation and test samples."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Protocol

import numpy as np

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.data.blend import SPLITS, Blend, data_plan
from megatron_telechat.data.indexed import IndexedDataset
from megatron_telechat.data.rank_zero import WordOfRankZero
from megatron_telechat.data.samples import (
    BlendedSamples,
    IndexedSamples,
    MockSamples,
    SampleSource,
    TokenDataset,
    samples_of_each,
    share_of,
)
from megatron_telechat.data.tokenizers import build_tokenizer
from megatron_telechat.errors import ConfigError, DataError, ResourceError

# A number that takes part in the name of a cached index: raise it when the same inputs give another order.
_INDEX_FORMAT = 1
_SAMPLED_TOKENS = 1 << 20


class Ranks(Protocol):
    """What this room asks of the parallel state. ``dp_rank`` and ``dp_size`` leave context parallelism out."""

    rank: int
    dp_rank: int
    dp_size: int


@dataclass(frozen=True)
class Datasets:
    """The samples of a run; None where a split is not used or holds nothing.

    ``valid`` and ``test`` hold exactly the samples of one evaluation: start ``batches`` at 0 each time, so that
    every evaluation sees the same samples. ``train`` holds the samples of the whole run (train_iters steps).
    """

    train: TokenDataset
    valid: Optional[TokenDataset]
    test: Optional[TokenDataset]
    summary: tuple[str, ...]
    """Lines for the banner: documents, tokens and epochs of each source."""


def samples_needed(run: RunConfig) -> tuple[int, int, int]:
    """Samples of the whole run for train, and of one evaluation for valid and test (0: not used)."""
    batch = run.training.global_batch_size
    evaluation = run.evaluation.eval_iters * batch if run.evaluation.eval_interval else 0
    return max(1, run.training.train_iters) * batch, evaluation, evaluation


def build_datasets(run: RunConfig, state: Ranks) -> Datasets:
    """The datasets of a run; called by all ranks.

    Rank 0 builds the index into the cache, the others wait for it and read it. The order depends on the files,
    the seed, the sequence length and the number of samples of the run: not on the layout.

    Raises:
        ConfigError: the data section contradicts itself or the model.
        DataError: a file is missing or damaged, or the data does not last for the run.
        ResourceError: the cache cannot be written, or rank 0 did not finish in time.
    """
    if run.data.mock_data:
        return _mock_datasets(run)
    word = WordOfRankZero(run.data.data_index_timeout_minutes * 60)
    try:
        eod = _end_of_document(run)
        opened = _open_sources(run)
        names = _used_splits(run, opened)
        key = _index_key(run, opened, names)
        final = _cache_root(run) / key
        if word.first:
            _build_index(run, opened, names, final)
    except BaseException as error:
        if word.first:
            word.say(f"error: {error}")
        raise
    if word.first:
        word.say(key)
    else:
        word.hear(key)
    sources, summary = _sources(run, opened, names, final)
    sizes = dict(zip(SPLITS, samples_needed(run)))
    options = (run.model.vocab_size, eod, run.data.eod_mask_loss, run.data.reset_position_ids)
    datasets = {name: TokenDataset(source, sizes[name], *options) for name, source in sources.items()}
    return Datasets(datasets["train"], datasets.get("valid"), datasets.get("test"), tuple(summary))


def _mock_datasets(run: RunConfig) -> Datasets:
    if run.data.eod_mask_loss or run.data.reset_position_ids:
        raise ConfigError("mock_data has no documents: eod_mask_loss and reset_position_ids mean nothing with it",
                          "mock_data", "drop these options, or give real data")
    made = [
        TokenDataset(
            MockSamples(size, run.training.seq_length, run.model.vocab_size, run.training.seed, number),
            size,
            run.model.vocab_size,
        ) if size else None
        for number, size in enumerate(samples_needed(run))
    ]
    summary = f"mock data: {len(made[0]):,} training samples of {run.training.seq_length:,} tokens"
    return Datasets(*made, (summary,))


def _end_of_document(run: RunConfig) -> Optional[int]:
    wanted = [name for name in ("eod_mask_loss", "reset_position_ids") if getattr(run.data, name)]
    if run.data.tokenizer_model is None and run.data.tokenizer_type is None:
        if wanted:
            raise ConfigError(f"{' and '.join(wanted)} need the end-of-document id", wanted[0], "give --tokenizer-model")
        return None
    tokenizer = build_tokenizer(run.data.tokenizer_type, run.data.tokenizer_model, vocab_size=run.model.vocab_size)
    if tokenizer.vocab_size > run.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size:,} ids, the model {run.model.vocab_size:,} rows",
            "tokenizer_model",
            f"--vocab-size {tokenizer.vocab_size} (or more), or the model's own tokenizer",
        )
    if wanted and tokenizer.eod is None:
        raise ConfigError(f"{' and '.join(wanted)} need an end-of-document token and the tokenizer has none",
                          "tokenizer_model", "use a tokenizer with <_end>, </s> or <|endoftext|>")
    return tokenizer.eod


def _open_sources(run: RunConfig) -> dict[str, IndexedDataset]:
    """Every dataset the run names, once. All complaints are raised together."""
    prefixes = dict.fromkeys(prefix for blend in data_plan(run.data).blends if blend for prefix in blend.prefixes)
    opened, problems = {}, []
    for prefix in prefixes:
        try:
            opened[prefix] = dataset = IndexedDataset(prefix)
            _check_vocabulary(dataset, run.model.vocab_size)
        except DataError as error:
            problems.extend(error.problems)
    if problems:
        raise DataError(problems)
    return opened


def _check_vocabulary(dataset: IndexedDataset, vocab_size: int) -> None:
    """The first and last million tokens: a dataset of another tokenizer is told before the first step."""
    for begin in (0, max(0, dataset.num_tokens - _SAMPLED_TOKENS)):
        part = dataset.tokens[begin : begin + _SAMPLED_TOKENS]
        if not part.size or (int(part.max()) < vocab_size and int(part.min()) >= 0):
            continue
        place = begin + int(np.flatnonzero((part >= vocab_size) | (part < 0))[0])
        sequence = int(np.searchsorted(dataset.sequence_offsets, place * dataset.dtype.itemsize, side="right")) - 1
        raise DataError(
            f"token id {int(dataset.tokens[place])} is outside the model's vocabulary of {vocab_size:,}",
            f"{dataset.bin_path}, document {dataset.document_of(sequence)}",
            "preprocess the text with the model's own tokenizer, or correct --vocab-size",
        )


def _used_splits(run: RunConfig, opened: dict[str, IndexedDataset]) -> tuple[str, ...]:
    """The splits to build: those with samples to give and a share that holds tokens."""
    plan = data_plan(run.data)
    used = []
    for name, blend, share, needed in zip(SPLITS, plan.blends, plan.shares, samples_needed(run)):
        if not needed:
            continue
        if blend is None:
            if name == "test":
                continue
            raise ConfigError(
                f"no data for {name}" + ("" if name == "train" else f", but eval_interval={run.evaluation.eval_interval}"),
                "train_data_path" if run.data.train_data_path else "split",
                "give --valid-data-path, a share in --split, or drop --eval-interval",
            )
        empty = [p for p in blend.prefixes if not _tokens_of(opened[p], share)]
        if empty and name == "test":
            continue  # a share of 1 in 1000 of a small dataset; nothing in the training needs it
        used.append(name)
    return tuple(used)


def _tokens_of(dataset: IndexedDataset, share: tuple[float, float]) -> int:
    sequences = share_of(dataset, share)
    return int(dataset.sequence_lengths[sequences.start : sequences.stop].sum(dtype=np.int64))


def _cache_root(run: RunConfig) -> Path:
    if run.data.data_cache_path:
        return Path(run.data.data_cache_path)
    return Path(run.logging.run_dir or f"runs/{run.model.name}") / "cache"


def _index_key(run: RunConfig, opened: dict[str, IndexedDataset], names: tuple[str, ...]) -> str:
    """Names the index by everything that decides it, the files' contents included."""
    plan = data_plan(run.data)
    parts = {
        "format": _INDEX_FORMAT,
        "blends": [(b.prefixes, b.weights, b.per_token) if b else None for b in plan.blends],
        "shares": plan.shares,
        "files": {prefix: dataset.fingerprint() for prefix, dataset in opened.items()},
        "seed": run.training.seed,
        "sequence_length": run.training.seq_length,
        "samples": dict(zip(SPLITS, samples_needed(run))),
        "splits": names,
    }
    return "index-" + hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def _build_index(run: RunConfig, opened: dict[str, IndexedDataset], names: tuple[str, ...], final: Path) -> None:
    """Build the index in a folder beside ``final`` and rename it: a folder under that name is whole."""
    if final.is_dir():
        return
    for dataset in opened.values():
        dataset.verify()
    partial = final.with_name(f"{final.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        _sources(run, opened, names, partial)
        os.rename(partial, final)
    except OSError as error:
        if final.is_dir():
            return  # another run with the same data was faster
        raise ResourceError(f"cannot write the sample index: {error}", str(final.parent),
                            "give --data-cache-path a folder with space that all nodes share") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sources(
    run: RunConfig, opened: dict[str, IndexedDataset], names: tuple[str, ...], cache: Path
) -> tuple[dict[str, SampleSource], list[str]]:
    plan = data_plan(run.data)
    sources, summary = {}, []
    for name, blend, share, needed in zip(SPLITS, plan.blends, plan.shares, samples_needed(run)):
        if name not in names:
            continue
        try:
            sources[name], lines = _split_source(run, opened, name, blend, share, needed, cache)
        except FileNotFoundError as error:
            raise DataError(
                f"the sample index that rank 0 wrote is not to be seen here: {error.filename}",
                fix="give --data-cache-path a folder that all nodes share",
            ) from error
        summary.extend(lines)
    return sources, summary


def _split_source(
    run: RunConfig,
    opened: dict[str, IndexedDataset],
    name: str,
    blend: Blend,
    share: tuple[float, float],
    needed: int,
    cache: Path,
) -> tuple[SampleSource, list[str]]:
    weights = blend.weights
    if weights is not None and blend.per_token:
        weights = tuple(w * _tokens_of(opened[p], share) for w, p in zip(weights, blend.prefixes))
    single = len(blend.prefixes) == 1
    if weights is None:
        sizes = [needed if single else None] * len(blend.prefixes)
    else:
        sizes = samples_of_each(weights, needed)
    parts = [
        IndexedSamples(opened[p], share, size, name, run.training.seq_length, run.training.seed, cache)
        for p, size in zip(blend.prefixes, sizes)
    ]
    if single and weights is None:
        return parts[0], [_source_line(name, parts[0], needed)]
    if weights is None:
        weights = tuple(float(len(part)) for part in parts)
        _check_enough(run, name, parts, needed)
    source = BlendedSamples(parts, weights, needed, cache, name)
    return source, [_source_line(name, part, drawn) for part, drawn in zip(parts, source.drawn())]


def _check_enough(run: RunConfig, name: str, parts: list[IndexedSamples], needed: int) -> None:
    """Prefixes without weights are read once (Megatron's rule): the run must not outlast them."""
    there = sum(len(part) for part in parts)
    if there >= needed:
        return
    length = run.training.seq_length
    tokens = sum(part.tokens_per_epoch for part in parts)
    raise DataError(
        f"the {name} data ends before the run: {there:,} samples ({tokens:,} tokens) are there, "
        f"{needed:,} samples ({needed * length:,} tokens) are needed",
        "prefixes without weights are read once",
        "give weights (0.7 en 0.3 zh) to read them more than once, add data, or lower --train-iters or --eval-iters",
    )


def _source_line(name: str, part: IndexedSamples, drawn: int) -> str:
    epochs = drawn * part.sequence_length / part.tokens_per_epoch
    return (
        f"{name}: {part.dataset.prefix}  {part.dataset.documents:,} documents  {part.tokens_per_epoch:,} tokens in the split"
        f"  {drawn:,} samples = {epochs:.2f} epochs"
    )


def data_fingerprint(run: RunConfig) -> dict:
    """What the samples of a run are made of, for its checkpoints: sources by size and digest, not by path.

    Raises:
        DataError: a file is missing or damaged.
    """
    order = {"seed": run.training.seed, "sequence_length": run.training.seq_length}
    if run.data.mock_data:
        return {"kind": "mock", "vocab_size": run.model.vocab_size, **order}
    opened = _open_sources(run)
    plan = data_plan(run.data)
    blends = {
        name: {
            "share": list(share),
            "weights": list(blend.weights) if blend.weights else None,
            "sources": [{"name": Path(p).name, **opened[p].fingerprint()} for p in blend.prefixes],
        }
        for name, blend, share in zip(SPLITS, plan.blends, plan.shares)
        if blend
    }
    return {"kind": "indexed", **order, "blends": blends}


def fingerprint_differences(saved: dict, now: dict, at: str = "") -> list[str]:
    """What differs between two fingerprints, one line each; names of files are not compared."""
    if isinstance(saved, dict) and isinstance(now, dict):
        keys = [key for key in {**saved, **now} if key != "name"]
        return [line for key in keys for line in fingerprint_differences(saved.get(key), now.get(key), f"{at}.{key}".strip("."))]
    if isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        return [line for n, (a, b) in enumerate(zip(saved, now)) for line in fingerprint_differences(a, b, f"{at}[{n}]")]
    return [] if saved == now else [f"{at}: the checkpoint was trained with {saved}, the run has {now}"]

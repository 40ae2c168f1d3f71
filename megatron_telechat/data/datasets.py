"""From the data section of a run to its train, validation and test samples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.data.blend import SPLITS, DataPlan, data_plan
from megatron_telechat.data.corpus import EncodingFactory, PairCorpus, SampleSource
from megatron_telechat.data.formats import corpus_factory
from megatron_telechat.data.mock import MockSamples
from megatron_telechat.data.order import MEGATRON, Progress, SampleOrder, order_of, samples_needed
from megatron_telechat.data.pieces import IndexFolder, Say, quiet, remove_leftovers
from megatron_telechat.data.samples import TokenDataset
from megatron_telechat.data.sources import (
    Opened,
    build_index,
    index_key,
    open_encoded,
    open_folders,
    open_sources,
    split_sources,
)
from megatron_telechat.data.tokenizers import build_tokenizer
from megatron_telechat.errors import ConfigError
from megatron_telechat.parallel.rank_zero import WordOfRankZero

SEQUENCE_LENGTH = "sequence_length"
"""Of the length of a sample, in a fingerprint."""
# Options that need to know where documents end.
_BORDER_OPTIONS = ("eod_mask_loss", "reset_position_ids", "reset_attention_mask")


class Ranks(Protocol):
    """What this room asks of the parallel state. ``dp_rank`` and ``dp_size`` leave context parallelism out."""

    @property
    def rank(self) -> int:
        """Number of this process among all of the run."""
        ...

    @property
    def dp_rank(self) -> int:
        """Which micro-batches of a global batch this rank reads (`loader.micro_batch_samples`)."""
        ...

    @property
    def dp_size(self) -> int:
        """Number of ranks that read different ones."""
        ...

    @property
    def cp_rank(self) -> int:
        """Which tokens of a sample this rank takes (`parallel.context`)."""
        ...


@dataclass(frozen=True)
class Datasets:
    """The samples of a run; None where a split is not used or holds nothing.

    ``valid`` and ``test`` hold exactly the samples of one evaluation: start ``batches`` at 0 each time, so that
    every evaluation sees the same samples. ``train`` holds the samples of the whole run, those read before a resume
    included.
    """

    train: TokenDataset
    valid: TokenDataset | None
    test: TokenDataset | None
    summary: tuple[str, ...]
    """Lines for the banner: documents, tokens and epochs of each source."""
    order: SampleOrder
    """The order the samples are read in, for the checkpoints of the run."""


@dataclass(frozen=True)
class PreparedIndex:
    """The index of a run.

    Attributes:
        plan: what the run reads.
        folder: where it lies, named after all that decides it.
        built: whether some of it was made now; False where all was there.
        opened: the datasets of the run by the names it gives them.
    """

    plan: DataPlan
    folder: Path
    built: bool
    opened: Opened


def prepare_index(
    run: RunConfig, say: Say = quiet, progress: Progress = Progress(), plan: DataPlan | None = None
) -> PreparedIndex:
    """Build what the cache lacks of the index of a run; by one process alone.

    Args:
        say: told what is under way.
        progress: how far the run has read.
        plan: ``data_plan(run.data)``, where the caller has it already.

    Raises:
        ConfigError, DataError, ResourceError: as ``build_datasets``.
    """
    plan = plan or data_plan(run.data)
    _end_of_document(run, plan)
    remove_leftovers(run.cache_dir)
    opened = open_sources(run, plan, say)
    folder = run.cache_dir / index_key(run, plan, opened, progress)
    return PreparedIndex(plan, folder, build_index(run, plan, opened, folder, say, progress), opened)


def open_together(run: RunConfig, plan: DataPlan) -> Opened:
    """The datasets of a run whose files are encoded, by the names it gives them, without an index; called by all ranks.

    Rank 0 encodes what is not yet, the others wait for it.

    Raises:
        DataError: a file is missing or damaged.
        ResourceError: the cache cannot be written, or rank 0 did not finish in time.
    """
    word = WordOfRankZero(run.data.data_index_timeout_minutes * 60)
    if not word.first:
        return open_folders(run, plan, json.loads(word.hear()))
    try:
        opened = open_sources(run, plan, word.progress)
    except BaseException as error:
        word.say_failed(error)
        raise
    word.say(json.dumps({name: corpus.content_key() for name, corpus in opened.items()}))
    return opened


def build_datasets(
    run: RunConfig,
    state: Ranks,
    progress: Progress = Progress(),
    plan: DataPlan | None = None,
    references: Mapping[str, np.ndarray] | None = None,
) -> Datasets:
    """The datasets of a run; called by all ranks.

    Rank 0 builds the index into the cache (and encodes files of dialogs), the others wait for it and read it. The order
    depends on the files, the blend, the seed and the sequence length (and what was read in others before): not on the
    layout, and not on the length of the run.

    Args:
        progress: how far the run has read, and in which order it began.
        plan: ``data_plan(run.data)``, where the caller has it already.
        references: of datasets of pairs, the log-probabilities of their answers under the reference; unset: NaN.

    Raises:
        ConfigError: the data section contradicts itself or the model.
        DataError: a file is missing or damaged, or the data does not last for the run.
        ResourceError: the cache cannot be written, or rank 0 did not finish in time.
    """
    if run.data.mock_data:
        return _mock_datasets(run, progress)
    word = WordOfRankZero(run.data.data_index_timeout_minutes * 60)
    try:
        plan = plan or data_plan(run.data)
        eod = _end_of_document(run, plan)
        index = (
            prepare_index(run, word.progress, progress, plan)
            if word.first
            else _index_of_rank_0(run, plan, word, progress)
        )
    except BaseException as error:
        if word.first:
            word.say_failed(error)
        raise
    if word.first:
        word.say(index.folder.name)
    elif not isinstance(corpus_factory(plan.format), EncodingFactory):
        word.hear(index.folder.name)
    for name, table in (references or {}).items():
        cast(PairCorpus, index.opened[name]).use_reference(table)
    sources, summary = read_sources(run, index, progress)
    sizes = dict(zip(SPLITS, samples_needed(run, progress), strict=True))

    def dataset(split: str) -> TokenDataset | None:
        if split not in sources:
            return None
        borders = {name: getattr(run.data, name) for name in _BORDER_OPTIONS}
        return TokenDataset(
            sources[split], sizes[split], run.model.vocab_size, eod, tell_padding=run.routers_read_masks, **borders
        )

    train = dataset("train")
    assert train is not None, "every run needs samples to train on"
    return Datasets(train, dataset("valid"), dataset("test"), tuple(summary), order_of(run, progress))


def _index_of_rank_0(run: RunConfig, plan: DataPlan, word: WordOfRankZero, progress: Progress) -> PreparedIndex:
    """The index as the other ranks open it. What was encoded is named after its bytes, which one rank reads, not all;
    else each rank looks at the files and knows the name."""
    if isinstance(corpus_factory(plan.format), EncodingFactory):
        folder = run.cache_dir / word.hear()
        return PreparedIndex(plan, folder, False, open_encoded(run, plan, folder))
    opened = open_sources(run, plan)
    return PreparedIndex(plan, run.cache_dir / index_key(run, plan, opened, progress), False, opened)


def read_sources(
    run: RunConfig, index: PreparedIndex, progress: Progress = Progress()
) -> tuple[dict[str, SampleSource], list[str]]:
    """The sources of the splits out of an index that is built, and the lines of the banner about them."""
    sources, summary = split_sources(run, index.plan, index.opened, IndexFolder(index.folder), progress)
    order = order_of(run, progress)
    if order.kind == MEGATRON:
        numbers = ", ".join(f"{number:,} of {split}" for split, number in order.built_for.items())
        summary.append(f"order: Megatron's for {numbers} samples; later epochs are each shuffled on their own")
    return sources, summary


def _mock_datasets(run: RunConfig, progress: Progress) -> Datasets:
    wanted = [name for name in _BORDER_OPTIONS if getattr(run.data, name)]
    if wanted:
        raise ConfigError(
            f"mock_data has no documents: {' and '.join(wanted)} mean nothing with it",
            "mock_data",
            "drop these options, or give real data",
        )
    vocab_size, length = run.model.vocab_size, run.training.seq_length

    def stream(number: int, size: int) -> TokenDataset:
        return TokenDataset(MockSamples(size, length, vocab_size, run.training.seed, number), size, vocab_size)

    train, valid, test = samples_needed(run, progress)
    order = order_of(run, progress)
    of_this_length = train - (order.legs[-1].begin if order.legs else 0)
    return Datasets(
        stream(0, train),
        stream(1, valid) if valid else None,
        stream(2, test) if test else None,
        (f"mock data: {of_this_length:,} training samples of {length:,} tokens",),
        order,
    )


def _end_of_document(run: RunConfig, plan: DataPlan) -> int | None:
    """The id that ends a document, where there is a tokenizer; samples that mark their borders need none."""
    wanted = [] if plan.format.marks_tokens else [name for name in _BORDER_OPTIONS if getattr(run.data, name)]
    if run.data.tokenizer_model is None and run.data.tokenizer_type is None:
        if wanted:
            raise ConfigError(
                f"{' and '.join(wanted)} need the end-of-document id", wanted[0], "give --tokenizer-model"
            )
        return None
    tokenizer = build_tokenizer(run.data.tokenizer_type, run.data.tokenizer_model, vocab_size=run.model.vocab_size)
    if tokenizer.vocab_size > run.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size:,} ids, the model {run.model.vocab_size:,} rows",
            "tokenizer_model",
            f"--vocab-size {tokenizer.vocab_size} (or more), or the model's own tokenizer",
        )
    if wanted and tokenizer.eod is None:
        raise ConfigError(
            f"{' and '.join(wanted)} need an end-of-document token and the tokenizer has none",
            "tokenizer_model",
            "use a tokenizer with <_end>, </s> or <|endoftext|>",
        )
    return tokenizer.eod


def data_fingerprint(run: RunConfig, plan: DataPlan | None = None) -> dict[str, Any]:
    """What the samples of a run are made of, for its checkpoints: sources by size and digest, not by path.

    Args:
        plan: ``data_plan(run.data)``, where the caller has it already.

    Raises:
        DataError: a file is missing or damaged.
    """
    order = {"seed": run.training.seed, SEQUENCE_LENGTH: run.training.seq_length}
    if run.data.mock_data:
        return {"kind": "mock", "vocab_size": run.model.vocab_size, **order}
    plan = plan or data_plan(run.data)
    factory = corpus_factory(plan.format)
    if isinstance(factory, EncodingFactory):
        about = {name: factory.file_fingerprint(name) for name in plan.names}
    else:
        about = {name: corpus.fingerprint() for name, corpus in open_sources(run, plan).items()}
    blends = {
        split.name: {
            "share": list(split.share),
            "weights": list(split.blend.weights) if split.blend.weights else None,
            "sources": [{"name": Path(prefix).name, **about[prefix]} for prefix in split.blend.prefixes],
        }
        for split in plan.splits.values()
    }
    return {"kind": factory.kind, **order, **factory.settings(run), "blends": blends}


def fingerprint_differences(saved: Any, now: Any, at: str = "") -> list[str]:
    """What differs between two fingerprints, one line each; names of files are not compared."""
    if isinstance(saved, dict) and isinstance(now, dict):
        keys = [key for key in {**saved, **now} if key != "name"]
        return [
            line
            for key in keys
            for line in fingerprint_differences(saved.get(key), now.get(key), f"{at}.{key}".strip("."))
        ]
    if isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        return [
            line
            for n, (a, b) in enumerate(zip(saved, now, strict=True))
            for line in fingerprint_differences(a, b, f"{at}[{n}]")
        ]
    return [] if saved == now else [f"{at}: the checkpoint was trained with {saved}, the run has {now}"]

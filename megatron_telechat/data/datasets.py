"""From the data section of a run to its train, validation and test samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.data.blend import SPLITS, data_plan
from megatron_telechat.data.chat.files import encoding_of, file_digest
from megatron_telechat.data.order import MEGATRON, Progress, SampleOrder, order_of, samples_needed
from megatron_telechat.data.pieces import IndexFolder, Say, quiet
from megatron_telechat.data.samples import MockSamples, SampleSource, TokenDataset
from megatron_telechat.data.sources import (
    Opened,
    build_index,
    cache_root,
    index_key,
    open_encoded,
    open_sources,
    split_sources,
    used_splits,
)
from megatron_telechat.data.tokenizers import build_tokenizer
from megatron_telechat.errors import ConfigError
from megatron_telechat.parallel.rank_zero import WordOfRankZero

__all__ = [
    *("Datasets", "PreparedIndex", "Ranks", "build_datasets", "data_fingerprint", "fingerprint_differences"),
    *("prepare_index", "read_sources", "samples_needed"),
]

# Options that need to know where documents end.
_BORDER_OPTIONS = ("eod_mask_loss", "reset_position_ids", "reset_attention_mask")


class Ranks(Protocol):
    """What this room asks of the parallel state. ``dp_rank`` and ``dp_size`` leave context parallelism out."""

    rank: int
    dp_rank: int
    dp_size: int


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
        folder: where it lies, named after all that decides it.
        built: whether some of it was made now; False where all was there.
        opened: the datasets of the run by prefix or path.
    """

    folder: Path
    built: bool
    opened: Opened


def prepare_index(run: RunConfig, say: Say = quiet, progress: Progress = Progress()) -> PreparedIndex:
    """Build what the cache lacks of the index of a run; by one process alone.

    Args:
        say: told what is under way.
        progress: how far the run has read.

    Raises:
        ConfigError, DataError, ResourceError: as ``build_datasets``.
    """
    _end_of_document(run)
    opened = open_sources(run, say)
    names = used_splits(run, opened)
    folder = cache_root(run) / index_key(run, opened)
    return PreparedIndex(folder, build_index(run, opened, names, folder, say, progress), opened)


def build_datasets(run: RunConfig, state: Ranks, progress: Progress = Progress()) -> Datasets:
    """The datasets of a run; called by all ranks.

    Rank 0 builds the index into the cache (and encodes files of dialogs), the others wait for it and read it. The order
    depends on the files, the blend, the seed and the sequence length: not on the layout, and not on the length of the
    run.

    Args:
        progress: how far the run has read, and in which order it began.

    Raises:
        ConfigError: the data section contradicts itself or the model.
        DataError: a file is missing or damaged, or the data does not last for the run.
        ResourceError: the cache cannot be written, or rank 0 did not finish in time.
    """
    if run.data.mock_data:
        return _mock_datasets(run, progress)
    word = WordOfRankZero(run.data.data_index_timeout_minutes * 60)
    try:
        eod = _end_of_document(run)
        if word.first:
            index = prepare_index(run, word.progress, progress)
        elif run.data.sft:
            # The encoded text is named after its bytes; one rank reads them, not all.
            folder = cache_root(run) / word.hear()
            index = PreparedIndex(folder, False, open_encoded(run, folder))
        else:
            opened = open_sources(run)
            index = PreparedIndex(cache_root(run) / index_key(run, opened), False, opened)
    except BaseException as error:
        if word.first:
            word.say_failed(error)
        raise
    if word.first:
        word.say(index.folder.name)
    elif not run.data.sft:
        word.hear(index.folder.name)
    sources, summary = read_sources(run, index, progress)
    sizes = dict(zip(SPLITS, samples_needed(run, progress), strict=True))
    borders = (getattr(run.data, name) for name in _BORDER_OPTIONS)
    options = (run.model.vocab_size, eod, *borders, run.routers_read_masks)
    datasets = {name: TokenDataset(source, sizes[name], *options) for name, source in sources.items()}
    return Datasets(
        datasets["train"], datasets.get("valid"), datasets.get("test"), tuple(summary), order_of(run, progress)
    )


def read_sources(
    run: RunConfig, index: PreparedIndex, progress: Progress = Progress()
) -> tuple[dict[str, SampleSource], list[str]]:
    """The sources of the splits out of an index that is built, and the lines of the banner about them."""
    names = used_splits(run, index.opened)
    sources, summary = split_sources(run, index.opened, names, IndexFolder(index.folder), progress)
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
    made = [
        TokenDataset(
            MockSamples(size, run.training.seq_length, run.model.vocab_size, run.training.seed, number),
            size,
            run.model.vocab_size,
        )
        if size
        else None
        for number, size in enumerate(samples_needed(run, progress))
    ]
    summary = f"mock data: {len(made[0]):,} training samples of {run.training.seq_length:,} tokens"
    return Datasets(*made, (summary,), order_of(run, progress))


def _end_of_document(run: RunConfig) -> int | None:
    wanted = [] if run.data.sft else [name for name in _BORDER_OPTIONS if getattr(run.data, name)]
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


def data_fingerprint(run: RunConfig) -> dict:
    """What the samples of a run are made of, for its checkpoints: sources by size and digest, not by path.

    Raises:
        DataError: a file is missing or damaged.
    """
    order = {"seed": run.training.seed, "sequence_length": run.training.seq_length}
    if run.data.mock_data:
        return {"kind": "mock", "vocab_size": run.model.vocab_size, **order}
    plan = data_plan(run.data)
    content = _dialogs_fingerprint if run.data.sft else _indexed_fingerprint
    about = content(run, dict.fromkeys(prefix for blend in plan.blends if blend for prefix in blend.prefixes))
    blends = {
        name: {
            "share": list(share),
            "weights": list(blend.weights) if blend.weights else None,
            "sources": [{"name": Path(p).name, **about[p]} for p in blend.prefixes],
        }
        for name, blend, share in zip(SPLITS, plan.blends, plan.shares, strict=True)
        if blend
    }
    if run.data.sft:
        encoding = encoding_of(run.data, run.model.vocab_size)
        settings = {name: getattr(run.data, name) for name in ("sft_loss_mask", "sft_packing", "sft_overlong")}
        return {"kind": "dialogs", **order, "encoding": encoding, "settings": settings, "blends": blends}
    return {"kind": "indexed", **order, "blends": blends}


def _indexed_fingerprint(run: RunConfig, prefixes: dict[str, None]) -> dict[str, dict]:
    return {prefix: dataset.fingerprint() for prefix, dataset in open_sources(run).items()}


def _dialogs_fingerprint(run: RunConfig, prefixes: dict[str, None]) -> dict[str, dict]:
    return {path: {"bytes": Path(path).stat().st_size, "sha256": file_digest(path)} for path in prefixes}


def fingerprint_differences(saved: dict, now: dict, at: str = "") -> list[str]:
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

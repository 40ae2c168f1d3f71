"""From the prefixes or files of a run to its sources of samples: opening, the index in the cache, epochs of each source."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Callable, Optional, Union

import numpy as np

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.data.blend import SPLITS, Blend, data_plan
from megatron_telechat.data.chat_files import ChatDataset, encoded
from megatron_telechat.data.indexed import IndexedDataset
from megatron_telechat.data.packing import ChatSamples, usable_dialogs
from megatron_telechat.data.samples import BlendedSamples, IndexedSamples, SampleSource, samples_of_each, share_of
from megatron_telechat.errors import ConfigError, DataError, ResourceError

# A number that takes part in the name of a cached index: raise it when the same inputs give another order.
_INDEX_FORMAT = 1
_SAMPLED_TOKENS = 1 << 20
_NOT_SHARED = "give --data-cache-path a folder that all nodes share"

Opened = dict[str, IndexedDataset]
Source = Union[IndexedSamples, ChatSamples]
Say = Callable[[str], None]


def quiet(text: str) -> None:
    """A listener to progress that says nothing."""


def samples_needed(run: RunConfig) -> tuple[int, int, int]:
    """Samples of the whole run for train, and of one evaluation for valid and test (0: not used)."""
    batch = run.training.global_batch_size
    # Validation data of its own is evaluated at the end, also where no interval is given.
    evaluates = run.evaluation.eval_interval or run.data.valid_data_path
    evaluation = run.evaluation.eval_iters * batch if evaluates else 0
    return max(1, run.training.train_iters) * batch, evaluation, evaluation


def cache_root(run: RunConfig) -> Path:
    """The folder of all indices of a run."""
    if run.data.data_cache_path:
        return Path(run.data.data_cache_path)
    return Path(run.logging.run_dir or f"runs/{run.model.name}") / "cache"


def open_sources(run: RunConfig, say: Say = quiet) -> Opened:
    """Every dataset the run names, once; files of dialogs are encoded if they are not yet. All complaints are raised together."""
    opened, problems = {}, []
    for prefix in _named(run):
        try:
            if run.data.sft:
                opened[prefix] = dataset = ChatDataset(encoded(prefix, run.data, run.model.vocab_size, cache_root(run), say))
                # The same text may have been encoded under another name.
                dataset.source = prefix
            else:
                opened[prefix] = dataset = IndexedDataset(prefix)
            _check_vocabulary(dataset, run.model.vocab_size)
        except DataError as error:
            problems.extend(error.problems)
    if problems:
        raise DataError(problems)
    return opened


def open_encoded(run: RunConfig, final: Path) -> Opened:
    """The files of dialogs that rank 0 encoded, from the list it left in the index.

    Raises:
        DataError: they are not to be seen here.
    """
    try:
        folders = json.loads((final / "sources.json").read_text(encoding="utf-8"))
        opened = {}
        for prefix in _named(run):
            opened[prefix] = ChatDataset(final.parent / folders[prefix])
            opened[prefix].source = prefix
        return opened
    except OSError as error:
        raise _not_shared(error) from error


def _named(run: RunConfig) -> dict[str, None]:
    return dict.fromkeys(prefix for blend in data_plan(run.data).blends if blend for prefix in blend.prefixes)


def _not_shared(error: OSError) -> DataError:
    return DataError(f"the sample index that rank 0 wrote is not to be seen here: {error.filename}", fix=_NOT_SHARED)


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


def used_splits(run: RunConfig, opened: Opened) -> tuple[str, ...]:
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


def index_key(run: RunConfig, opened: Opened, names: tuple[str, ...]) -> str:
    """Names the index by everything that decides it, the files' contents included."""
    plan = data_plan(run.data)
    parts = {
        "format": _INDEX_FORMAT,
        "blends": [(b.prefixes, b.weights, b.per_token) if b else None for b in plan.blends],
        "shares": plan.shares,
        "files": {prefix: _content_of(dataset) for prefix, dataset in opened.items()},
        "seed": run.training.seed,
        "sequence_length": run.training.seq_length,
        "samples": dict(zip(SPLITS, samples_needed(run))),
        "splits": names,
    }
    if run.data.sft:
        parts["sft"] = (run.data.sft_packing, run.data.sft_overlong)
    return "index-" + hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def _content_of(dataset: IndexedDataset):
    # The folder of encoded dialogs is named after the whole text and all that encoded it.
    return dataset.bin_path.parent.name if isinstance(dataset, ChatDataset) else dataset.fingerprint()


def build_index(run: RunConfig, opened: Opened, names: tuple[str, ...], final: Path, say: Say = quiet) -> bool:
    """Build the index in a folder beside ``final`` and rename it: a folder under that name is whole.

    Returns:
        Whether it was built; False where it was there.

    Raises:
        DataError: an entry of an ``.idx`` is damaged, or the data does not last for the run.
        ResourceError: the cache cannot be written.
    """
    if final.is_dir():
        return False
    for number, (prefix, dataset) in enumerate(opened.items(), 1):
        say(f"checking {prefix} ({number} of {len(opened)})")
        dataset.verify()
    partial = final.with_name(f"{final.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        if run.data.sft:
            folders = {prefix: dataset.bin_path.parent.name for prefix, dataset in opened.items()}
            (partial / "sources.json").write_text(json.dumps(folders), encoding="utf-8")
        split_sources(run, opened, names, partial, say)
        os.rename(partial, final)
    except OSError as error:
        if final.is_dir():
            return False  # another run with the same data was faster
        raise ResourceError(f"cannot write the sample index: {error}", str(final.parent),
                            "give --data-cache-path a folder with space that all nodes share") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def split_sources(
    run: RunConfig, opened: Opened, names: tuple[str, ...], cache: Path, say: Say = quiet
) -> tuple[dict[str, SampleSource], list[str]]:
    """The sources of the splits, and a line for the banner about each part; index files that ``cache`` lacks are made.

    Raises:
        DataError: the index is not there (on a rank that only reads), or the data does not last for the run.
    """
    plan = data_plan(run.data)
    sources, summary = {}, []
    for name, blend, share, needed in zip(SPLITS, plan.blends, plan.shares, samples_needed(run)):
        if name not in names:
            continue
        try:
            sources[name], lines = _split_source(run, opened, name, blend, share, needed, cache, say)
        except FileNotFoundError as error:
            raise _not_shared(error) from error
        summary.extend(lines)
    return sources, summary


def _split_source(
    run: RunConfig,
    opened: Opened,
    name: str,
    blend: Blend,
    share: tuple[float, float],
    needed: int,
    cache: Path,
    say: Say,
) -> tuple[SampleSource, list[str]]:
    weights = blend.weights
    if weights is not None and blend.per_token:
        weights = tuple(w * _size_of(run, opened[p], share) for w, p in zip(weights, blend.prefixes))
    single = len(blend.prefixes) == 1
    if weights is None:
        sizes = [needed if single else None] * len(blend.prefixes)
    else:
        sizes = samples_of_each(weights, needed)
    parts: list[Source] = []
    for number, (prefix, size) in enumerate(zip(blend.prefixes, sizes)):
        say(f"indexing {prefix} for {name} ({number + 1} of {len(sizes)})")
        parts.append(_part(run, opened[prefix], share, size, name, cache, number))
    if single and weights is None:
        return parts[0], [_source_line(name, parts[0], needed)]
    if weights is None:
        weights = tuple(float(len(part)) for part in parts)
        _check_enough(run, name, parts, needed)
    source = BlendedSamples(parts, weights, needed, cache, name)
    return source, [_source_line(name, part, drawn) for part, drawn in zip(parts, source.drawn())]


def _part(
    run: RunConfig, dataset: IndexedDataset, share: tuple[float, float], size: Optional[int], name: str, cache: Path, number: int
) -> Source:
    length, seed = run.training.seq_length, run.training.seed
    if isinstance(dataset, ChatDataset):
        return ChatSamples(dataset, share, size, name, length, seed, run.data, cache, f"{name}-{number}")
    return IndexedSamples(dataset, share, size, name, length, seed, cache)


def _size_of(run: RunConfig, dataset: IndexedDataset, share: tuple[float, float]) -> int:
    """What a copy of a dataset weighs among the samples: its tokens; its dialogs where each fills a row alone."""
    if not isinstance(dataset, ChatDataset):
        return _tokens_of(dataset, share)
    usable = usable_dialogs(dataset, share_of(dataset, share), run.training.seq_length + 1, run.data.sft_overlong)
    return int(usable.lengths.sum(dtype=np.int64)) if run.data.sft_packing else usable.dialogs.size


def _check_enough(run: RunConfig, name: str, parts: list[Source], needed: int) -> None:
    """Prefixes without weights are read once (Megatron's rule): the run must not outlast them."""
    there = sum(len(part) for part in parts)
    if there >= needed:
        return
    length = run.training.seq_length
    raise DataError(
        f"the {name} data ends before the run: {there:,} samples ({there * length:,} tokens) are there, "
        f"{needed:,} samples ({needed * length:,} tokens) are needed",
        "prefixes without weights are read once",
        "give weights (0.7 en 0.3 zh) to read them more than once, add data, or lower --train-iters or --eval-iters",
    )


def _source_line(name: str, part: Source, drawn: int) -> str:
    if isinstance(part, ChatSamples):
        return part.summary(name, drawn)
    epochs = drawn * part.sequence_length / part.tokens_per_epoch
    return (
        f"{name}: {part.dataset.prefix}  {part.dataset.documents:,} documents  {part.tokens_per_epoch:,} tokens in the split"
        f"  {drawn:,} samples = {epochs:.2f} epochs"
    )

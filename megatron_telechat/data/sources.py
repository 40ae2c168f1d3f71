"""From the prefixes or files of a run to its sources of samples: opening, the index in the cache, epochs of each
source."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.data.blend import SPLITS, Blend, data_plan
from megatron_telechat.data.blending import BlendedSamples, BlendOrder, samples_of_each
from megatron_telechat.data.chat.files import ChatDataset, encoded
from megatron_telechat.data.epochs import IndexedSamples
from megatron_telechat.data.indexed.dataset import IndexedDataset
from megatron_telechat.data.order import Progress, order_of, samples_needed
from megatron_telechat.data.packing import ChatSamples, usable_dialogs
from megatron_telechat.data.pieces import IndexFolder, Say, quiet
from megatron_telechat.data.samples import SampleSource, share_of
from megatron_telechat.errors import ConfigError, DataError, Problem

# A number that takes part in the name of a cached index: raise it when the same inputs give another order.
_INDEX_FORMAT = 2
_SAMPLED_TOKENS = 1 << 20
_NOT_SHARED = "give --data-cache-path a folder that all nodes share"

Opened = dict[str, IndexedDataset]
Source = IndexedSamples | ChatSamples


def cache_root(run: RunConfig) -> Path:
    """The folder of all indices of a run."""
    if run.data.data_cache_path:
        return Path(run.data.data_cache_path)
    return Path(run.logging.run_dir or f"runs/{run.model.name}") / "cache"


def open_sources(run: RunConfig, say: Say = quiet) -> Opened:
    """Every dataset the run names, once; files of dialogs are encoded if they are not yet. All complaints are raised
    together."""
    opened, problems = {}, []
    for prefix in _named(run):
        try:
            if run.data.sft:
                opened[prefix] = dataset = ChatDataset(
                    encoded(prefix, run.data, run.model.vocab_size, cache_root(run), say)
                )
                # The same text may have been encoded under another name.
                dataset.source = prefix
            else:
                opened[prefix] = dataset = IndexedDataset(prefix)
            _check_vocabulary(dataset, run.model.vocab_size)
        except DataError as error:
            problems.extend(error.problems)
    problems.extend(_named_twice(run, opened))
    if problems:
        raise DataError(problems)
    return opened


def _named_twice(run: RunConfig, opened: Opened) -> Iterator[Problem]:
    """The same tokens under two names of a blend, which the rules of the configuration cannot always see: a.jsonl and
    a.jsonl.gz."""
    for blend in data_plan(run.data).blends[: 2 if run.data.train_data_path else 1]:
        groups: dict[str, list[str]] = {}
        for prefix in blend.prefixes if blend else ():
            if prefix in opened:
                groups.setdefault(json.dumps(opened[prefix].fingerprint()), []).append(prefix)
        for names in groups.values():
            if len(names) > 1:
                yield Problem(f"these are the same data, and would be read twice: {', '.join(names)}", "data",
                              "name it once; a weight says how often it is read")  # fmt: skip


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
    return DataError(f"the sample index that rank 0 wrote is not visible here: {error.filename}", fix=_NOT_SHARED)


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
    for name, blend, share, needed in zip(SPLITS, plan.blends, plan.shares, samples_needed(run), strict=True):
        if not needed:
            continue
        if blend is None:
            if name == "test":
                continue
            raise ConfigError(
                f"no data for {name}"
                + ("" if name == "train" else f", but eval_interval={run.evaluation.eval_interval}"),
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


def index_key(run: RunConfig, opened: Opened) -> str:
    """Names the index by everything that decides it, the files' contents included; not by how much of it a run
    reads."""
    plan = data_plan(run.data)
    parts = {
        "format": _INDEX_FORMAT,
        "blends": [(b.prefixes, b.weights, b.per_token) if b else None for b in plan.blends],
        "shares": plan.shares,
        "files": {prefix: _content_of(dataset) for prefix, dataset in opened.items()},
        "seed": run.training.seed,
        "sequence_length": run.training.seq_length,
    }
    if run.data.sft:
        parts["sft"] = (run.data.sft_packing, run.data.sft_overlong)
    return "index-" + hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def _content_of(dataset: IndexedDataset):
    # The folder of encoded dialogs is named after the whole text and all that encoded it.
    return dataset.bin_path.parent.name if isinstance(dataset, ChatDataset) else dataset.fingerprint()


def build_index(
    run: RunConfig,
    opened: Opened,
    names: tuple[str, ...],
    final: Path,
    say: Say = quiet,
    progress: Progress = Progress(),
) -> bool:
    """Build the pieces of the index that a run needs and the folder lacks. A piece that is there is whole.

    Returns:
        Whether anything was built.

    Raises:
        DataError: an entry of an ``.idx`` is damaged, or the data does not last for the run.
        ResourceError: the cache cannot be written.
    """
    index = _CheckedIndex(final, opened, say)
    if run.data.sft:
        index.text(
            "sources.json", json.dumps({prefix: dataset.bin_path.parent.name for prefix, dataset in opened.items()})
        )
    split_sources(run, opened, names, index, progress)
    return bool(index.built)


class _CheckedIndex(IndexFolder):
    """The index as rank 0 builds it: each dataset is checked before the first piece is built."""

    def __init__(self, path: Path, opened: Opened, say: Say):
        super().__init__(path, True, say)
        self._unchecked = opened

    def piece(self, name: str, build: Callable[[Path], None]) -> Path:
        if self._unchecked and not (self.path / name).is_dir():
            for number, (prefix, dataset) in enumerate(self._unchecked.items(), 1):
                self.say(f"checking {prefix} ({number} of {len(self._unchecked)})")
                dataset.verify()
            self._unchecked = {}
        return super().piece(name, build)


def split_sources(
    run: RunConfig, opened: Opened, names: tuple[str, ...], index: IndexFolder, progress: Progress = Progress()
) -> tuple[dict[str, SampleSource], list[str]]:
    """The sources of the splits, and a line for the banner about each part.

    Raises:
        DataError: the index is not there (on a rank that only reads), or the data does not last for the run.
    """
    plan = data_plan(run.data)
    sources, summary = {}, []
    for name, blend, share, needed in zip(SPLITS, plan.blends, plan.shares, samples_needed(run, progress), strict=True):
        if name not in names:
            continue
        megatron_for = order_of(run, progress).built_for.get(name)
        try:
            sources[name], lines = _split_source(run, opened, name, blend, share, needed, megatron_for, index)
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
    megatron_for: int | None,
    index: IndexFolder,
) -> tuple[SampleSource, list[str]]:
    count, weights = len(blend.prefixes), blend.weights
    if weights is not None and blend.per_token:
        weights = tuple(w * _size_of(run, opened[p], share) for w, p in zip(weights, blend.prefixes, strict=True))
    once = weights is None and count > 1
    ours: list[int | None] = [megatron_for] * count
    if megatron_for is not None and weights is not None:
        ours = list(samples_of_each(weights, megatron_for))
    parts = [
        _part(run, opened[p], share, once, name, built_for) for p, built_for in zip(blend.prefixes, ours, strict=True)
    ]

    def require(sizes: Sequence[int | None]) -> None:
        for number, (part, size) in enumerate(zip(parts, sizes, strict=True)):
            part.require(size, index, f"{name}-{number}")

    if once:
        require([None] * count)
        there = _enough(run, name, parts, needed)
        order = BlendOrder([float(len(part)) for part in parts], needed, index, f"{name}-blend", there)
    elif weights is not None:
        order = BlendOrder(weights, needed, index, f"{name}-blend")
        require(order.drawn())
    else:
        require([needed])
        return parts[0], [_source_line(name, parts[0], needed)]
    source = BlendedSamples(parts, order)
    return source, [_source_line(name, part, drawn) for part, drawn in zip(parts, source.drawn(), strict=True)]


def _part(
    run: RunConfig, dataset: IndexedDataset, share: tuple[float, float], once: bool, name: str, megatron_for: int | None
) -> Source:
    length, seed = run.training.seq_length, run.training.seed
    if isinstance(dataset, ChatDataset):
        return ChatSamples(dataset, share, name, length, seed, run.data)
    return IndexedSamples(dataset, share, once, name, length, seed, megatron_for)


def _size_of(run: RunConfig, dataset: IndexedDataset, share: tuple[float, float]) -> int:
    """What a copy of a dataset weighs among the samples: its tokens; its dialogs where each fills a row alone."""
    if not isinstance(dataset, ChatDataset):
        return _tokens_of(dataset, share)
    usable = usable_dialogs(dataset, share_of(dataset, share), run.training.seq_length + 1, run.data.sft_overlong)
    return int(usable.lengths.sum(dtype=np.int64)) if run.data.sft_packing else usable.dialogs.size


def _enough(run: RunConfig, name: str, parts: list[Source], needed: int) -> int:
    """Samples of prefixes without weights, which are read once (Megatron's rule): the run must not outlast them."""
    there = sum(len(part) for part in parts)
    if there >= needed:
        return there
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
        f"{name}: {part.dataset.prefix}  {part.dataset.documents:,} documents  {part.tokens_per_epoch:,} tokens in "
        f"the split  {drawn:,} samples = {epochs:.2f} epochs"
    )

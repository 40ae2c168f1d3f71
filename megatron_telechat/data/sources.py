"""From the names of a run's datasets to its sources of samples: opening, the index in the cache, epochs of each
source."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.data.blend import SPLITS, DataPlan, Split
from megatron_telechat.data.blending import BlendedSamples, BlendOrder, samples_of_each
from megatron_telechat.data.corpus import Corpus, CorpusSamples, EncodingFactory, SampleSource
from megatron_telechat.data.formats import corpus_factory
from megatron_telechat.data.order import Progress, order_of, samples_needed
from megatron_telechat.data.pieces import IndexFolder, Say, quiet
from megatron_telechat.errors import ConfigError, DataError, Problem

# A number that takes part in the name of a cached index: raise it when the same inputs give another order.
_INDEX_FORMAT = 2
_NOT_SHARED = "give --data-cache-path a folder that all nodes share"
_ENCODED = "sources.json"
"""In the index of data that was encoded: name of each dataset → its folder in the cache."""

Opened = dict[str, Corpus]
"""The datasets of a run by the names it gives them."""


def open_sources(run: RunConfig, plan: DataPlan, say: Say = quiet) -> Opened:
    """Every dataset the run names, once; files that are to be encoded are, if they are not yet.

    Raises:
        DataError: what is missing, damaged or of another vocabulary, and what is named twice; all of it together.
        ResourceError: the cache cannot be written.
    """
    factory = corpus_factory(plan.format)
    opened: Opened = {}
    problems: list[Problem] = []
    for name in plan.names:
        try:
            opened[name] = factory.open(name, run, run.cache_dir, say)
            opened[name].require_vocabulary(run.model.vocab_size)
        except DataError as error:
            problems.extend(error.problems)
    problems.extend(_named_twice(run, plan, opened))
    if problems:
        raise DataError(problems)
    return opened


def _named_twice(run: RunConfig, plan: DataPlan, opened: Opened) -> Iterator[Problem]:
    """The same tokens under two names of a blend, which the rules of the configuration cannot always see: a.jsonl and
    a.jsonl.gz."""
    for blend in plan.blends[: 2 if run.data.train_data_path else 1]:
        groups: dict[str, list[str]] = {}
        for prefix in blend.prefixes if blend else ():
            if prefix in opened:
                groups.setdefault(json.dumps(opened[prefix].fingerprint()), []).append(prefix)
        for names in groups.values():
            if len(names) > 1:
                yield Problem(f"these are the same data, and would be read twice: {', '.join(names)}", "data",
                              "name it once; a weight says how often it is read")  # fmt: skip


def open_encoded(run: RunConfig, plan: DataPlan, final: Path) -> Opened:
    """The files that rank 0 encoded, from the list it left in the index.

    Raises:
        DataError: they are not to be seen here.
    """
    factory = corpus_factory(plan.format)
    assert isinstance(factory, EncodingFactory)
    try:
        folders = json.loads((final / _ENCODED).read_text(encoding="utf-8"))
        return {name: factory.open_encoded(name, run, final.parent / folders[name]) for name in plan.names}
    except OSError as error:
        raise _not_shared(error) from error


def _not_shared(error: OSError) -> DataError:
    return DataError(f"the sample index that rank 0 wrote is not visible here: {error.filename}", fix=_NOT_SHARED)


def used_splits(run: RunConfig, plan: DataPlan, opened: Opened) -> tuple[str, ...]:
    """The splits to build: those with samples to give and a share that holds tokens."""
    splits = plan.splits
    used = []
    for name, needed in zip(SPLITS, samples_needed(run), strict=True):
        if not needed:
            continue
        if name not in splits:
            if name == "test":
                continue
            raise ConfigError(
                f"no data for {name}"
                + ("" if name == "train" else f", but eval_interval={run.evaluation.eval_interval}"),
                "train_data_path" if run.data.train_data_path else "split",
                "give --valid-data-path, a share in --split, or drop --eval-interval",
            )
        split = splits[name]
        empty = [prefix for prefix in split.blend.prefixes if not opened[prefix].tokens_in(split.share)]
        if empty and name == "test":
            continue  # a share of 1 in 1000 of a small dataset; nothing in the training needs it
        used.append(name)
    return tuple(used)


def index_key(run: RunConfig, plan: DataPlan, opened: Opened) -> str:
    """Names the index by everything that decides it, the files' contents included; not by how much of it a run
    reads."""
    parts = {
        "format": _INDEX_FORMAT,
        "blends": [(b.prefixes, b.weights, b.per_token) if b else None for b in plan.blends],
        "shares": plan.shares,
        "files": {name: corpus.content_key() for name, corpus in opened.items()},
        "seed": run.training.seed,
        "sequence_length": run.training.seq_length,
        **corpus_factory(plan.format).index_settings(run),
    }
    return "index-" + hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def build_index(
    run: RunConfig, plan: DataPlan, opened: Opened, final: Path, say: Say = quiet, progress: Progress = Progress()
) -> bool:
    """Build the pieces of the index that a run needs and the folder lacks. A piece that is there is whole.

    Returns:
        Whether anything was built.

    Raises:
        DataError: an entry of a dataset is damaged, or the data does not last for the run.
        ResourceError: the cache cannot be written.
    """
    index = _CheckedIndex(final, opened, say)
    split_sources(run, plan, opened, index, progress)
    if isinstance(corpus_factory(plan.format), EncodingFactory):
        index.text(_ENCODED, json.dumps({name: corpus.content_key() for name, corpus in opened.items()}))
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
    run: RunConfig, plan: DataPlan, opened: Opened, index: IndexFolder, progress: Progress = Progress()
) -> tuple[dict[str, SampleSource], list[str]]:
    """The sources of the splits a run uses, and a line for the banner about each part.

    Raises:
        ConfigError: a split that the run needs has no data.
        DataError: the index is not there (on a rank that only reads), or the data does not last for the run.
    """
    needed = dict(zip(SPLITS, samples_needed(run, progress), strict=True))
    built_for = order_of(run, progress).built_for
    sources: dict[str, SampleSource] = {}
    summary: list[str] = []
    for name in used_splits(run, plan, opened):
        try:
            sources[name], lines = _split_source(
                run, opened, plan.splits[name], needed[name], built_for.get(name), index
            )
        except FileNotFoundError as error:
            raise _not_shared(error) from error
        summary.extend(lines)
    return sources, summary


def _split_source(
    run: RunConfig, opened: Opened, split: Split, needed: int, megatron_for: int | None, index: IndexFolder
) -> tuple[SampleSource, list[str]]:
    name, share, prefixes, weights = split.name, split.share, split.blend.prefixes, split.blend.weights
    count = len(prefixes)
    if weights is not None and split.blend.per_token:
        weights = tuple(w * opened[p].size(share) for w, p in zip(weights, prefixes, strict=True))
    once = weights is None and count > 1
    ours: list[int | None] = [megatron_for] * count
    if megatron_for is not None and weights is not None:
        ours = list(samples_of_each(weights, megatron_for))
    parts = [opened[p].samples(name, share, once, built_for) for p, built_for in zip(prefixes, ours, strict=True)]

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
        return parts[0], [parts[0].summary(name, needed)]
    source = BlendedSamples(parts, order)
    return source, [part.summary(name, drawn) for part, drawn in zip(parts, source.drawn(), strict=True)]


def _enough(run: RunConfig, name: str, parts: Sequence[CorpusSamples], needed: int) -> int:
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

"""From the names of a run's datasets to its sources of samples: opening, the index in the cache, epochs of each
source."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, replace
from itertools import pairwise
from pathlib import Path

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.data.blend import SPLITS, DataPlan, Split
from megatron_telechat.data.blending import BlendedSamples, BlendOrder, LaterSamples, samples_of_each
from megatron_telechat.data.corpus import (
    ONE_LENGTH,
    Corpus,
    EncodingFactory,
    PastLeg,
    SampleSource,
    SourceLegs,
)
from megatron_telechat.data.formats import corpus_factory
from megatron_telechat.data.order import Leg, Progress, order_of, samples_needed
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
    try:
        folders = json.loads((final / _ENCODED).read_text(encoding="utf-8"))
    except OSError as error:
        raise _not_shared(error) from error
    return open_folders(run, plan, folders)


def open_folders(run: RunConfig, plan: DataPlan, folders: Mapping[str, str]) -> Opened:
    """The files that rank 0 encoded.

    Args:
        folders: of each dataset its folder in the cache.

    Raises:
        DataError: they are not to be seen here.
    """
    factory = corpus_factory(plan.format)
    assert isinstance(factory, EncodingFactory)
    try:
        return {name: factory.open_encoded(name, run, run.cache_dir / folders[name]) for name in plan.names}
    except OSError as error:
        raise _not_shared(error) from error


def _not_shared(error: OSError) -> DataError:
    return DataError(f"the sample index that rank 0 wrote is not visible here: {error.filename}", fix=_NOT_SHARED)


def used_splits(run: RunConfig, plan: DataPlan, opened: Opened) -> tuple[tuple[Split, ...], list[str]]:
    """The splits to build: those with samples to give and a share that holds tokens; and a line for the banner about
    each dataset that an evaluation does without."""
    splits = plan.splits
    used: list[Split] = []
    notes: list[str] = []
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
        why = {prefix: opened[prefix].gives_none(split.share) for prefix in split.blend.prefixes}
        if name != "train" and any(why.values()):
            split = _without(split, [prefix for prefix in why if why[prefix]])
            end = "" if split.blend.prefixes else "; there is no evaluation on it"
            notes.append(f"{name}: {'; '.join(text for text in why.values() if text)}{end}")
        if split.blend.prefixes:
            used.append(split)
    return tuple(used), notes


def _without(split: Split, left_out: Sequence[str]) -> Split:
    """The split without these datasets; the weights of the others keep their proportion."""
    blend = split.blend
    kept = [number for number, prefix in enumerate(blend.prefixes) if prefix not in left_out]
    weights = blend.weights and tuple(blend.weights[number] for number in kept)
    return replace(split, blend=replace(blend, prefixes=tuple(blend.prefixes[n] for n in kept), weights=weights))


def index_key(run: RunConfig, plan: DataPlan, opened: Opened, progress: Progress = Progress()) -> str:
    """Names the index by everything that decides it, the files' contents included; not by how much of it a run
    reads."""
    legs = order_of(run, progress).legs
    parts = {
        "format": _INDEX_FORMAT,
        "blends": [(b.prefixes, b.weights, b.per_token) if b else None for b in plan.blends],
        "shares": plan.shares,
        "files": {name: corpus.content_key() for name, corpus in opened.items()},
        "seed": run.training.seed,
        "sequence_length": run.training.seq_length,
        **corpus_factory(plan.format).index_settings(run),
        **({"legs": [astuple(leg) for leg in legs]} if legs else {}),
    }
    if len(legs) > 1:
        parts["built_for"] = order_of(run, progress).built_for.get("train")  # decides what the first leg has left
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
    order = order_of(run, progress)
    sources: dict[str, SampleSource] = {}
    used, notes = used_splits(run, plan, opened)
    summary: list[str] = []
    for split in used:
        name = split.name
        try:
            legs = order.legs if name == "train" else ()
            begin = legs[-1].begin if legs else 0
            source, lines = _SplitSource(run, opened, split, order.built_for.get(name), legs, index).build(
                needed[name] - begin
            )
            sources[name] = LaterSamples(source, begin) if begin else source
        except FileNotFoundError as error:
            raise _not_shared(error) from error
        summary.extend(lines)
    return sources, [*summary, *notes]


class _SplitSource:
    """The source of one split, in the present leg of the run.

    Args:
        megatron_for: samples whose Megatron order the run began with.
        legs: the lengths of a sample so far, the present one last; empty: there is one.
    """

    def __init__(
        self,
        run: RunConfig,
        opened: Opened,
        split: Split,
        megatron_for: int | None,
        legs: Sequence[Leg],
        index: IndexFolder,
    ):
        self.run, self.split, self.index = run, split, index
        self.legs = tuple(legs) or (Leg(run.training.seq_length),)
        self.corpora = [opened[prefix] for prefix in split.blend.prefixes]
        weights = split.blend.weights
        if weights is not None and split.blend.per_token:
            weights = tuple(w * c.size(split.share) for w, c in zip(weights, self.corpora, strict=True))
        self.weights = weights
        self.once = weights is None and len(self.corpora) > 1
        self.megatron_for: list[int | None] = [megatron_for] * len(self.corpora)
        if megatron_for is not None and weights is not None:
            self.megatron_for = list(samples_of_each(weights, megatron_for))

    def build(self, needed: int) -> tuple[SampleSource, list[str]]:
        """The source, made readable up to so many samples of the present leg, and the lines of the banner."""
        name, index = self.split.name, self.index
        parts = [
            corpus.samples(name, self.split.share, self.once, megatron_for, legs)
            for corpus, megatron_for, legs in zip(self.corpora, self.megatron_for, self._legs_of_each(), strict=True)
        ]

        def require(sizes: Sequence[int | None]) -> None:
            for number, (part, size) in enumerate(zip(parts, sizes, strict=True)):
                part.require(size, index, f"{name}-{number}")

        if self.once:
            require([None] * len(parts))
            there = self.require_enough([len(part) for part in parts], needed)
            order = BlendOrder([float(len(part)) for part in parts], needed, index, f"{name}-blend", there)
        elif self.weights is not None:
            order = BlendOrder(self.weights, needed, index, f"{name}-blend")
            require(order.drawn())
        else:
            require([needed])
            return parts[0], [parts[0].summary(name, needed)]
        source = BlendedSamples(parts, order)
        return source, [part.summary(name, drawn) for part, drawn in zip(parts, source.drawn(), strict=True)]

    def samples_left(self) -> list[int]:
        """Samples of the present leg that each source has, where it is read once."""
        self._legs_of_each()
        return [self._whole(tokens, len(self.legs) - 1) for tokens in self._left]

    def require_enough(self, samples: Sequence[int], needed: int) -> int:
        """All samples there are of prefixes without weights, which are read once (Megatron's rule).

        Raises:
            DataError: the run would outlast them.
        """
        there, length, name = sum(samples), self.run.training.seq_length, self.split.name
        if there >= needed:
            return there
        raise DataError(
            f"the {name} data ends before the run: {there:,} samples ({there * length:,} tokens) are there, "
            f"{needed:,} samples ({needed * length:,} tokens) are needed"
            + f" of {length:,} tokens each"
            * (len(self.legs) > 1),
            "prefixes without weights are read once",
            "give weights (0.7 en 0.3 zh) to read them more than once, add data, or lower --train-iters or "
            "--eval-iters",
        )

    def _legs_of_each(self) -> list[SourceLegs]:
        """What each source gave to the legs before, and is to give to this one."""
        left = self._left = [corpus.tokens_in(self.split.share) for corpus in self.corpora]
        if len(self.legs) == 1 and self.legs[0].ends is None:
            return [ONE_LENGTH] * len(self.corpora)
        past: list[list[PastLeg]] = [[] for _ in self.corpora]
        for number, (leg, later) in enumerate(pairwise(self.legs)):
            read = self._drawn(later.begin - leg.begin, number, left)
            planned = self._planned(leg, number, left)
            for source, legs in enumerate(past):
                legs.append(PastLeg(leg.seq_length, read[source], planned[source]))
                left[source] -= read[source] * leg.seq_length
        ends = self._planned(self.legs[-1], len(self.legs) - 1, left)
        return [SourceLegs(tuple(legs), end) for legs, end in zip(past, ends, strict=True)]

    def _planned(self, leg: Leg, number: int, left: Sequence[int]) -> list[int | None]:
        """Samples of each source that a leg was to read as it began."""
        if leg.ends is None:
            return [None] * len(self.corpora)
        return list(self._drawn(leg.ends - leg.begin, number, left))

    def _drawn(self, size: int, number: int, left: Sequence[int]) -> list[int]:
        """Samples of each source among the first ones of a leg.

        Args:
            left: tokens of each source that the legs before have left, where each is read once.
        """
        name = f"{self.split.name}-blend"
        if not self.once:
            return [size] if self.weights is None else BlendOrder(self.weights, size, self.index, name).drawn()
        there = [self._whole(tokens, number) for tokens in left]
        size = min(size, sum(there))  # what is planned may not be there; what is needed is looked at elsewhere
        if not size:
            return [0] * len(there)
        name += f"-leg-{number}" * (number + 1 < len(self.legs))
        return BlendOrder([float(count) for count in there], size, self.index, name, sum(there)).drawn()

    def _whole(self, tokens: int, number: int) -> int:
        return max(0, (tokens - 1) // self.legs[number].seq_length)


def require_lasting(plan: DataPlan, ahead: Sequence[tuple[RunConfig, Progress]]) -> None:
    """Data that is read once must last for all stages of a run, which is to be known before its first step.

    Args:
        ahead: the stages that are ahead, and how far the run will have read as each begins.

    Raises:
        DataError: it does not.
    """
    split = plan.splits.get("train")
    if split is None or split.blend.weights is not None or len(split.blend.prefixes) == 1:
        return
    opened = open_sources(ahead[0][0], plan) if ahead else {}
    with tempfile.TemporaryDirectory() as scratch:
        for number, (run, progress) in enumerate(ahead):
            legs = order_of(run, progress).legs
            source = _SplitSource(run, opened, split, None, legs, IndexFolder(Path(scratch, str(number)), True))
            begin = legs[-1].begin if legs else 0
            source.require_enough(source.samples_left(), samples_needed(run, progress)[0] - begin)

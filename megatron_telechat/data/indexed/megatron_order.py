"""Megatron's own order of one dataset, built by megatron-core."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_telechat.data.core import core_datasets
from megatron_telechat.data.indexed.dataset import IndexedDataset

FILES = ("documents", "samples", "shuffle")
"""Names of an index's arrays in its folder."""


class _IndexTokenizer:
    """What megatron-core's dataset asks of a tokenizer while it builds an index: nothing of it decides the order."""

    vocab_size = None
    eod = -2  # megatron-core pads with -1 and warns where the two are equal

    @property
    def unique_identifiers(self) -> dict:
        return {}


def build_megatrons(
    dataset: IndexedDataset,
    sequences: range,
    split: str,
    sequence_length: int,
    seed: int,
    size: int,
    samples: int,
    folder: Path,
) -> None:
    """megatron-core's own index, under our names.

    Args:
        size: the number of samples whose order it is.
        samples: how many it must have.
    """
    gpt_dataset, splits = core_datasets("gpt_dataset"), core_datasets("utils").Split
    config = gpt_dataset.GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend=([dataset.prefix], None),
        split="1",
        path_to_cache=str(folder),
        tokenizer=_IndexTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    indices = np.arange(sequences.start, sequences.stop, dtype=np.int32)
    # Our dataset has what megatron-core asks of its own class.
    built = gpt_dataset.GPTDataset(dataset, dataset.prefix, indices, size, splits[split], config)
    if built.sample_index.shape[0] - 1 != samples:
        raise AssertionError(f"megatron-core made {built.sample_index.shape[0] - 1} samples, {samples} were expected")
    for file, name in zip(FILES, ("document", "sample", "shuffle"), strict=True):
        (found,) = folder.glob(f"*-{name}_index.npy")
        found.rename(folder / f"{file}.npy")

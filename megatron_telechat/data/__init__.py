"""Text to tokens, tokens to samples, samples to micro-batches.

The doors into training are loaded on first use: the tools that only write or inspect datasets do without torch.
"""

from __future__ import annotations

from megatron_telechat.lazy import lazy_names

_DOORS = {
    "Datasets": "datasets",
    "build_datasets": "datasets",
    "prepare_index": "datasets",
    "read_sources": "datasets",
    "data_fingerprint": "datasets",
    "fingerprint_differences": "datasets",
    "data_plan": "blend",
    "samples_needed": "order",
    "Progress": "order",
    "progress_ahead": "order",
    "SampleOrder": "order",
    "resumed_order": "order",
    "batches": "loader",
    "BatchIterator": "loader",
    "build_tokenizer": "tokenizers",
    "IndexedDataset": "indexed.dataset",
    "IndexedWriter": "indexed.dataset",
}
__all__ = sorted(_DOORS)
__getattr__ = lazy_names(__name__, _DOORS)

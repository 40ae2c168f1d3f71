"""The formats of training data: which one a run asks for, and what the names it gives its data stand for.

A format is two files: its class here, in ``FORMATS``, and the module of ``data/`` that reads it. Needs no numpy.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # the schema asks for the format of its data section
    from megatron_telechat.config.schema import DataConfig

RAW_TEXT = (".jsonl", ".json", ".jsonl.gz", ".txt", ".parquet")


class Complaint(NamedTuple):
    """What is wrong with a name, and how to fix it."""

    what: str
    fix: str


class DataFormat(ABC):
    """One format of training data. What is not overridden fits a format of single files that know their documents."""

    module: str
    """Of ``data/``; its ``FACTORY`` opens the datasets (``data/corpus.py``)."""
    field: str = "data_path"
    """The field of the data section that asks for it, for messages."""
    has_documents: bool = True
    """Whether samples are made of documents, so that options that act on their borders mean something."""
    marks_tokens: bool = False
    """Whether samples say themselves which tokens are learned and where documents begin; else the end-of-document
    token tells."""
    megatrons_order: bool = False
    """Whether Megatron-LM has an order of samples for it (--data-order megatron)."""
    can_be_cut_anew: bool = False
    """Whether what a run has not read yet can be cut into samples of another length."""

    @abstractmethod
    def is_chosen(self, data: DataConfig) -> bool:
        """Whether a data section asks for this format."""

    def template(self, data: DataConfig) -> str | None:
        """Name of the template that dialogs are written in; None where samples are no dialogs."""
        return None

    def prefix(self, name: str) -> str:
        """A name as people give it, in the one form the program uses."""
        return name

    def files(self, name: str) -> tuple[str, ...]:
        """The files a name stands for. The last one is written last: where it is, the data is whole."""
        return (name,)

    def complaint(self, name: str) -> Complaint | None:
        """Why a name given by a flag stands for no data of this format; None where it does."""
        missing = [file for file in self.files(name) if not os.path.isfile(file)]
        return Complaint(f"{' and '.join(missing)} is missing", "correct the path") if missing else None

    def entry_complaint(self, name: str) -> Complaint | None:
        """Why an entry of a data.json cannot be of this format; whether it is there is seen when it is opened."""
        return None


def dataset_prefix(path: str) -> str:
    """A path as people give it, with or without ``.bin`` or ``.idx``, as a prefix."""
    return path[:-4] if path.endswith((".bin", ".idx")) else path


class IndexedFormat(DataFormat):
    """Megatron's indexed datasets: ``PREFIX.bin`` and ``PREFIX.idx``."""

    module = "indexed.corpus"
    megatrons_order = True
    can_be_cut_anew = True

    def is_chosen(self, data: DataConfig) -> bool:
        return True

    def prefix(self, name: str) -> str:
        return dataset_prefix(name)

    def files(self, name: str) -> tuple[str, ...]:
        base = dataset_prefix(name)
        return (f"{base}.bin", f"{base}.idx")

    def complaint(self, name: str) -> Complaint | None:
        if name.endswith(RAW_TEXT) and os.path.exists(name):
            return Complaint(
                f"{name} is raw text, training reads indexed datasets",
                f"python tools/preprocess_data.py --input {name} --output-prefix PREFIX ..., and name "
                "PREFIX_text_document; for dialogs, --sft",
            )
        base = dataset_prefix(name)
        missing = [file for file in self.files(name) if not os.path.isfile(file)]
        if not missing:
            return None
        folder = os.path.dirname(base) or "."
        if not os.path.isdir(folder):
            fix = f"there is no folder {folder}; correct the path"
        elif os.path.isfile(f"{base}_text_document.idx"):
            fix = f"{base}_text_document is there; name it"
        else:
            fix = "correct the prefix (no suffix), or make the dataset with tools/preprocess_data.py"
        return Complaint(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing", fix)

    def entry_complaint(self, name: str) -> Complaint | None:
        if not name.endswith((".jsonl", ".json", ".jsonl.gz")):
            return None
        return Complaint(
            f"{name} is raw text, training reads indexed datasets",
            f"run tools/preprocess_data.py --input {name} --output-prefix PREFIX and name PREFIX_text_document; "
            "for dialogs, --sft",
        )


class ChatFormat(DataFormat):
    """Fine-tuning: jsonl files with one dialog a line."""

    module = "chat.corpus"
    field = "sft"
    marks_tokens = True
    lines = "dialogs"
    """What a file holds, for messages."""

    def is_chosen(self, data: DataConfig) -> bool:
        return data.sft

    def template(self, data: DataConfig) -> str | None:
        return data.sft_template

    def complaint(self, name: str) -> Complaint | None:
        what = f"{self.field} reads jsonl files, but {name} is not one"
        if not os.path.isfile(name):
            indexed = os.path.isfile(f"{name}.idx") or name.endswith((".bin", ".idx"))
            other = f"drop --{self.field} to train on indexed text, or name a jsonl file"
            return Complaint(what, other if indexed else "correct the path of the jsonl file")
        if name.endswith((".bin", ".idx", ".parquet")):
            return Complaint(what, f"name a file of {self.lines}, one a line")
        return None


class PairFormat(ChatFormat):
    """Preference training: jsonl files with one pair of answers a line."""

    module = "chat.pairs"
    field = "dpo"
    lines = "pairs of a chosen and a rejected answer"

    def is_chosen(self, data: DataConfig) -> bool:
        return data.dpo


class MockFormat(IndexedFormat):
    """A made-up stream without documents. It needs no names; where some are given, which is refused, they are looked
    at as those of indexed datasets."""

    field = "mock_data"
    has_documents = False
    megatrons_order = False

    def is_chosen(self, data: DataConfig) -> bool:
        return data.mock_data


INDEXED = IndexedFormat()
MOCK = MockFormat()
FORMATS: tuple[DataFormat, ...] = (PairFormat(), ChatFormat(), MOCK, INDEXED)
"""In the order they are asked; the last one is chosen where no other is."""


def data_format(data: DataConfig) -> DataFormat:
    """The format that a data section asks for."""
    return next(found for found in FORMATS if found.is_chosen(data))

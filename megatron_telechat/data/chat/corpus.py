"""Files of dialogs as the training asks for them: encoded into the cache, packed into rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_telechat.config.schema import RunConfig
from megatron_telechat.data.blend import Share
from megatron_telechat.data.chat.dialogs import dialogs_in
from megatron_telechat.data.chat.files import ChatDataset, encoded, encoded_folder, encoding_of, file_digest
from megatron_telechat.data.chat.packing import ChatSamples, Usable, usable_dialogs
from megatron_telechat.data.corpus import Corpus, CorpusSamples, DataFile, EncodingFactory, SourceLegs, share_of
from megatron_telechat.data.indexed.corpus import IndexedCorpus
from megatron_telechat.data.pieces import Say
from megatron_telechat.errors import DataError


class ChatCorpus(IndexedCorpus):
    """An encoded file of dialogs: an indexed dataset with the role of each token beside it."""

    def __init__(self, folder: Path, name: str, run: RunConfig):
        self.dialogs = self._opened(folder)
        self.dialogs.source = name  # the same text may have been encoded under another name
        super().__init__(self.dialogs, run)
        self._settings = run.data

    def _opened(self, folder: Path) -> ChatDataset:
        return ChatDataset(folder)

    def content_key(self) -> str:
        """The folder in the cache, which is named after the whole text and all that encoded it."""
        return self.dialogs.bin_path.parent.name

    def gives_none(self, share: Share) -> str:
        """A share without a dialog that can be used."""
        usable = self._usable(share)
        return "" if usable.dialogs.size else f"{self.dialogs.source} holds {usable.nothing_in(self._length)}"

    def size(self, share: Share) -> int:
        """A copy weighs its tokens; its dialogs where each fills a row alone."""
        usable = self._usable(share)
        return int(usable.lengths.sum(dtype=np.int64)) if self._settings.sft_packing else usable.dialogs.size

    def _usable(self, share: Share) -> Usable:
        dialogs = share_of(self.dialogs, share)
        return usable_dialogs(self.dialogs, dialogs, self._length + 1, self._settings.sft_overlong)

    def samples(
        self, split: str, share: Share, once: bool, megatron_for: int | None, legs: SourceLegs
    ) -> CorpusSamples:
        """Dialogs packed into rows, epoch after epoch; there is no order of Megatron's, and one length only."""
        return ChatSamples(self.dialogs, share, split, self._length, self._seed, self._settings)


class ChatFactory(EncodingFactory):
    """Encodes jsonl files with one dialog a line, and opens what was encoded."""

    kind = "dialogs"
    columns = ("file", "dialogs")
    corpus: type[ChatCorpus] = ChatCorpus
    """What an encoded file is opened as."""
    deciding = ("sft_loss_mask", "sft_packing", "sft_overlong")
    """Settings that decide masks and rows."""

    def describe(self, name: str) -> DataFile:
        """Dialogs by lines, unknown of a compressed file; tokens are unknown before they are encoded."""
        try:
            return DataFile(name, None, dialogs_in(name))
        except OSError as error:
            raise DataError(
                f"cannot read {name}: {error.strerror}", name, "correct the path of the jsonl file"
            ) from error

    def notes(self, run: RunConfig) -> list[str]:
        """Template and mask."""
        data = run.data
        mask = f", loss mask {data.sft_loss_mask}" if "sft_loss_mask" in self.deciding else ""
        return [f"template {data.sft_template}{mask}; encoded and packed when the run starts"]

    def open(self, name: str, run: RunConfig, cache: Path, say: Say) -> Corpus:
        """Encode the file if it is not yet."""
        return self.corpus(encoded(name, run.data, run.model.vocab_size, cache, say), name, run)

    def open_encoded(self, name: str, run: RunConfig, folder: Path) -> Corpus:
        """Open what rank 0 encoded."""
        return self.corpus(folder, name, run)

    def open_if_encoded(self, name: str, run: RunConfig, cache: Path) -> Corpus | None:
        """Open what a run or `tools/build_index.py` encoded before."""
        folder = encoded_folder(name, run.data, run.model.vocab_size, cache)
        return self.corpus(folder, name, run) if folder.is_dir() else None

    def file_fingerprint(self, name: str) -> dict[str, Any]:
        """Size and digest of the whole file."""
        digest = file_digest(name)
        return {"bytes": Path(name).stat().st_size, "sha256": digest}

    def settings(self, run: RunConfig) -> dict[str, Any]:
        """What decides the tokens, and what decides mask and rows."""
        settings = {name: getattr(run.data, name) for name in self.deciding}
        return {"encoding": encoding_of(run.data, run.model.vocab_size), "settings": settings}

    def index_settings(self, run: RunConfig) -> dict[str, Any]:
        """What decides the rows."""
        return {"sft": (run.data.sft_packing, run.data.sft_overlong)}


FACTORY = ChatFactory()

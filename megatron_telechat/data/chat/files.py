"""A jsonl file of dialogs, encoded once into the cache: tokens, the role of each token, line numbers."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_telechat.config.schema import DataConfig
from megatron_telechat.data.chat.dialogs import BadDialog, parse_dialog
from megatron_telechat.data.chat.preferences import parse_pair
from megatron_telechat.data.chat.template import ChatVocabulary, Part, render, tokenizer_files
from megatron_telechat.data.indexed.dataset import IndexedDataset, IndexedWriter, token_dtype
from megatron_telechat.data.pieces import Say, partial_name
from megatron_telechat.errors import DataError, Problem, ResourceError
from megatron_telechat.files import sha256_of

# Takes part in the name of an encoded file: raise it when the same input gives other tokens.
_FORMAT = 1
_PAIR_FORMAT = 1
_BATCH = 512
_COMPLAINTS = 20


class ChatDataset(IndexedDataset):
    """An encoded file: a line is a document, of one sequence where it is a dialog. Beside the tokens, the role of each
    (``chat_template``).

    Attributes:
        source: path of the jsonl file, for messages.
        roles: uint8 [tokens], CONTEXT, ANSWER or FRAME.
        lines: int64 [documents], number of the line in the jsonl file, from 1.
        pad: id that fills the rest of a row.
    """

    sequences_of_a_line = 1

    def __init__(self, folder: Path):
        super().__init__(str(folder / "dialogs"))
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        self.source: str = about["source"]
        self.sha256: str = about["sha256"]
        self.pad: int = about["pad"]
        self.lines = np.load(folder / "lines.npy", mmap_mode="r")
        size = (folder / "roles.bin").stat().st_size
        self.roles = np.memmap(folder / "roles.bin", mode="r", dtype=np.uint8) if size else np.empty(0, np.uint8)
        whole = self.lines.size * self.sequences_of_a_line == len(self)
        if self.roles.size != self.num_tokens or self.lines.size != self.documents or not whole:
            raise DataError(f"the cache {folder} is damaged", str(folder), "remove the folder; it is made again")

    def roles_of(self, dialog: int) -> np.ndarray:
        """uint8 [tokens of the dialog]."""
        begin = int(self.sequence_offsets[dialog]) // self.dtype.itemsize
        return self.roles[begin : begin + int(self.sequence_lengths[dialog])]

    def line_of(self, dialog: int) -> int:
        """Number of the line that a dialog stands in."""
        return int(self.lines[dialog // self.sequences_of_a_line])

    def origin(self, dialog: int) -> str:
        """``file:line`` of a dialog in its jsonl file."""
        return f"{self.source}:{self.line_of(dialog)}"


class PairDataset(ChatDataset):
    """An encoded file of pairs: a document of two sequences, the chosen dialog and the rejected one. ANSWER are the
    answers in which the two differ, and what follows."""

    sequences_of_a_line = 2
    reference: np.ndarray | None = None
    """float64 [pairs, 2]: log-probability of the answers of each half under the reference; None: not known yet."""

    def origin(self, dialog: int) -> str:
        """``file:line``, and which half."""
        return f"{super().origin(dialog)} {'rejected' if dialog % 2 else 'chosen'}"


def file_digest(path: str) -> str:
    """sha256 of the whole file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return sha256_of(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", path, "correct the path of the jsonl file") from error


def encoding_of(data: DataConfig, vocab_size: int) -> dict:
    """Everything beside the text that decides the tokens of a dialog."""
    return {
        "format": _FORMAT,
        **({"pairs": _PAIR_FORMAT} if data.dpo else {}),
        "template": data.sft_template,
        "system": data.sft_system,
        "tokenizer_type": data.tokenizer_type,
        "tokenizer": {file.name: file_digest(str(file)) for file in tokenizer_files(data.tokenizer_model)},
        "dtype": np.dtype(token_dtype(vocab_size)).name,
    }


def encoded_folder(path: str, data: DataConfig, vocab_size: int, cache: Path) -> Path:
    """Where an encoded file lies in the cache, named after its text and all that decides its tokens.

    Raises:
        DataError: the file cannot be read.
    """
    parts = {"sha256": file_digest(path), **encoding_of(data, vocab_size)}
    return cache / ("chat-" + hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20])


def encoded(path: str, data: DataConfig, vocab_size: int, cache: Path, say: Say) -> Path:
    """The folder of the encoded file, made if it is not there.

    Raises:
        DataError: lines that are no dialogs (the first twenty are named), or a tokenizer that does not fit.
        ResourceError: the cache cannot be written.
    """
    final = encoded_folder(path, data, vocab_size, cache)
    if final.is_dir():
        return final
    partial = final.with_name(partial_name(final.name))
    try:
        partial.mkdir(parents=True)
        _encode_file(path, file_digest(path), data, vocab_size, partial, say)
        os.rename(partial, final)
    except OSError as error:
        if not final.is_dir():  # else another run with the same file was faster
            raise ResourceError(
                f"cannot write the encoded dialogs: {error}",
                str(cache),
                "give --data-cache-path a folder with space that all nodes share",
            ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def _encode_file(path: str, digest: str, data: DataConfig, vocab_size: int, folder: Path, say: Say) -> None:
    read = _rendered_pair if data.dpo else _rendered_dialog
    vocabulary = ChatVocabulary(data.tokenizer_type, data.tokenizer_model, data.sft_template, vocab_size)
    problems: list[Problem] = []
    bad = 0
    lines: list[int] = []
    batch: list[list[Part]] = []
    of_each: list[int] = []
    writer = IndexedWriter(str(folder / "dialogs"), token_dtype(vocab_size))
    with writer, open(folder / "roles.bin", "wb") as roles_file:

        def flush() -> None:
            encoded_batch = vocabulary.encode(batch)
            if not encoded_batch:
                return
            tokens, roles = (np.concatenate(arrays) for arrays in zip(*encoded_batch, strict=True))
            lengths = np.array([pair[0].size for pair in encoded_batch], np.int64)
            writer.add_documents(tokens, lengths, np.array(of_each, np.int64))
            roles.tofile(roles_file)
            batch.clear()
            of_each.clear()
            say(f"{path}: {len(lines):,} {'pairs' if data.dpo else 'dialogs'}, {writer.tokens:,} tokens")

        for number, raw in _lines(path):
            try:
                rendered = read(_decoded(raw), data)
                batch += rendered
                of_each.append(len(rendered))
                lines.append(number)
            except BadDialog as error:
                bad += 1
                if len(problems) < _COMPLAINTS:
                    problems.append(Problem(str(error), f"{path}:{number}"))
            if len(batch) >= _BATCH:
                flush()
        flush()
        _refuse(path, problems, bad, len(lines), "pair" if data.dpo else "dialog")
    np.save(folder / "lines.npy", np.array(lines, np.int64))
    about = {"source": path, "sha256": digest, "pad": vocabulary.pad}
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


def _rendered_dialog(line: Any, data: DataConfig) -> list[list[Part]]:
    return [render(parse_dialog(line), data.sft_template, data.sft_system)]


def _rendered_pair(line: Any, data: DataConfig) -> list[list[Part]]:
    """Both halves, in which only what they do not share is an answer. What they share has the same log-probability in
    both, which the loss of a pair would subtract from itself."""
    pair = parse_pair(line)
    template = (data.sft_template, data.sft_system, pair.shared_turns)
    return [render(dialog, *template) for dialog in (pair.chosen, pair.rejected)]


def _refuse(path: str, problems: list[Problem], bad: int, good: int, kind: str) -> None:
    if bad:
        rest = f"; {bad - len(problems):,} more like these" if bad > len(problems) else ""
        last = problems[-1]
        fix = f"fix or remove these lines ({bad:,} of {bad + good:,}{rest}); docs/finetuning.md shows the shapes"
        raise DataError([*problems[:-1], Problem(last.what, last.where, fix)])
    if not good:
        raise DataError(f"{path} holds no {kind}", path, f"a jsonl file with one {kind} a line")


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Number, from 1, and bytes of each line; a byte-order mark at the start is taken off, as the published reader
    does."""
    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                yield number, raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}", path, "copy the file again") from error


def _decoded(raw: bytes):
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadDialog(f"not UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        if not raw.strip():
            raise BadDialog("a blank line") from None
        raise BadDialog(f"not JSON: {error}") from None

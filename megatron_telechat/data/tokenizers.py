"""Tokenizers behind one small protocol. The ids are those Megatron's ``preprocess_data.py`` writes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from megatron_telechat.errors import ConfigError, DataError

TYPES = ("HuggingFaceTokenizer", "SentencePieceTokenizer", "TikTokenizer", "NullTokenizer")
# Names of the token that ends a document, begins it, or fills a row, where the files do not say which one it is.
END_TOKENS = ("<_end>", "</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>")
BEGIN_TOKENS = ("<_start>", "<s>", "<|begin_of_text|>")
PAD_TOKENS = ("<_pad>", "<pad>", "<|pad|>")


class Tokenizer(Protocol):
    """``vocab_size`` counts every id; ``eod``, ``bos`` and ``pad`` are ids, or None where there is none; tokenizers of
    one ``digest`` give the same ids."""

    digest: str
    vocab_size: int
    eod: int | None
    bos: int | None
    pad: int | None

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with those that the tokenizer puts around every text (BOS, EOS)."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, as `encode` gives them."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """A text of these ids, for people: it need not be the text that gave them."""
        ...


def build_tokenizer(
    tokenizer_type: str | None,
    tokenizer_model: str | None,
    *,
    vocab_size: int | None = None,
    huggingface: Callable[[Path], Tokenizer] | None = None,
    special_tokens_in_text: bool = True,
) -> Tokenizer:
    """Open a tokenizer.

    Args:
        tokenizer_type: one of ``TYPES``; None lets the file tell.
        tokenizer_model: a tokenizer.json, a .model, a folder that holds one of them, or a tiktoken .json.
        vocab_size: ids of a NullTokenizer, its end-of-document token included.
        huggingface: what opens a tokenizer.json in place of ``HuggingFaceTokenizer``.
        special_tokens_in_text: the name of a special token that stands in a text becomes that token, as in Megatron
            (where the package does that: sentencepiece never does); False: it is text like any other.

    Raises:
        ConfigError: unknown type, no file given, or a tokenizer that cannot leave such names text.
        DataError: the file is missing or is not what the type means.
    """
    if tokenizer_type is not None and tokenizer_type not in TYPES:
        raise ConfigError(f"unknown tokenizer_type {tokenizer_type!r}", "tokenizer_type", f"one of {', '.join(TYPES)}")
    if tokenizer_type == "NullTokenizer":
        if not vocab_size:
            raise ConfigError("NullTokenizer needs a vocabulary size", "tokenizer_type", "give --vocab-size")
        return NullTokenizer(vocab_size)
    if not tokenizer_model:
        raise ConfigError("no tokenizer given", "tokenizer_model", "give --tokenizer-model FILE_OR_FOLDER")
    path = Path(tokenizer_model)
    if not path.exists():
        raise DataError(
            f"the tokenizer {tokenizer_model} does not exist", "tokenizer_model", "correct --tokenizer-model"
        )
    kind, file = _locate(tokenizer_type, path)
    if kind == "HuggingFaceTokenizer" and huggingface is not None:
        return huggingface(file)
    return {
        "HuggingFaceTokenizer": HuggingFaceTokenizer,
        "SentencePieceTokenizer": SentencePieceTokenizer,
        "TikTokenizer": TikTokenizer,
    }[kind](file, special_tokens_in_text)


def _locate(tokenizer_type: str | None, path: Path) -> tuple[str, Path]:
    """The type and the file of a path that may be a folder."""
    if path.is_dir():
        for kind, pattern in (("HuggingFaceTokenizer", "tokenizer.json"), ("SentencePieceTokenizer", "*.model")):
            found = sorted(path.glob(pattern))
            if found and tokenizer_type in (None, kind):
                return kind, found[0]
        raise DataError(
            f"the folder {path} holds no tokenizer",
            "tokenizer_model",
            "the folder must hold a tokenizer.json or a .model file",
        )
    if tokenizer_type is not None:
        return tokenizer_type, path
    if path.suffix == ".model":
        return "SentencePieceTokenizer", path
    if path.suffix == ".json":
        return ("TikTokenizer" if _first_byte(path) == b"[" else "HuggingFaceTokenizer"), path
    raise ConfigError(
        f"the tokenizer type cannot be detected from {path.name}",
        "tokenizer_model",
        f"give --tokenizer-type, one of {', '.join(TYPES)}",
    )


def digest_of(file: Path, special_tokens_in_text: bool = True) -> str:
    """SHA-256 of a tokenizer's file, and whether special tokens in a text stay text: the two decide the ids."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return digest if special_tokens_in_text else f"{digest}, special tokens in a text are text"


# What of a tokenizer.json decides the ids of a text; padding, truncation, post-processors and blanks do not.
_DECIDING = ("model", "added_tokens", "normalizer", "pre_tokenizer")


def tokenizer_identity(tokenizer_type: str | None, tokenizer_model: str) -> dict[str, str]:
    """{"kind", "digest"} of a tokenizer's file, read without its package: equal kinds with other digests give other
    ids.

    Raises:
        ConfigError, DataError: the path names no tokenizer.
    """
    kind, file = _locate(tokenizer_type, Path(tokenizer_model))
    if kind != "HuggingFaceTokenizer":
        return {"kind": kind, "digest": digest_of(file)}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        deciding = {name: content.get(name) for name in _DECIDING}
        merges = deciding["model"].get("merges") or []
        # Newer files write a merge as a pair, older ones as two words in a text.
        deciding["model"]["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{file} is not a tokenizer.json: {error}", "tokenizer_model", "restore the file") from error
    text = json.dumps(deciding, sort_keys=True, ensure_ascii=False)
    return {"kind": kind, "digest": hashlib.sha256(text.encode()).hexdigest()}


def _first_byte(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(64).lstrip()[:1]


class HuggingFaceTokenizer:
    """A ``tokenizer.json`` through the ``tokenizers`` package; its post-processor (BOS, EOS) takes part, as in
    Megatron.

    Added tokens are cut out of a text. With ``special_tokens_in_text`` False the special ones are not: those that the
    file or the files beside it call special, and every name that could end a document, begin it or fill a row.
    """

    special_tokens_in_text = True

    def __init__(self, file: Path, special_tokens_in_text: bool = True):
        from tokenizers import Tokenizer as Backend

        try:
            self.backend = Backend.from_file(str(file))
        except Exception as error:  # the package raises bare Exception
            raise DataError(
                f"{file} is not a tokenizer.json: {error}",
                "tokenizer_model",
                "give the tokenizer.json of the model, or --tokenizer-type",
            ) from error
        # A file may ask for truncation or padding; a document must come through whole and alone.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.vocab_size = _ids(self.backend)
        names = _special_names(file.parent)
        self.file, self.digest = file, digest_of(file, special_tokens_in_text)
        self.eod = self._id(names.get("eos_token"), *END_TOKENS)
        self.bos = self._id(names.get("bos_token"), *BEGIN_TOKENS)
        self.pad = self._id(names.get("pad_token"), *PAD_TOKENS)
        if not special_tokens_in_text:
            self.special_tokens_in_text = False
            end = None if self.eod is None else self.backend.id_to_token(self.eod)
            self.leave_text(names_taken_for_special(file.parent), [] if end is None else [end])

    def leave_text(self, names: Iterable[str], never: Iterable[str]) -> None:
        """From now on special tokens are text where their names stand in one.

        Args:
            names: added tokens that are special, too, whatever the file calls them.
            never: further names that no text may become, added tokens or not.

        Raises:
            ConfigError: the model of the tokenizer makes such a token out of the text by itself.
        """
        wanted = set(names)
        for token in self.backend.get_added_tokens_decoder().values():
            if token.content in wanted and not token.special:
                token.special = True
                self.backend.add_special_tokens([token])
        self.backend.encode_special_tokens = True
        unknown = getattr(self.backend.model, "unk_token", None)
        special = [token.content for token in self.backend.get_added_tokens_decoder().values() if token.special]
        checked = [name for name in dict.fromkeys([*special, *never]) if name != unknown]
        ids = [self.backend.token_to_id(name) for name in checked]
        texts = self.backend.encode_batch_fast(checked, add_special_tokens=False)
        refuse_tokens_made_of_text(
            self.file, [n for n, i, text in zip(checked, ids, texts, strict=True) if i is not None and i in text.ids]
        )

    def _id(self, *names: str | None) -> int | None:
        ids = (self.backend.token_to_id(name) for name in names if name)
        return next((i for i in ids if i is not None), None)

    @cached_property
    def affixes(self) -> tuple[list[int], list[int]] | None:
        """Ids that the post-processor puts before and after every text (BOS, EOS); None if it does more than that."""
        before, inner = self.encode("a b"), self.backend.encode("a b", add_special_tokens=False).ids
        for begin in range(len(before) - len(inner) + 1):
            head, tail = before[:begin], before[begin + len(inner) :]
            if inner and before[begin : begin + len(inner)] == inner and self.encode("") == head + tail:
                return head, tail
        return None

    @cached_property
    def splitting(self) -> dict[str, Any] | None:
        """Normalizer and pre-tokenizer of a byte-level tokenizer as its file has them; None for another one."""
        steps = {name: getattr(self.backend, name) for name in ("normalizer", "pre_tokenizer")}
        said = {name: json.loads(step.__getstate__()) if step is not None else None for name, step in steps.items()}
        last = said["pre_tokenizer"] or {}
        while last.get("pretokenizers"):
            last = last["pretokenizers"][-1]
        return said if last.get("type") == "ByteLevel" else None

    def content(self) -> bytes:
        """The file, without the special tokens where they are text: what a fast engine reads.

        Their ids stay in the vocabulary, where no merge leads to them. Only the list of added tokens is read, since
        reading all of a large file takes half a second.
        """
        content = self.file.read_bytes()
        found = None if self.special_tokens_in_text else _ADDED_TOKENS.search(content)
        if found is None:
            return content
        text = content[found.end() - 1 :].decode()
        added, end = json.JSONDecoder().raw_decode(text)
        special = names_taken_for_special(self.file.parent)
        kept = [token for token in added if not token.get("special") and token["content"] not in special]
        return b"".join((content[: found.end() - 1], json.dumps(kept).encode(), text[end:].encode()))

    @property
    def added_tokens(self) -> list[str]:
        """Names of the added tokens, special ones among them."""
        return [token.content for token in self.backend.get_added_tokens_decoder().values()]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, after the post-processor."""
        return self.backend.encode(text).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on the package's threads; without the offsets that nobody reads."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids; special tokens are written by their names."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)


def _ids(backend: Any) -> int:
    """One more than the highest id. Where no id is left out that is their number, which takes a third of the time."""
    count = backend.get_vocab_size(with_added_tokens=True)
    if all(backend.id_to_token(i) is not None for i in range(count)):
        return count
    return max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1


# The list is told from a piece of the vocabulary of that name by its bracket.
_ADDED_TOKENS = re.compile(rb'"added_tokens"\s*:\s*\[')


def _special_names(folder: Path) -> dict[str, str]:
    """eos_token, bos_token, pad_token and so on as the files beside a tokenizer.json name them."""
    names: dict[str, str] = {}
    for content in _files_beside(folder):
        for key in ("eos_token", "bos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token"):
            value = _content_of(content.get(key))
            if value is not None:
                names[key] = value
    return names


def names_taken_for_special(folder: Path) -> set[str]:
    """Names that are special whatever the list of added tokens says: those of the files beside it, and the usual
    ones."""
    names = {*_special_names(folder).values(), *END_TOKENS, *BEGIN_TOKENS, *PAD_TOKENS}
    for content in _files_beside(folder):
        more = content.get("additional_special_tokens")
        listed = content.get("added_tokens_decoder")
        tokens = (
            [token for token in listed.values() if isinstance(token, dict) and token.get("special")]
            if isinstance(listed, dict)
            else []
        )
        names.update(name for name in map(_content_of, [*(more if isinstance(more, list) else ()), *tokens]) if name)
    return names


def _content_of(token: Any) -> str | None:
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None


def _files_beside(folder: Path) -> Iterator[dict[str, Any]]:
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / file
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path} is not JSON: {error}", "tokenizer_model", "restore or remove the file") from error
        if isinstance(content, dict):
            yield content


def refuse_tokens_made_of_text(file: Path, names: Sequence[str]) -> None:
    """Raise ConfigError where there are names that a tokenizer turns into special tokens although it was told not
    to."""
    if names:
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        raise ConfigError(
            f"{file} makes a special token of the text {shown}: it would appear in the middle of user text",
            "tokenizer_model",
            "another tokenizer; for pretraining data --special-tokens-in-text allows it",
        )


class SentencePieceTokenizer:
    """A ``.model`` through ``sentencepiece`` itself, the reference of TeleChat's tokenizers.

    User-defined pieces are cut out of the text; control pieces (``<_start>``, ``<_end>``, ...) written in a text
    are ordinary characters there: only code can place them.
    """

    def __init__(self, file: Path, special_tokens_in_text: bool = True):
        import sentencepiece

        self.backend = sentencepiece.SentencePieceProcessor()
        try:
            self.backend.Load(str(file))
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"{file} is not a sentencepiece model: {error}",
                "tokenizer_model",
                "give the tokenizer.model of the model, or --tokenizer-type",
            ) from error
        self.digest = digest_of(file)
        self.vocab_size = self.backend.GetPieceSize()
        self.eod = self._id(self.backend.eos_id(), *END_TOKENS)
        self.bos = self._id(self.backend.bos_id(), "<_start>", "<s>")
        self.pad = self._id(self.backend.pad_id(), "<_pad>", "<pad>")
        if not special_tokens_in_text and self.eod is not None:
            # A user-defined piece, where the model has no control piece for the end.
            name = self.backend.IdToPiece(self.eod)
            refuse_tokens_made_of_text(file, [name] if self.eod in self.encode(name) else [])

    def _id(self, own: int, *names: str) -> int | None:
        if own >= 0:
            return own
        found = (self.backend.PieceToId(name) for name in names)
        return next((i for i in found if i != self.backend.unk_id()), None)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; no BOS or EOS is put around it."""
        return self.backend.EncodeAsIds(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, one after the other; `text.engines.Reference` has threads."""
        return [self.backend.EncodeAsIds(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids; control pieces leave no trace."""
        return self.backend.DecodeIds([int(i) for i in ids])


class TikTokenizer:
    """A Megatron tiktoken vocabulary: a JSON list of {"rank", "token_bytes" (base64)}.

    As in megatron-core's defaults: 1,000 special ids come first, at most 2^17 ids in all, and the name of a
    special token written in a text becomes its id, unless ``special_tokens_in_text`` is False.
    """

    SPECIAL = 1000
    NAMES = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
    LARGEST = 1 << 17
    # The split pattern named v2 in Megatron.
    PATTERN = (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )

    def __init__(self, file: Path, special_tokens_in_text: bool = True):
        try:
            import tiktoken
        except ImportError as error:
            raise ConfigError(
                "TikTokenizer needs the package tiktoken", "tokenizer_type", "pip install 'megatron_telechat[tiktoken]'"
            ) from error
        ranks = self._ranks(file)
        names = [*self.NAMES, *(f"<SPECIAL_{i}>" for i in range(len(self.NAMES), self.SPECIAL))]
        self.backend = tiktoken.Encoding(
            file.stem,
            pat_str=self.PATTERN,
            mergeable_ranks={token: rank + self.SPECIAL for token, rank in ranks.items()},
            special_tokens={name: i for i, name in enumerate(names)},
        )
        self.special_tokens_in_text = special_tokens_in_text
        self.digest = digest_of(file, special_tokens_in_text)
        self.vocab_size = self.SPECIAL + len(ranks)
        self.eod, self.bos, self.pad = (self.NAMES.index(name) for name in ("</s>", "<s>", "<pad>"))

    def _ranks(self, file: Path) -> dict[bytes, int]:
        import base64

        try:
            entries = json.loads(file.read_text(encoding="utf-8"))[: self.LARGEST - self.SPECIAL]
            ranks = {base64.b64decode(entry["token_bytes"]): int(entry["rank"]) for entry in entries}
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{file} is not a tiktoken vocabulary of Megatron: {error!r}",
                "tokenizer_model",
                'a JSON list of {"rank", "token_bytes"} is meant',
            ) from error
        if sorted(ranks.values()) != list(range(len(entries))) or len(ranks) < 256:
            raise DataError(
                f"the ranks of {file} do not run from 0 without gaps", "tokenizer_model", "restore the file"
            )
        return ranks

    def encode(self, text: str) -> list[int]:
        """Ids of a text; nothing is put around it."""
        return (
            self.backend.encode(text, allowed_special="all")
            if self.special_tokens_in_text
            else self.backend.encode_ordinary(text)
        )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, one after the other."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids; bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode([int(i) for i in ids])


class NullTokenizer:
    """Text of numbers, ``"17 4 233"``: they are the ids. The last id is the end of a document."""

    def __init__(self, vocab_size: int):
        self.digest = f"numbers below {vocab_size}"
        self.vocab_size = vocab_size
        self.eod: int | None = vocab_size - 1
        self.bos: int | None = None
        self.pad: int | None = None

    def encode(self, text: str) -> list[int]:
        """The numbers of a text; they are not held to ``vocab_size``.

        Raises:
            DataError: a word is no number.
        """
        try:
            return [int(word) for word in text.split()]
        except ValueError as error:
            raise DataError(
                f"NullTokenizer reads numbers only: {error}", fix="use the tokenizer of the text"
            ) from error

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The numbers of each text; see `encode`."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The numbers, a space between two."""
        return " ".join(str(int(i)) for i in ids)

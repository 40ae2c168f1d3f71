"""The corpora and the tokenizers of tools/bench/preprocess.py: text that a package manager brings. Nothing is
distributed.

Prose is the help texts and manuals of Debian packages (``apt-get download``, unpacked beside the corpus and not
installed) with the descriptions of installed Python packages; code is the Python packages themselves and, for a corpus
larger than these, the source of the Linux kernel. No document is in a corpus twice.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import random
import re
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_telechat.data.text.tokenizer_training import SPECIAL_TOKENS, SPLIT  # noqa: E402

PACKAGES = {
    "zh": (
        "libreoffice-help-zh-cn",
        "libreoffice-help-zh-tw",
        "manpages-zh",
        "debian-reference-zh-cn",
        "debian-faq-zh-cn",
    ),
    "en": ("libreoffice-help-en-us", "debian-reference-en", "debian-handbook", "bible-kjv-text"),
}
# Downloaded when the above and what is installed do not fill the corpus; prose of other languages too, for its new
# words.
MORE = {
    "en": (
        "python3.11-doc",
        "openjdk-17-doc",
        "postgresql-doc-15",
        "cppreference-doc-en-html",
        "dict-gcide",
        "dict-foldoc",
        *(f"libreoffice-help-{language}" for language in ("ru", "ja", "ko", "de", "fr", "es")),
    ),
    "code": ("linux-source-6.1",),
}
_TEXT = (".html", ".htm", ".txt", ".md", ".rst", ".gz", ".dz", ".1", ".3", ".5", ".7", ".8")
_CODE = (".c", ".h", ".S", ".py", ".sh", ".rst", ".dts", ".dtsi", ".json", ".yaml")
_TAGS = re.compile(r"<(script|style)\b.*?</\1>|<[^>]{0,2000}>|^\.\\?\"?.{0,3}\s", re.S | re.M | re.I)
_GAPS = re.compile(r"\n\s*\n\s*\n")
_LONGEST = 60_000
# Shares of the corpus at most; code, of which there is most, takes what is left.
SHARES = {"zh": 0.2, "en": 0.3, "code": 1.0}


def build(folder: Path, megabytes: float) -> Path:
    """Write a corpus once: Chinese and prose up to their shares, code for the rest, mixed; returns its path."""
    target = folder / f"corpus-{megabytes:g}.jsonl"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[bytes] = []
    size, seen = 0, set()
    for language, share in SHARES.items():
        most = min(megabytes * 1e6, size + share * megabytes * 1e6)
        for text in _pieces(_texts(folder / "packages" / language, language)):
            if size > most:
                break
            digest = hashlib.sha1(text.encode("utf-8", "replace")).digest()
            if digest in seen or len(text) < 200:
                continue
            seen.add(digest)
            lines.append(json.dumps({"text": text}, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
            size += len(lines[-1])
    random.Random(0).shuffle(lines)
    partial = target.with_suffix(".partial")
    with open(partial, "wb") as file:
        file.writelines(lines)
    partial.replace(target)
    return target


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for begin in range(0, len(text), _LONGEST):
            yield text[begin : begin + _LONGEST]


def _texts(folder: Path, language: str) -> Iterator[str]:
    for package in PACKAGES.get(language, ()):
        yield from _package(folder, package)
    patterns = {"en": ("METADATA", "*.md", "*.rst"), "code": ("*.py", "*.h", "*.js")}.get(language, ())
    for root in dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"))):
        for pattern in patterns:
            for path in sorted(Path(root).rglob(pattern)):
                yield _read(path)
    for package in MORE.get(language, ()):
        yield from _package(folder, package)


def _package(folder: Path, name: str) -> Iterator[str]:
    """Texts of a Debian package; none where there is no apt or no such package."""
    unpacked = folder / name
    if not unpacked.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(["apt-get", "download", "-qq", name], cwd=folder, check=True, capture_output=True)
            file = next(folder.glob(f"{name}_*.deb"))
            subprocess.run(["dpkg-deb", "-x", str(file), str(unpacked)], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError, StopIteration):
            print(f"  without {name}: apt-get update && apt-get download {name} brings it")
            return
    for path in sorted(p for p in unpacked.rglob("*") if p.is_file()):
        if path.name.endswith(".tar.xz"):
            yield from _archive(path)
        elif path.suffix in _TEXT:
            yield _GAPS.sub("\n\n", html.unescape(_TAGS.sub("", _read(path)))).strip()


def _archive(path: Path) -> Iterator[str]:
    """Source files of a tar file, in its order."""
    with tarfile.open(path) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() and member.name.endswith(_CODE) else None
            if content is not None:
                yield _text(content.read())


def _read(path: Path) -> str:
    try:
        return _text(gzip.decompress(path.read_bytes()) if path.suffix in (".gz", ".dz") else path.read_bytes())
    except (OSError, EOFError):
        return ""


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8").replace("\0", "")
    except UnicodeDecodeError:
        return ""  # a file in another encoding is no loss


def _sample(corpus: Path, every: int) -> Iterator[str]:
    with open(corpus, encoding="utf-8") as file:
        for number, line in enumerate(file):
            if number % every == 0:
                yield json.loads(line)["text"]


def byte_level(corpus: Path, vocab_size: int, folder: Path) -> Path:
    """A byte-level BPE tokenizer trained on every second document, in a folder that transformers opens too."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    if (folder / "tokenizer.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_sample(corpus, 2), trainer=trainer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<_start>",
        "eos_token": "<_end>",
        "pad_token": "<_pad>",
        "unk_token": "<_unk>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def sentencepiece(corpus: Path, vocab_size: int, folder: Path, dummy_prefix: bool = False) -> Path:
    """A model of TeleChat2's kind: BPE with byte fallback, digits, newline and tab as pieces of their own, identity."""
    import io

    from sentencepiece import SentencePieceTrainer

    target = folder / "tokenizer.model"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    lines = (line[:4000] for text in _sample(corpus, 20) for line in text.split("\n") if line.strip())
    SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=dummy_prefix,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        unk_piece="<_unk>",
        bos_piece="<_start>",
        eos_piece="<_end>",
        pad_piece="<_pad>",
        control_symbols=SPECIAL_TOKENS[4:],
        minloglevel=2,
        user_defined_symbols=[*"0123456789", "_", "\n", "\t", "__", "___", "____"],
        input_sentence_size=200_000,
        shuffle_input_sentence=True,
    )
    target.write_bytes(model.getvalue())
    return target

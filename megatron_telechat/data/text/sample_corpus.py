"""A small real corpus out of what every machine with our requirements has: English, code and Chinese.

English is the documentation of Python and of the installed packages, code is Python's standard library, Chinese
is the bilingual sample written for this project and, where the system has them, the Chinese message catalogues
of its programs. It is there to try the framework out, not to train a useful model; it is built where it is
used and never distributed.
"""

from __future__ import annotations

import ast
import gettext
import hashlib
import importlib.metadata
import json
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_telechat.errors import DataError, ResourceError

SAMPLE = Path(__file__).parent / "sample" / "bilingual.jsonl"
# Shares of the budget. Chinese is scarce: it takes what is there.
SHARES = {"en": 0.45, "code": 0.45, "zh": 0.10}
_LONGEST = 60_000
_SKIPPED_PARTS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "lib2to3",
    "pydoc_data",
}
_HAN = re.compile(r"[\u4e00-\u9fff]")
_CATALOGUE_ROOTS = ("/usr/share/locale", "/usr/local/share/locale")
_MESSAGES_A_DOCUMENT = 40


@dataclass(frozen=True)
class Part:
    """One file of the corpus."""

    name: str
    path: Path
    documents: int
    size_bytes: int


def build_corpus(output: Path, max_mb: float = 8.0) -> list[Part]:
    """Write en.jsonl, zh.jsonl and code.jsonl into a folder, at most ``max_mb`` megabytes of text in all.

    The same machine gives the same files.

    Raises:
        DataError: a part came out empty.
        ResourceError: the folder cannot be written.
    """
    sources = {"en": english, "zh": chinese, "code": code}
    try:
        output.mkdir(parents=True, exist_ok=True)
        parts = [_write(output, name, source(), SHARES[name] * max_mb * 1e6) for name, source in sources.items()]
    except OSError as error:
        raise ResourceError(f"cannot write the corpus: {error}", str(output), "choose another --output") from error
    for part in parts:
        if not part.documents:
            raise DataError(f"no {part.name} text found", str(part.path), "raise --max-mb, or give texts of your own")
    return parts


def _write(output: Path, name: str, texts: Iterable[str], budget_bytes: float) -> Part:
    path = output / f"{name}.jsonl"
    partial = output / f"{name}.jsonl.partial"
    documents = size = 0
    seen: set[bytes] = set()
    with open(partial, "w", encoding="utf-8") as file:
        for text in texts:
            digest = hashlib.sha1(text.encode("utf-8", "replace")).digest()
            if digest in seen:
                continue
            seen.add(digest)
            size += len(text.encode("utf-8"))
            if size > budget_bytes and documents:
                break
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            documents += 1
    partial.replace(path)
    return Part(name, path, documents, path.stat().st_size)


def sample_texts(language: str) -> Iterator[str]:
    """Texts of the bilingual sample in ``zh`` or ``en``."""
    for line in SAMPLE.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry["lang"] == language:
            yield entry["text"]


def english() -> Iterator[str]:
    """The sample, Python's language reference, package descriptions, docstrings of the standard library."""
    yield from sample_texts("en")
    from pydoc_data.topics import topics

    yield from (topics[name].strip() for name in sorted(topics))
    for distribution in sorted(importlib.metadata.distributions(), key=lambda d: (d.metadata["Name"] or "").lower()):
        metadata: Any = distribution.metadata  # an email message, which its declared type hides
        body = metadata.get_payload() or metadata.get("Description") or ""
        if isinstance(body, str) and len(body) > 400 and not _HAN.search(body):
            yield body.strip()[:_LONGEST]
    for path in _library_files():
        text = _docstrings(path)
        if len(text) > 400:
            yield text


def code() -> Iterator[str]:
    """Sources of the standard library."""
    for path in _library_files():
        text = _read(path)
        if 400 < len(text):
            yield text[:_LONGEST]


def chinese() -> Iterator[str]:
    """The sample, then messages of installed programs in Chinese."""
    yield from sample_texts("zh")
    for root in _CATALOGUE_ROOTS:
        for path in sorted(Path(root).glob("zh_*/LC_MESSAGES/*.mo")):
            messages = _messages(path)
            for begin in range(0, len(messages), _MESSAGES_A_DOCUMENT):
                yield "\n".join(messages[begin : begin + _MESSAGES_A_DOCUMENT])


def _library_files() -> list[Path]:
    """Python files of the standard library, tests left out, in an order that mixes the topics but never changes."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in root.rglob("*.py") if not _SKIPPED_PARTS & set(path.relative_to(root).parts)]
    return sorted(files, key=lambda path: hashlib.sha1(path.relative_to(root).as_posix().encode()).digest())


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""  # a few files of the library are in other encodings on purpose


def _docstrings(path: Path) -> str:
    """The docstrings of a module that are prose, as one text."""
    try:
        tree = ast.parse(_read(path))
    except (SyntaxError, ValueError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(text for text in found if text and len(text) > 120)


def _messages(path: Path) -> list[str]:
    """Chinese messages of a gettext catalogue, without markers of parameters and menus where there are many."""
    try:
        with open(path, "rb") as file:
            translations: Any = gettext.GNUTranslations(file)
            catalogue = translations._catalog
    except (OSError, ValueError, UnicodeDecodeError, LookupError):
        return []  # a catalogue that is damaged or in an unknown encoding is no loss
    texts = (value for key, value in catalogue.items() if key != "" and isinstance(value, str))
    return [text.strip() for text in texts if len(_HAN.findall(text)) >= 8]

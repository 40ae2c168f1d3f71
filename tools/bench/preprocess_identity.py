#!/usr/bin/env python3
"""Whether preprocess_data writes the bytes of Megatron-LM's, for every kind of tokenizer and way of running.

    python tools/bench/preprocess_identity.py --work DIR --megatron CHECKOUT [--documents 600] [--mb 180] [--whole]

A sample of the corpus of preprocess.py (the same --work shares it) with documents made to be hard, in two keys, one of
them often empty. For each tokenizer, with and without --append-eod, Megatron's tool runs with one worker and with two,
ours with one, with two, and in three shards that are merged; all .bin and .idx are compared. --whole compares the whole
corpus too, by our fast engine and by the tokenizer itself. Before that the characters are counted at which an engine
splits texts otherwise than the tokenizer. Exit code 1 if any bytes differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import preprocess_corpus as corpus_of  # noqa: E402

from megatron_telechat.data.text.engines import open_engine  # noqa: E402
from megatron_telechat.data.text.unicode_guard import guarded  # noqa: E402
from megatron_telechat.data.tokenizers import build_tokenizer  # noqa: E402

KEYS = ("text", "title")
HARD = (
    "",
    " ",
    "\n",
    "\t \n",
    "<_end>",
    "<_user>hi<_bot>there<_end>",
    "a<_start>b",
    "1234567890 12 3",
    "a\r\nb\rc",
    "x\u2028y\u2029z",
    "\ufeffbom",
    "🙂👩‍👩‍👧‍👦",
    "e\u0301 é ﬁ",
    "天地玄黄，宇宙洪荒。\n中 文mixed",
    "\u3000全角",
    "don't I'LL",
    "  leading",
    "trailing  ",
    "_ __ ___ ____ _____",
    "\x00\x01\x7f",
    "x" * 5000,
    " " * 200,
    "\n" * 50,
    "नमस्ते สวัสดี 안녕 ﷺ",
    "\U0010ffff",
    "<0x41>▁x",
    # Letters since Unicode 15.1 to 17, which not all packages know yet.
    *(
        f'"{letter}",\n a{letter}b {letter}{letter}1'
        for letter in "\U0002ebf0\ua7cd\ua7db\ua7cf\u088f\U00010d50\U00010940\U00016ebb\U000323b0"
    ),
)


def sample(corpus: Path, count: int, target: Path) -> Path:
    """Every so many documents of the corpus, the hard ones between them; half of the lines in \\u escapes."""
    lines = corpus.read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"][:8000] for line in lines[:: max(len(lines) // count, 1)]]
    step = max(len(texts) // (2 * len(HARD)), 1)
    for place, hard in enumerate(HARD * 2):
        texts.insert(place * (step + 1), hard)
    with open(target, "w", encoding="utf-8") as file:
        for number, text in enumerate(texts):
            row = {"text": text, "title": text[:40] if number % 3 else "", "other": number}
            file.write(json.dumps(row, ensure_ascii=number % 2 == 0) + "\n")
    return target


def tokenizers(corpus: Path, work: Path) -> dict[str, Path]:
    from tokenizers import Tokenizer, processors

    large = corpus_of.byte_level(corpus, 131072, work / "bpe131072")
    small = corpus_of.byte_level(corpus, 8192, work / "bpe8192")
    begins = work / "bpe8192-bos"
    if not begins.exists():
        shutil.copytree(small, begins)
        changed = Tokenizer.from_file(str(small / "tokenizer.json"))
        changed.post_processor = processors.TemplateProcessing(single="<_start> $A", special_tokens=[("<_start>", 1)])
        changed.save(str(begins / "tokenizer.json"))
    return {
        "byte-level, 131,072 ids (int32)": large,
        "byte-level, 8,192 ids (uint16)": small,
        "byte-level that adds BOS": begins,
        "sentencepiece, byte fallback, user-defined pieces": corpus_of.sentencepiece(corpus, 32000, work / "sp"),
        "the same with a dummy prefix": corpus_of.sentencepiece(corpus, 32000, work / "sp-prefix", dummy_prefix=True),
    }


def run(command: Sequence[object], prefix: Path, keys: Sequence[str] = KEYS) -> str:
    """Digest of what a command wrote under this prefix."""
    found = subprocess.run([sys.executable, "-W", "ignore", *map(str, command)], capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{(found.stdout + found.stderr)[-1500:]}")
    digest = hashlib.sha256()
    for key in keys:
        for suffix in ("bin", "idx"):
            digest.update(Path(f"{prefix}_{key}_document.{suffix}").read_bytes())
    return digest.hexdigest()


def digests(source: Path, tokenizer: Path, eod: bool, out: Path, megatron: Path) -> dict[str, str]:
    """Digest of every way of running."""
    kind = "SentencePieceTokenizer" if tokenizer.suffix == ".model" else "HuggingFaceTokenizer"
    shared = [
        "--input",
        source,
        "--tokenizer-type",
        kind,
        "--tokenizer-model",
        tokenizer,
        *(["--append-eod"] if eod else []),
        "--json-keys",
        *KEYS,
    ]
    found = {}
    for workers in (1, 2):
        prefix = out / f"m{workers}"
        tool = (HERE / "preprocess_megatron.py", megatron, "preprocess_data.py")
        found[f"Megatron, workers {workers}"] = run(
            [*tool, *shared, "--workers", workers, "--output-prefix", prefix], prefix
        )
        prefix = out / f"o{workers}"
        # Megatron takes special tokens from a text; some of the hard documents hold their names.
        ours = [
            HERE.parent / "preprocess_data.py",
            *shared,
            "--workers",
            workers,
            "--log-interval",
            0,
            "--special-tokens-in-text",
            "--output-prefix",
        ]
        found[f"ours, workers {workers}"] = run([*ours, prefix], prefix)
    prefix = out / "s"
    for part in range(3):
        subprocess.run(
            [sys.executable, *map(str, [*ours, prefix, "--shard", f"{part}/3"])], check=True, capture_output=True
        )
    merge = [HERE.parent / "merge_data.py", "--input", f"{prefix}.shard-*", "--output-prefix", prefix]
    found["ours, three shards merged"] = run(merge, prefix)
    return found


def whole(corpus: Path, tokenizer: Path, out: Path) -> bool:
    """Whether the fast engine and the tokenizer itself give the same bytes on all of the corpus, special tokens left
    text."""
    found = []
    for engine in ("auto", "reference"):
        prefix = out / engine
        command = [
            HERE.parent / "preprocess_data.py",
            "--input",
            corpus,
            "--tokenizer-model",
            tokenizer,
            "--append-eod",
            "--workers",
            2,
            "--log-interval",
            0,
            "--engine",
            engine,
            "--output-prefix",
            prefix,
        ]
        found.append(run(command, prefix, ("text",)))
    return found[0] == found[1]


def characters(tokenizer: Path) -> Iterator[str]:
    """For each fast engine, the characters at which it splits texts as the tokenizer does not."""
    opened = build_tokenizer(None, str(tokenizer))
    every = np.array([code for code in range(128, 0x110000) if not 0xD800 <= code < 0xE000])
    for name in ("gigatoken", "tiktoken"):
        engine = guarded(open_engine(name, opened, 2), opened, print)
        wrong = np.concatenate([part[~engine.same(part)] for part in np.array_split(every, 64)])
        shown = ", ".join(f"U+{code:04X}" for code in wrong[:6].tolist())
        yield f"{name}: {wrong.size:,} of {every.size:,} characters" + (f" ({shown}, ...)" if wrong.size else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", required=True, type=Path, help="folder for the corpus, the tokenizers and the outputs"
    )
    parser.add_argument("--megatron", required=True, type=Path, help="a Megatron-LM checkout")
    parser.add_argument("--documents", type=int, default=600, help="documents of the sample")
    parser.add_argument("--mb", type=float, default=180.0, help="megabytes of the corpus")
    parser.add_argument("--whole", action="store_true", help="compare the whole corpus too, with the tokenizer itself")
    args = parser.parse_args()
    corpus = corpus_of.build(args.work, args.mb)
    source = sample(corpus, args.documents, args.work / "sample.jsonl")
    print(f"sample: {source.stat().st_size / 1e6:.1f} MB, keys {', '.join(KEYS)}")
    print(
        "split otherwise than by the tokenizer:",
        *characters(corpus_of.byte_level(corpus, 131072, args.work / "bpe131072")),
        sep="\n  ",
    )
    same = True
    for name, tokenizer in tokenizers(corpus, args.work).items():
        for eod in (False, True):
            out = args.work / "identity"
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            found = digests(source, tokenizer, eod, out, args.megatron)
            wanted = found["Megatron, workers 1"]
            different = [way for way, digest in found.items() if digest != wanted]
            same = same and not different
            verdict = f"DIFFERENT: {', '.join(different)}" if different else f"the same bytes, {len(found)} ways"
            print(f"{name:52}{'with' if eod else 'without'} --append-eod: {verdict}", flush=True)
        if args.whole:
            alike = whole(corpus, tokenizer, args.work / "identity")
            same = same and alike
            print(
                f"{name:52}the whole corpus, {corpus.stat().st_size / 1e6:.0f} MB: "
                f"{'the same bytes' if alike else 'DIFFERENT'}",
                flush=True,
            )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())

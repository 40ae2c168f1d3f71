"""Characters that an engine takes for another kind: the ids are the tokenizer's own all the same."""

from __future__ import annotations

import random

import numpy as np
import pytest

from megatron_telechat.cli.preprocess_data import main
from megatron_telechat.data.indexed.dataset import IndexedDataset
from megatron_telechat.data.text import unicode_guard
from megatron_telechat.data.text.engines import Reference, flatten, open_engine
from megatron_telechat.data.text.unicode_guard import CONTEXT, Guarded, Splits, guarded
from megatron_telechat.data.tokenizers import build_tokenizer
from tests.data.material import TEXTS, write_jsonl
from tests.data.test_engines import files, split_tokenizer  # noqa: F401

# Letters since Unicode 15.1 to 17: one package or another does not know them yet.
NEW = "\U0002ebf0\ua7cd\ua7db\ua7cf\u088f\U00010d50\U00010940\U00016ebb\U000323b0"


class Mistaken:
    """An engine that gives a text with one of some characters another last id."""

    name, threads = "mistaken", 2

    def __init__(self, tokenizer, wrong: str):
        self.tokenizer, self.wrong, self.texts = tokenizer, set(wrong), 0

    def encode_batch(self, texts):
        self.texts += len(texts)
        ids = [
            [*found[:-1], 0] if self.wrong & set(text) else found
            for text, found in zip(texts, self.tokenizer.encode_batch(texts), strict=True)
        ]
        flat, lengths = flatten(ids)
        return flat.astype(np.uint32), lengths


@pytest.fixture(scope="module")
def tokenizer(files):  # noqa: F811
    return build_tokenizer(None, str(files["split"]))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """With merges of these letters and the signs beside them, which a text that is split at another place shows."""
    texts = [*TEXTS * 4, *(f'"{character}",\n' for character in NEW * 50)]
    return split_tokenizer(tmp_path_factory.mktemp("large") / "large", vocab_size=600, texts=texts)


def equal(found, right) -> bool:
    return all(np.array_equal(*pair) for pair in zip(found, right, strict=True))


@pytest.mark.parametrize("group", [1, 50, 1 << 14])
@pytest.mark.parametrize(
    "wrong", ["ɏ", "\u0085", "\u3000", "ſ", "龦", "\ue000", "🙂", "\U0002a6d7", "\U0010fffe", "ɏ龦🙂\U0002ebf0"]
)
def test_texts_with_such_characters_get_the_references_ids(tokenizer, wrong, group, monkeypatch):
    monkeypatch.setattr(unicode_guard, "_GROUP", group)
    rng = random.Random(wrong)
    others = "abc 12,\nàßñяю天地玄黄가힣、。🙃👩‍👩‍👧𠀀\u2028\u200b"
    reference, said = Reference(tokenizer, 1), []
    guarded = Guarded(Mistaken(tokenizer, wrong), reference, said.append)
    for _ in range(12):
        texts = [
            "".join(rng.choices(others + wrong * (rng.random() < 0.3), k=rng.randrange(60)))
            for _ in range(rng.randrange(20))
        ]
        assert equal(guarded.encode_batch(texts), reference.encode_batch(texts))
    assert said and all("is encoded" in line or "are encoded" in line for line in said)
    assert any(f"U+{ord(wrong[0]):04X}" in line for line in said) or len(wrong) > 1


def test_only_texts_with_such_characters_are_encoded_twice(tokenizer):
    class Counting(Reference):
        seen: list[str] = []

        def encode_batch(self, texts):
            self.seen += [text for text in texts if text not in probes]
            return super().encode_batch(texts)

    probes = {CONTEXT.format(character) for character in "éɏ天🙂"}
    guarded = Guarded(Mistaken(tokenizer, "ɏ"), Counting(tokenizer, 1), lambda line: None)
    guarded.encode_batch(["plain", "é 天 🙂", "a ɏ b", "é"])
    guarded.encode_batch(["é 天 🙂", "ɏɏ"])
    assert Counting.seen == ["a ɏ b", "ɏɏ"]


def test_a_character_is_compared_once(tokenizer):
    engine = Mistaken(tokenizer, "")
    guarded = Guarded(engine, Reference(tokenizer, 1), lambda line: None)
    for _ in range(5):
        guarded.encode_batch(["é🙂龦é", "ж龦"])
    assert engine.texts == 5 * 2 + 2  # the new ones, and not é and ж


def test_many_characters_are_told_of_in_few_lines(tokenizer):
    said: list[str] = []
    wrong = "".join(map(chr, range(0x3400, 0x34FF)))
    guarded = Guarded(Mistaken(tokenizer, wrong), Reference(tokenizer, 1), said.append)
    for character in wrong:
        guarded.encode_batch([character])
    assert len(said) == 3 and "U+3400" in said[0]


def test_an_engine_that_is_wrong_on_ascii_is_not_used(tmp_path, files, monkeypatch, capsys):  # noqa: F811
    from megatron_telechat.data.text.engines import Gigatoken

    encode = Gigatoken.encode_batch

    def mistaken(self, texts):
        flat, lengths = encode(self, [text.replace("~", "-") for text in texts])
        return flat, lengths

    monkeypatch.setattr(Gigatoken, "encode_batch", mistaken)
    source = write_jsonl(tmp_path / "in.jsonl", ["no such sign here"])
    assert (
        main(
            [
                "--input",
                str(source),
                "--output-prefix",
                str(tmp_path / "o"),
                "--tokenizer-model",
                str(files["split"]),
                "--workers",
                "1",
            ]
        )
        == 0
    )
    assert "engine gigatoken is not used (its ids differ" in capsys.readouterr().err


KINDS = ("LETTER", "CAPITAL", "DIGIT", "BLANK")
PATTERNS = [
    r"[^\r\n\p{L}\p{N}LETTERDIGIT]?[\p{L}LETTERCAPITAL]+|[\p{N}DIGIT]| ?[^\s\p{L}\p{N}LETTERDIGITBLANKCAPITAL]+[\r\n]*"
    r"|[\sBLANK]*[\r\n]+|[\sBLANK]+(?![^\sBLANK])|[\sBLANK]+",
    r" ?[\p{Lu}CAPITAL]*[\p{Ll}LETTER]+| ?[\p{Lu}CAPITAL]+[\p{Ll}LETTER]*|[\p{N}DIGIT]{1,3}| "
    r"?[^\s\p{L}\p{N}LETTERDIGITBLANKCAPITAL]+[\r\n/]*"
    r"|[\sBLANK]*[\r\n]+|[\sBLANK]+(?![^\sBLANK])|[\sBLANK]+",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_character_of_another_kind_shows(pattern):
    """A snowman taken for a letter, a digit or a blank, by patterns that say so."""

    def ids(kind: str) -> list[int]:
        said = pattern
        for name in KINDS:
            said = said.replace(name, "☃" if name == kind else "")
        steps = [
            {"type": "Split", "pattern": {"Regex": said}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ]
        return Splits({"normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}).encode(
            CONTEXT.format("☃")
        )

    kinds = [kind for kind in ("", *KINDS) if kind != "CAPITAL" or "Lu" in pattern]
    found = {kind: ids(kind) for kind in kinds}
    assert all(found[one] != found[other] for place, one in enumerate(kinds) for other in kinds[:place])


@pytest.mark.heavy
@pytest.mark.parametrize("engine", ["gigatoken", "tiktoken"])
@pytest.mark.parametrize("workers", [1, 2])
def test_the_newest_letters_of_unicode(tmp_path, large, engine, workers):
    tokenizer = build_tokenizer(None, str(large))
    texts = [*TEXTS, *(f'{TEXTS[i % 5]} "{c}",\n a{c}b {c}{c} 1{c}' for i, c in enumerate(NEW * 3))]
    fast = open_engine(engine, tokenizer, workers)
    reference = Reference(tokenizer, 1)
    assert equal(guarded(fast, tokenizer, lambda line: None).encode_batch(texts), reference.encode_batch(texts))
    if engine == "gigatoken":  # by itself it is wrong; once it is not, this list wants newer letters
        assert not equal(fast.encode_batch(texts), reference.encode_batch(texts))
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    tokens = {}
    for name in (engine, "reference"):
        assert (
            main(
                [
                    "--input",
                    str(source),
                    "--output-prefix",
                    str(tmp_path / name),
                    "--tokenizer-model",
                    str(large),
                    "--workers",
                    str(workers),
                    "--engine",
                    name,
                ]
            )
            == 0
        )
        tokens[name] = IndexedDataset(str(tmp_path / f"{name}_text_document")).tokens.tolist()
    assert tokens[engine] == tokens["reference"]
